"""Control-C and SIGTERM: recorded during a call of the loop, and handled after it."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trainer.errors import StoppedError


class Signals:
    """Stop signals, and the agreement of all workers to stop at the same step."""

    def __init__(
        self, advice: str, all_gather: Callable[[list[float]], Any] = np.atleast_2d
    ) -> None:
        """Starts without a signal. `advice` is how to continue, for the message.

        `all_gather` exchanges numbers with the other workers, so that all stop together.
        """
        self._received, self._advice, self._all_gather = 0, advice, all_gather

    def stop_if_received(
        self, save: Callable[[], None] = lambda: None, *, due: bool = False
    ) -> None:
        """Calls `save` and raises StoppedError if a worker has received a signal.

        All workers must call this together. If one of them sets `due`, all call `save`.
        """
        rows = self._all_gather([self._received, due])
        if rows.any():
            save()
        if number := int(rows[:, 0].max()):
            raise StoppedError(number, self._advice)

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
