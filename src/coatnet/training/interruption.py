"""SIGINT and SIGTERM as a flag that the training loop looks at between two steps."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(SystemExit):
    """Training was told to stop and has saved itself; `code` is 128 + the signal's number, for the shell."""


class Interruption:
    """While entered, the first SIGINT or SIGTERM sets `.signal`; a second SIGINT aborts at once, unsaved.

    Outside the main thread, where Python gives no signals, it watches nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Interruption":
        watched = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._flag) for number in watched}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _flag(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)
