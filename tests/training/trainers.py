"""Trainers that take single steps, without a run folder; consoles that record a run, and stop it at a line."""

import io
import signal
from pathlib import Path

from rich.console import Console

import coatnet
from coatnet.bundle import Bundle
from coatnet.data.splits import Splits
from coatnet.training.config import Recipe
from coatnet.training.defaults import resolve
from coatnet.training.distributed.processes import SINGLE_PROCESS, Processes
from coatnet.training.run_folder import RunFolder
from coatnet.training.trainer import Trainer

# For recipes: the same learning rate in every step.
CONSTANT = {"decay": "constant", "warmup_steps": 0, "minimum_learning_rate": 0.0}


def trainer_for(
    recipe: Recipe, splits: Splits | None = None, init: Bundle | None = None, processes: Processes = SINGLE_PROCESS
) -> Trainer:
    """A trainer at its first step; its folder is never written."""
    splits = splits or coatnet.open_dataset(recipe.data)
    folder = RunFolder(Path("a folder that is never made"), recipe)
    return Trainer(resolve(recipe, splits, init), splits, folder, init=init, processes=processes)


class RecordingConsole(Console):
    """Records its output; sends this process a signal at the first line with a text, by default an evaluation's."""

    def __init__(self, number: int | None = None, at: str = "on held-out images") -> None:
        super().__init__(file=io.StringIO(), force_terminal=False, soft_wrap=True)
        self.number, self.at = number, at

    def print(self, *objects, **options):
        super().print(*objects, **options)
        if self.number is not None and self.at in str(objects[0]):
            self.number, number = None, self.number
            signal.raise_signal(number)

    @property
    def text(self) -> str:
        return self.file.getvalue()
