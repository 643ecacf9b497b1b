"""Signals as a flag that the training loop looks at between two steps."""

import signal
import threading
from types import FrameType, TracebackType

WATCHED = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1
PREEMPTED = 143  # what a shell reports of a process that SIGTERM ended


class Interrupted(SystemExit):
    """Training was told to stop and has saved itself; `code` is for the shell: 130 after SIGINT, else 143."""


class Interruption:
    """While entered, the first SIGINT, SIGTERM or SIGUSR1 sets `.signal`; a second SIGINT aborts at once, unsaved.

    SIGUSR1 is what a cluster may be told to send before SIGTERM. Outside the main thread, where Python gives no
    signals, it watches nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Interruption":
        main = threading.current_thread() is threading.main_thread()
        watched = [number for number in signal.Signals if number.name in WATCHED] if main else []
        self._previous = {number: signal.signal(number, self._flag) for number in watched}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _flag(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)


def exit_code(number: signal.Signals) -> int:
    """What to tell the shell."""
    return 128 + number if number == signal.SIGINT else PREEMPTED
