"""Writing checkpoints as a run of one process does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from coatnet.training.async_checkpoint import CheckpointWriter
from coatnet.training.distributed.processes import SINGLE_PROCESS


def save(folder: Path, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write `folder/name` and wait for it."""
    writer = CheckpointWriter(folder, SINGLE_PROCESS, keep=1000)
    writer.start(name, tensors, state)
    writer.finish()
    return folder / name
