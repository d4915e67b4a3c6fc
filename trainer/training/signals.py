"""Control-C and SIGTERM: recorded during a call of the loop, and handled after it."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trainer.errors import StoppedError


class Signals:
    """Stop signals, and the agreement of all workers to stop at the same step.

    Attributes:
        agreed: The signal that some worker had received at the last `agree`, or None.
    """

    def __init__(
        self, advice: str, all_gather: Callable[[list[float]], Any] = np.atleast_2d
    ) -> None:
        """Starts without a signal.

        Args:
            advice: How to continue, for the message.
            all_gather: Exchanges numbers with the other workers, so that all stop together.
        """
        self.agreed: int | None = None
        self._received: int | None = None
        self._advice = advice
        self._all_gather = all_gather

    def agree(self, *, due: bool = False) -> bool:
        """Exchanges the received signals and sets `agreed`. All workers must call this together.

        Args:
            due: Whether this worker requests an action that all workers take together.

        Returns:
            Whether any worker requests it.
        """
        rows = self._all_gather([self._received or 0, due])
        self.agreed = int(rows[:, 0].max()) or None
        return bool(rows[:, 1].any())

    def stop_if_agreed(self) -> None:
        """Raises StoppedError if `agreed` is a signal."""
        if self.agreed is not None:
            raise StoppedError(self.agreed, self._advice)

    def stop_if_received(self) -> None:
        """Calls `agree`, and raises StoppedError if any worker has received a signal."""
        self.agree()
        self.stop_if_agreed()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Records the first signal inside the block. A second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can receive signals
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, _frame: Any) -> None:
            self._received = number
            restore()

        try:
            for number in before:
                signal.signal(number, note)
            yield
        finally:
            restore()
