"""The images of a run, kept decoded by one process of each machine for all of them."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

import numpy as np

from coatnet.data.loader import sampler_of
from coatnet.data.pixel_cache import CachedDataset, Reduction, attach, keep_images
from coatnet.data.splits import Splits
from coatnet.errors import counted
from coatnet.training.config import TrainingConfig
from coatnet.training.distributed.processes import SINGLE_PROCESS, Processes


@contextmanager
def cached_images(
    config: TrainingConfig,
    splits: Splits,
    processes: Processes = SINGLE_PROCESS,
    *,
    num_steps: int | None = None,
    quiet: bool = False,
) -> Iterator[tuple[Splits, str]]:
    """Give the splits with the images that training and its evaluations look at, kept as `config.cache` says, and a
    line about them, for the duration of a block; without a cache, the splits as they are and an empty line.

    All processes must enter it together. With `num_steps`, to try something, only the images of so many steps are kept,
    in memory; `quiet` shows no progress bar.
    """
    if config.cache == "none" or splits.training.in_memory:
        yield splits, ""
        return
    parts = [splits.training, splits.validation]
    reductions = [
        Reduction.for_training(config.preprocessing, config.augmentation),
        Reduction(config.preprocessing),
    ]
    where = "disk" if config.cache == "disk" and num_steps is None else "memory"
    shown, indices = processes.is_main and not quiet, [None, None]
    if num_steps is not None:
        order = sampler_of(splits.training, config.seed, config.balance == "sampler")
        indices = [np.unique(order.indices(np.arange(num_steps * config.batch_size))).tolist(), []]
    with ExitStack() as held:
        cached: list[CachedDataset] = []
        with processes.collective(slow=True):
            if processes.local_rank == 0:
                for part, reduction, some in zip(parts, reductions, indices, strict=True):
                    kept = keep_images(part, reduction, where, indices=some, shown=shown)
                    cached.append(held.enter_context(closing(kept)))
        if processes.is_distributed:  # all of them, though one may be alone on its machine
            addresses = processes.gather([each.address() for each in cached])[processes.rank - processes.local_rank]
            if processes.local_rank:
                for part, reduction, address in zip(parts, reductions, addresses, strict=True):
                    cached.append(held.enter_context(closing(attach(part, reduction, address))))
            processes.gather(None)  # until all have opened the files
        yield replace(splits, training=cached[0], validation=cached[1]), describe(cached, where)


def describe(cached: list[CachedDataset], where: str) -> str:
    """What is kept, where, how large, and how much is not.

    `1,952 images kept decoded in memory: 270.3 MB, shorter sides of at most 217 (training) and 146 (held-out) pixels`.
    """
    total, kept = sum(map(len, cached)), sum(int(np.count_nonzero(each.kept)) for each in cached)
    place, size = "on the disk" if where == "disk" else "in memory", sum(each.num_bytes for each in cached) / 1e6
    training, held_out = (each.reduction.side for each in cached)
    sides = f"{training} (training) and {held_out} (held-out)" if training != held_out else f"{training}"
    rest = "" if kept == total else f"; {total - kept:,} more, without room or unreadable, are decoded each time"
    return (
        f"{counted(kept, 'image')} kept decoded {place}: {size:,.1f} MB, shorter sides of at most {sides} pixels{rest}"
    )
