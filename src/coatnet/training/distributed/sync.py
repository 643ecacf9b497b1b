"""What all processes of a run know together after every step: whether to stop, and whether to save."""

import signal

from coatnet.training.distributed.processes import Processes


class Agreement:
    """Every method is called by all processes, and leaves the same on each.

    `stop` is the signal that one of them was told, `save_due` whether it is time to save by the first one's clock,
    `written` whether the parts of all processes of the checkpoint on its way are on the disk.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.stop: signal.Signals | None = None
        self.save_due = self.written = False

    def after_step(self, seconds: float, told: signal.Signals | None, *, save_due: bool, written: bool) -> float:
        """From what each process knows; the seconds of the first one."""
        leads = self._processes.is_main
        mine = [seconds * leads, save_due * leads, written, told is not None]
        seconds, due, num_written, num_told = self._processes.sum(mine)
        self.save_due, self.written = due > 0, num_written == self._processes.world_size
        if num_told:
            self._heed(told)
        return seconds

    def stops(self, told: signal.Signals | None) -> bool:
        """Whether the run stops after this step: with others by what they agreed on, alone at a word."""
        if self._processes.alone:
            self.stop = told
        return self.stop is not None

    def stops_measuring(self, told: signal.Signals | None) -> bool:
        """Whether any process was told to stop; asked between two batches of an evaluation."""
        if self._processes.sum([told is not None])[0]:
            self._heed(told)
        return self.stop is not None

    def _heed(self, told: signal.Signals | None) -> None:
        self.stop = next(each for each in self._processes.gather(told) if each is not None)
