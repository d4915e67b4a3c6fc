"""Control-C and SIGTERM, noted while a call of the loop runs and obeyed when it has ended."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from trainer.errors import StoppedError


class Signals:
    """The signal that asked the training to stop, if one did."""

    def __init__(self, advice: str) -> None:
        """Waits for none yet.

        Args:
            advice: How to go on, for the message.
        """
        self.received: int | None = None
        self._advice = advice

    def stop_if_received(self) -> None:
        """Raises StoppedError where a signal has come."""
        if self.received is not None:
            raise StoppedError(self.received, self._advice)

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
            self.received = number
            restore()

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()
