"""A second process that draws, while this one imports TensorFlow and trains.

matplotlib and scikit-learn take a second to import; beside TensorFlow's import they take none.
"""

import importlib
import os
import pickle
import subprocess
import sys
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, Any, Self, cast

_IMPORTED = ("trainer.figures", "sklearn.metrics")


class FigureProcess:
    """Calls the functions of `trainer.figures` in another process, one after the other."""

    def __init__(self) -> None:
        """Starts the process, and waits for nothing."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            process_group=0,  # control-C is for the process that trains
        )
        self._questions = cast("IO[bytes]", self._process.stdin)
        self._answers = cast("IO[bytes]", self._process.stdout)
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Ends the process, whatever it is at."""
        self._process.kill()
        self._thread.shutdown()
        self._process.communicate()

    def call(self, function: str, *arguments: Any) -> Future[Any]:
        """Has a function called.

        Args:
            function: Its name in `trainer.figures`.
            arguments: What it takes; anything that can be pickled.

        Returns:
            What will be its result, or raise RuntimeError with what went wrong there.
        """
        return self._thread.submit(self._ask, function, arguments)

    def _ask(self, function: str, arguments: tuple[Any, ...]) -> Any:
        try:
            pickle.dump((function, arguments), self._questions)
            self._questions.flush()
            failed, answer = pickle.load(self._answers)
        except (EOFError, BrokenPipeError):
            raise RuntimeError(
                f"the process that draws ended with {self._process.wait()} during {function}"
            ) from None
        if failed:
            raise RuntimeError(f"{function} failed in the process that draws:\n{answer}")
        return answer


def main() -> None:
    """Answers calls until no more can come."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    figures, *_ = [importlib.import_module(name) for name in _IMPORTED]
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (False, getattr(figures, function)(*arguments))
        except Exception:  # told to the process that asked, which raises it
            answer = (True, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
