"""A step that does not fit into memory, told as what to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from coatnet.errors import UserError

_ON_CPUS = "can't allocate memory"  # torch has no exception of its own for them


@contextmanager
def shortage_explained(step: int, images_at_once: int, resolution: int) -> Iterator[None]:
    """Turns an exhausted memory into a UserError that says what would need less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and _ON_CPUS not in str(error):
            raise
        smaller = max(1, images_at_once // 2)
        raise UserError(
            f"step {step}: out of memory with {images_at_once} images of {resolution} pixels at once. "
            f"Give micro_batch_size {smaller}, activation_checkpointing transformer (or all), or a smaller resolution"
        ) from error
