"""Control-C and SIGTERM, noted while a call of the loop runs and obeyed when it has ended."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from trainer.cluster import AllGather, single_worker
from trainer.errors import StoppedError


class Signals:
    """The signal that asked the training to stop, if one did."""

    def __init__(self, advice: str, all_gather: AllGather = single_worker) -> None:
        """Waits for none yet.

        Args:
            advice: How to go on, for the message.
            all_gather: Tells the other workers of a cluster: all stop at the same place.
        """
        self.agreed: int | None = None
        self._received: int | None = None
        self._advice = advice
        self._exchange = all_gather

    def agree(self, *, due: bool = False) -> bool:
        """Sets `agreed` to the signal that any worker has received; all must call it together.

        Args:
            due: Something that this worker would do now, and that all have to do together.

        Returns:
            Whether any worker would.
        """
        rows = self._exchange([self._received or 0, due])
        self.agreed = int(rows[:, 0].max()) or None
        return bool(rows[:, 1].any())

    def stop_if_agreed(self) -> None:
        """Raises StoppedError where a signal has come."""
        if self.agreed is not None:
            raise StoppedError(self.agreed, self._advice)

    def stop_if_received(self) -> None:
        """Asks all workers, and raises StoppedError where a signal has come."""
        self.agree()
        self.stop_if_agreed()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes the first signal; a second one ends everything at once, as without us."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets the main thread alone receive signals
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, frame: Any) -> None:  # noqa: ARG001
            self._received = number
            restore()

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()
