"""From datasets to batches: in this process for arrays, in worker processes for files.

Training batch b takes the positions [b * B, (b + 1) * B) of the endless order, so a step number resumes.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from coatnet.data.batches import Batch, EvaluationBatches, TrainingBatches
from coatnet.data.datasets import ArrayDataset, Dataset
from coatnet.data.sampler import BalancedSampler, EpochSampler
from coatnet.data.shards.dataset import ShardDataset
from coatnet.data.transforms import Augmentation, EvaluationTransform, Preprocessing, TrainingTransform
from coatnet.data.unreadable import BadImages
from coatnet.data.workers import (
    BATCHES_ON_THE_WAY,
    CHECK_SECONDS,
    WorkerReaper,
    refuse_small_shared_memory,
    signals_held,
    with_timeout,
)
from coatnet.errors import UserError

MOST_WORKERS = 8
PATIENCE = 900.0  # seconds that a batch is waited for; chosen: far above what slow storage takes, far below a night


def training_batches(
    dataset: Dataset,
    *,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    batch_size: int,
    seed: int,
    first_step: int,
    num_steps: int,
    num_workers: int | None,
    bad_images: BadImages,
    balanced: bool = False,
    places: NDArray[np.int64] | None = None,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """`num_steps` batches from `first_step` on: images (B, C, R, R), channels last; labels (B,) or (B, K).

    The same batches whatever the workers. An image that cannot be used is replaced by the next good one.

    `num_workers` None means one a core, up to 8. Arrays never need any. `places` are those in a batch, 0 to
    `batch_size` - 1, whose images are wanted here; all of them if None.

    Raises `UserError` with the list once `bad_images` is over its budget.
    """
    transform = TrainingTransform(preprocessing, augmentation)
    batches = TrainingBatches(dataset, transform, sampler_of(dataset, seed, balanced), batch_size, seed, places)
    for batch in _run(batches, range(first_step, first_step + num_steps), num_workers, bad_images):
        if len(batch.indices) < len(batches.places):
            raise UserError(f"{dataset.name}: dozens of images in a row cannot be used, such as {min(batch.bad)}")
        yield batch.images, batch.labels


def evaluation_batches(
    dataset: Dataset,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    num_workers: int | None,
    bad_images: BadImages,
    first: int = 0,
    every: int = 1,
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """Every image once, in order: images (B, C, R, R), labels (B,) or (B, K), indices (B,). B varies.

    Of the batches, only number `first` and every `every`-th after it.

    An image that cannot be used is left out, because another in its place would count twice.

    Raises `UserError` with the list once `bad_images` is over its budget.
    """
    batches = EvaluationBatches(dataset, EvaluationTransform(preprocessing), batch_size)
    for batch in _run(batches, range(first, len(batches), every), num_workers, bad_images):
        if len(batch.indices):
            yield batch.images, batch.labels, batch.indices


def sampler_of(dataset: Dataset, seed: int, balanced: bool = False) -> EpochSampler | BalancedSampler:
    """Every class equally often; or every image once an epoch, those in shards by blocks of neighbours."""
    if balanced:
        return BalancedSampler(dataset.labels, seed)
    return dataset.order(seed) if isinstance(dataset, ShardDataset) else EpochSampler(len(dataset), seed)


def _run(
    batches: TrainingBatches | EvaluationBatches,
    numbers: range,
    num_workers: int | None,
    bad_images: BadImages,
) -> Iterator[Batch]:
    if isinstance(batches.dataset, ArrayDataset):
        num_workers = 0  # nothing to decode: a process boundary would cost more than the work
    elif num_workers is None:
        num_workers = max(0, min(MOST_WORKERS, num_cores(), len(numbers) - 1))
    produced = _from_workers(batches, numbers, num_workers) if num_workers else (batches[number] for number in numbers)
    for batch in produced:
        for name, reason in batch.bad.items():
            bad_images.add(name, reason)
        bad_images.raise_if_over()
        yield batch


def _from_workers(batches: TrainingBatches | EvaluationBatches, numbers: range, num_workers: int) -> Iterator[Batch]:
    # Fork would copy the locks of threads that do not exist in the child; a forkserver has no threads.
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "coatnet.data.loader"])
    loader: Any = DataLoader(
        batches,  # pyrefly: ignore[bad-argument-type]  # a class with __getitem__ is all it needs
        batch_size=None,  # an item is a whole batch
        sampler=numbers,
        num_workers=num_workers,
        prefetch_factor=BATCHES_ON_THE_WAY,
        timeout=CHECK_SECONDS,
        multiprocessing_context=context,
        worker_init_fn=_start_worker,
        collate_fn=_as_it_is,
    )
    refuse_small_shared_memory(num_workers, batches.num_bytes)
    workers, arrived = WorkerReaper(), 0
    try:
        with script_hidden(unless_it_defines=type(batches.dataset)), signals_held(), workers.starting():
            produced = iter(loader)
        for batch in with_timeout(produced, PATIENCE):
            arrived += 1
            yield batch
    except UserError as error:  # as the worker raised it, but for the traceback that torch wraps it in
        raise UserError(str(error).rpartition("UserError: ")[2].partition("\n")[0]) from error
    except (RuntimeError, OSError, EOFError) as error:  # by where in its work the worker was killed
        if str(error).startswith("Caught "):  # an error in a worker that lives
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        name = batches.dataset.describe(batches.first_index(numbers[min(arrived, len(numbers) - 1)]))
        if "timed out" in reason:
            raise UserError(
                f"nothing came for {PATIENCE:g} s: a worker process hangs, or reads too slowly ({name})"
            ) from error
        raise UserError(f"a worker process stopped, perhaps for lack of memory: {reason} (near {name})") from error
    finally:
        workers.kill()


@contextmanager
def script_hidden(unless_it_defines: type) -> Iterator[None]:
    """New processes run the user's script again, which would train again but for a `__main__` guard.

    Ours need nothing from it, unless the dataset's class is defined there.
    """
    names = vars(sys.modules["__main__"])
    shown = {name: names[name] for name in ("__spec__", "__file__") if name in names}
    if unless_it_defines.__module__ != "__main__":
        names.update(dict.fromkeys(shown))
    try:
        yield
    finally:
        names.update(shown)


def num_cores() -> int:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # The terminal sends Ctrl-C to the workers too, but the main process is to finish its step and stop them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
