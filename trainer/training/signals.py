"""Control-C and SIGTERM: noted during a call of the loop, and handled after it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from trainer.cluster import AllGather, single_worker
from trainer.errors import StoppedError


class Signals:
    """The signal that stops the training.

    Attributes:
        agreed: The signal that any worker has received when `agree` was last called, or None.
    """

    def __init__(self, advice: str, all_gather: AllGather = single_worker) -> None:
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
        """Sets `agreed`. All workers must call this together.

        Args:
            due: Whether this worker requests an action that all workers take together.

        Returns:
            Whether any worker requests it.
        """
        rows = self._all_gather([self._received or 0, due])
        self.agreed = int(rows[:, 0].max()) or None
        return bool(rows[:, 1].any())

    def stop_if_agreed(self) -> None:
        """Raises StoppedError if a signal was agreed."""
        if self.agreed is not None:
            raise StoppedError(self.agreed, self._advice)

    def stop_if_received(self) -> None:
        """Asks all workers, and raises StoppedError if one has received a signal."""
        self.agree()
        self.stop_if_agreed()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes the first signal. A second one ends the process at once, as without this block."""
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
