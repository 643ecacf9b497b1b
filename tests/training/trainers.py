"""Trainers that take single steps, without a run folder."""

from pathlib import Path

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
