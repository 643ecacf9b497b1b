"""From datasets to batches: in this process for arrays, in worker processes for files.

Training batch b takes the positions [b * B, (b + 1) * B) of the endless order, so a step number resumes.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from coatnet.data.bad_images import BadImages
from coatnet.data.batches import Batch, EvaluationBatches, TrainingBatches
from coatnet.data.datasets import ArrayDataset, Dataset
from coatnet.data.order import BalancedOrder, Order
from coatnet.data.transforms import Augmentation, EvaluationTransform, Preprocessing, TrainingTransform
from coatnet.errors import UserError

_MOST_WORKERS = 8


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
) -> Iterator[tuple[Tensor, Tensor]]:
    """`num_steps` batches from `first_step` on: images (B, C, R, R), channels last; labels (B,) or (B, K).

    The same batches whatever the workers. A picture that cannot be used is replaced by the next good one.

    `num_workers` None means one a core, up to 8. Arrays never need any.

    Raises `UserError` with the list once `bad_images` is over its budget.
    """
    order = BalancedOrder(dataset.labels, seed) if balanced else Order(len(dataset), seed)
    transform = TrainingTransform(preprocessing, augmentation)
    batches = TrainingBatches(dataset, transform, order, batch_size, seed)
    for batch in _run(batches, range(first_step, first_step + num_steps), num_workers, bad_images):
        if len(batch.indices) < batch_size:
            raise UserError(f"{dataset.name}: dozens of pictures in a row cannot be used, such as {min(batch.bad)}")
        yield batch.images, batch.labels


def evaluation_batches(
    dataset: Dataset,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    num_workers: int | None,
    bad_images: BadImages,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every picture once, in order: images (B, C, R, R), labels (B,) or (B, K), indices (B,). B varies.

    A picture that cannot be used is left out, because another in its place would count twice.

    Raises `UserError` with the list once `bad_images` is over its budget.
    """
    batches = EvaluationBatches(dataset, EvaluationTransform(preprocessing), batch_size)
    for batch in _run(batches, range(len(batches)), num_workers, bad_images):
        if len(batch.indices):
            yield batch.images, batch.labels, batch.indices


def _run(
    batches: TrainingBatches | EvaluationBatches,
    numbers: range,
    num_workers: int | None,
    bad_images: BadImages,
) -> Iterator[Batch]:
    if isinstance(batches.dataset, ArrayDataset):
        num_workers = 0  # nothing to decode: a process boundary would cost more than the work
    elif num_workers is None:
        num_workers = max(0, min(_MOST_WORKERS, _num_cores(), len(numbers) - 1))
    produced = _from_workers(batches, numbers, num_workers) if num_workers else (batches[number] for number in numbers)
    for batch in produced:
        for name, reason in batch.bad.items():
            bad_images.add(name, reason)
        bad_images.raise_if_over()
        yield batch


def _from_workers(batches: TrainingBatches | EvaluationBatches, numbers: range, num_workers: int) -> Iterator[Batch]:
    # Fork would copy the locks of threads that do not exist in the child; a forkserver has no threads.
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "coatnet.data.loading"])
    loader: Any = DataLoader(
        batches,  # pyrefly: ignore[bad-argument-type]  # a class with __getitem__ is all it needs
        batch_size=None,  # an item is a whole batch
        sampler=numbers,
        num_workers=num_workers,
        multiprocessing_context=context,
        worker_init_fn=_start_worker,
        collate_fn=_as_it_is,
    )
    try:
        with _script_hidden(unless_it_defines=type(batches.dataset)):
            produced = iter(loader)
        yield from produced
    except (RuntimeError, OSError, EOFError) as error:  # by where in its work the worker was killed
        if str(error).startswith("Caught "):  # an error in a worker that lives
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"a worker process stopped, perhaps for lack of memory: {reason}") from error


@contextmanager
def _script_hidden(unless_it_defines: type) -> Iterator[None]:
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


def _num_cores() -> int:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # The terminal sends Ctrl-C to the workers too, but the main process is to finish its step and stop them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
