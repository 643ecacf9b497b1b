"""Stop signals: a flag that the training loop reads between two steps, and that all processes of a run share."""

import signal
import threading
from types import FrameType, TracebackType

from coatnet.training.distributed.processes import Processes

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1
TERMINATED_EXIT_CODE = 143  # what a shell reports of a process that SIGTERM ended


class Interrupted(SystemExit):
    """A stop signal ended the training, which has saved itself; `code` is for the shell: 130 after SIGINT, else 143."""


class Interruption:
    """While entered, the first SIGINT, SIGTERM or SIGUSR1 sets `.signal`; a second SIGINT aborts at once, unsaved.

    Clusters can be set to send SIGUSR1 before SIGTERM. Outside the main thread, where Python delivers no signals, it
    does nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Interruption":
        main = threading.current_thread() is threading.main_thread()
        handled = [number for number in signal.Signals if number.name in STOP_SIGNALS] if main else []
        self._previous = {number: signal.signal(number, self._flag) for number in handled}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _flag(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)


class Synchronization:
    """The decisions that all processes take together: whether to stop, to save, and to publish a checkpoint.

    Every method is called by all processes and leaves the same on each.

    Attributes:
        save_due: whether it is time to save, by the clock of rank 0.
        written: whether all processes have written their parts of the checkpoint in progress.
    """

    def __init__(self, processes: Processes, interruption: Interruption) -> None:
        self._processes, self._interruption = processes, interruption
        self._stop: signal.Signals | None = None
        self.save_due = self.written = False

    @property
    def stop(self) -> signal.Signals | None:
        """The stop signal that any process had received when they last synchronized; a single process sees it at
        once."""
        return self._stop if self._processes.is_distributed else self._interruption.signal

    def after_step(self, seconds: float, *, save_due: bool, written: bool) -> float:
        """Synchronize after an optimizer step, of which rank 0 saw the duration in seconds that is returned."""
        is_main = self._processes.is_main
        received = self._interruption.signal
        values = [seconds * is_main, save_due * is_main, written, received is not None]
        seconds, due, num_written, num_received = self._processes.sum(values)
        self.save_due, self.written = due > 0, num_written == self._processes.world_size
        if num_received:
            self._agree_on_signal(received)
        return seconds

    def stop_requested(self) -> bool:
        """Synchronize between two batches of an evaluation: whether any process has received a stop signal."""
        received = self._interruption.signal
        if self._processes.sum([received is not None])[0]:
            self._agree_on_signal(received)
        return self.stop is not None

    def _agree_on_signal(self, received: signal.Signals | None) -> None:
        self._stop = next(each for each in self._processes.gather(received) if each is not None)


def exit_code(number: signal.Signals) -> int:
    """The exit code of a run that a signal stopped."""
    return 128 + number if number == signal.SIGINT else TERMINATED_EXIT_CODE
