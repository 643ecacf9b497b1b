"""From a dataset to batches of tensors: in this process for arrays, in worker processes for files.

A batch is a pure function of its number: the same whatever the workers, and a run resumes by its step number alone.
Batch b of size B takes the positions [b * B, (b + 1) * B) of the endless sequence of epochs. Worker processes are
shielded from the signals that launchers and schedulers send to every process of a run, since the main process needs
them to finish its step and save; they do not outlive the run, nor fill a shared memory that is too small.
"""

import functools
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from coatnet.data.augmentation import alternate
from coatnet.data.channels import as_values, read_pixels, to_levels, with_scale
from coatnet.data.datasets import Dataset, Encoded, evenly_spaced
from coatnet.data.decode import BadImage, Scale
from coatnet.data.sampler import BalancedSampler, EpochSampler, Sampler, hash_words
from coatnet.data.transforms import (
    Augmentation,
    EvaluationTransform,
    Image,
    Preprocessing,
    TrainingTransform,
    as_images,
)
from coatnet.errors import UserError, first_line
from coatnet.system.hardware import num_cores
from coatnet.system.parents import end_with_parent
from coatnet.system.terminal import warn

Item = TypeVar("Item")
InspectImages = Callable[[Sequence[Image] | NDArray[np.uint8]], list[Any]]  # an array holds images of one size

CHECK_SECONDS = 5.0  # between two checks that all workers are alive; a forkserver does not report their death
SHARED_MEMORY = "/dev/shm"
PREFETCHED_BATCHES = 2  # per worker, as in torch
CLOSE_SECONDS = 5.0  # that an end waits for the batch that a thread is making


@contextmanager
def block_signals() -> Iterator[None]:
    """Processes started in the block ignore SIGTERM and SIGUSR1. This one handles them after the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # where Python starts it later, it unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerReaper:
    """Kills the processes that were started inside `starting`."""

    def __init__(self) -> None:
        self._processes: set[multiprocessing.process.BaseProcess] = set()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Register the processes that are started in the block."""
        before = set(multiprocessing.active_children())
        try:
            yield
        finally:
            self._processes |= set(multiprocessing.active_children()) - before

    def kill(self) -> None:
        """Kill them without waiting: one that hangs would never end, and they hold nothing but batches."""
        for process in self._processes:
            process.kill()


def with_timeout(produced: Iterator[Item], seconds: float) -> Iterator[Item]:
    """Yield the items of a DataLoader with `timeout=CHECK_SECONDS`, waiting up to `seconds` for each.

    With one long timeout, the DataLoader would notice dead workers only at its end.
    """
    while True:
        began = time.monotonic()
        while True:
            try:
                item = next(produced)
                break
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" not in str(error) or time.monotonic() - began >= seconds:
                    raise
        yield item


def may_start_processes() -> bool:
    """Whether Python lets this process start others; if not, as in a worker of Celery or of a Pool, a line says so."""
    return not multiprocessing.current_process().daemon or _told_that_none_start(os.getpid())


@functools.cache
def _told_that_none_start(_: int) -> Literal[False]:
    """Tell it once in a process."""
    warn("this process is daemonic and cannot start workers: it decodes by itself")
    return False


def require_shared_memory(num_workers: int, bytes_per_batch: int) -> None:
    """Raise a UserError if the batches that workers prefetch do not fit into shared memory: a worker would crash."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    needed, free = num_workers * PREFETCHED_BATCHES * bytes_per_batch, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"{SHARED_MEMORY} has room for {free / 1e6:.0f} MB, but the batches of {num_workers} worker processes "
            f"take {needed / 1e6:.0f} MB: give fewer num_workers or a smaller batch_size, or more shared memory "
            "(docker run --shm-size 2g)"
        )


MAX_WORKERS = 8
BATCH_TIMEOUT_SECONDS = 900.0  # chosen: far above what slow storage takes, far below a night
MAX_REPLACEMENTS = 64  # candidates for one bad image; after as many in a row the batch stays short
MAX_LISTED = 20


class BadImages:
    """The images that cannot be used, by name, with the reasons; ends the run if they are more than a budget allows.

    An image is counted once, however often it is read. One is always allowed, unless the budget is 0.

    Args:
        num_images: the number of images of all datasets that are read.
        budget: the fraction of them that may be bad, 0 to 1; by default any number may.

    Raises:
        UserError: the budget is not a fraction.
    """

    def __init__(self, num_images: int, budget: float = 1.0) -> None:
        if not 0 <= budget <= 1:
            raise UserError(f"the budget for bad images must be a fraction from 0 to 1, got {budget!r}")
        self.budget = budget
        self.num_images = num_images
        self._records: dict[str, str] = {}

    @property
    def records(self) -> Mapping[str, str]:
        """The reason for each name."""
        return self._records

    @property
    def allowed(self) -> int:
        """How many images may be bad."""
        return max(1, int(self.budget * self.num_images)) if self.budget else 0

    @property
    def last(self) -> str:
        """`NAME: REASON` of the image recorded last; there is one."""
        return ": ".join(next(reversed(self._records.items())))

    def add(self, name: str, reason: str) -> None:
        """Record an image; only its first reason is kept."""
        self._records.setdefault(name, reason)

    def raise_if_over(self) -> None:
        """Raise a UserError that lists the images if there are more than allowed."""
        num_bad = len(self._records)
        if num_bad > self.allowed:
            listed = "; ".join(f"{name} ({reason})" for name, reason in list(self._records.items())[:MAX_LISTED])
            more = f"; and {num_bad - MAX_LISTED} more" if num_bad > MAX_LISTED else ""
            raise UserError(
                f"{num_bad} of {self.num_images:,} images cannot be used, {self.allowed} may be "
                f"(bad_image_budget {self.budget:g}; raise it, or remove them): {listed}{more}"
            )


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
    batch_indices: NDArray[np.int64] | None = None,
    pin_memory: bool = False,
    with_indices: bool = False,
) -> Generator[tuple[Tensor, ...], None, None]:
    """Yield `num_steps` batches from `first_step` on: images (B, C, R, R), channels last, and labels (B,) or (B, K).

    An image that cannot be used is replaced by the next good one of the dataset.

    Args:
        num_workers: processes that decode; None is one per core, up to 8. Arrays in memory never need any.
        bad_images: collects the images that cannot be used.
        balanced: show every class equally often, instead of every image once per epoch.
        batch_indices: which of the images 0 to `batch_size` - 1 of each batch to make here, for a process that takes
            a part of every batch; None is all of them.
        pin_memory: yield tensors in pinned memory, which a GPU copies while it computes.
        with_indices: yield the indices (B,) of the images as a third tensor.

    Raises:
        UserError: batch_size is below 1, `bad_images` is over its budget, or a worker process died or hangs.
    """
    transform, dataset = TrainingTransform(preprocessing, augmentation), with_scale(dataset, preprocessing.scale)
    if batch_indices is None:
        batch_indices = np.arange(batch_size)
    batches = _TrainingBatches(dataset, batch_size, transform, sampler_of(dataset, seed, balanced), seed, batch_indices)
    numbers = range(first_step, first_step + num_steps)
    for batch in _load(batches, numbers, num_workers, bad_images, pin_memory):
        if len(batch.indices) < len(batch_indices):
            raise UserError(f"{dataset.name}: dozens of images in a row cannot be used, such as {min(batch.bad)}")
        yield (batch.images, batch.labels, batch.indices) if with_indices else (batch.images, batch.labels)


def evaluation_batches(
    dataset: Dataset,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    num_workers: int | None,
    bad_images: BadImages,
    first: int = 0,
    every: int = 1,
    pin_memory: bool = False,
    inspect: InspectImages | None = None,
) -> Generator[tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, list[Any]], None, None]:
    """Yield every image once, in order: images (B, C, R, R), labels (B,) or (B, K), indices (B,). B varies.

    An image that cannot be used is left out, because another one in its place would count twice.

    Args:
        num_workers: processes that decode; None is one per core, up to 8. Arrays in memory never need any.
        bad_images: collects the images that cannot be used.
        first: number of the first batch to make.
        every: distance to the next.
        pin_memory: yield tensors in pinned memory, which a GPU copies while it computes.
        inspect: called with decoded images, where they are decoded; what it gives for each is yielded as a list of B.

    Raises:
        UserError: batch_size is below 1, `bad_images` is over its budget, or a worker process died or hangs.
    """
    dataset = with_scale(dataset, preprocessing.scale)
    batches = _EvaluationBatches(dataset, batch_size, EvaluationTransform(preprocessing), inspect)
    for batch in _load(batches, range(first, len(batches), every), num_workers, bad_images, pin_memory):
        if len(batch.indices):
            found = (batch.images, batch.labels, batch.indices)
            yield found if inspect is None else (*found, batch.inspected)


def sampler_of(dataset: Dataset, seed: int, balanced: bool = False) -> Sampler:
    """The order of training: every class equally often if `balanced`, else the dataset's own order."""
    if balanced:
        return BalancedSampler(dataset.labels, seed)
    if hasattr(dataset, "sampler"):
        return dataset.sampler(seed)
    return EpochSampler(len(dataset), seed)


def read_image(dataset: Dataset, index: int) -> tuple[Image, NDArray]:
    """The pixels of an image, a tensor (3, H, W) or an array (H, W) or (H, W, 3) of uint8, and its label.

    Where the dataset has a scale, they are levels, a float32 tensor (C, H, W).

    Raises:
        BadImage: the image cannot be read or decoded.
    """
    try:
        encoded, label = dataset.read(index)
        return to_image(dataset, index, encoded), label
    except BadImage as bad:
        if bad.code == "channels" and (other := _another_that_fits(dataset, index)):
            raise UserError(
                f"{bad}, as {other} has: all images of a data set need the same number of channels"
            ) from None
        raise
    except Exception as error:
        error.add_note(f"while reading image {index} of {dataset.name}")
        raise


def to_image(dataset: Dataset, index: int, encoded: Encoded | Tensor) -> Image:
    """What a dataset has read of an image, decoded and as levels of its scale. Raises BadImage as `read_image` does."""
    scale: Scale | None = getattr(dataset, "scale", None)
    if isinstance(encoded, bytes):
        return read_pixels(encoded, dataset.describe(index), scale)
    if scale is not None and not isinstance(encoded, Tensor):
        return to_levels(as_values(encoded), dataset.describe(index), scale)
    return encoded


def _another_that_fits(dataset: Dataset, index: int) -> str:
    """The name of an image that has the channels of the scale; empty if none of eight, evenly spread, has."""
    for other in evenly_spaced(len(dataset), 8):
        try:
            if other != index and isinstance(encoded := dataset.read(other)[0], bytes):
                read_pixels(encoded, "", dataset.scale)
                return dataset.describe(other)
        except BadImage:
            continue
    return ""


def require_readable(dataset: Dataset, purpose: str) -> None:
    """Raise UserError if there is no image, or, with the last reason, if of 200, evenly spread, none can be used."""
    if not len(dataset):
        raise UserError(
            f"{dataset.name}: no image is left for {purpose}: give more images, fewer folds, or other fractions for "
            "validation and test"
        )
    failure = None
    for index in evenly_spaced(len(dataset), 200):
        try:
            read_image(dataset, index)
            return
        except BadImage as bad:
            failure = bad
    raise UserError(f"{dataset.name}: none of the images for {purpose} can be used, the last one {failure}")


@dataclass
class _Batch:
    """Images (B, C, R, R), labels (B,) or (B, K), indices (B,), the reason for each bad image by name, and what
    `inspect` gave for each image, if anything."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: dict[str, str] = field(default_factory=dict)
    inspected: list[Any] = field(default_factory=list)

    def pin_memory(self) -> "_Batch":
        """The same in pinned memory; DataLoader calls it in a thread."""
        return _Batch(self.images.pin_memory(), self.labels.pin_memory(), self.indices, self.bad, self.inspected)


@dataclass(frozen=True)
class _EvaluationBatches:
    """Batch b of the dataset in its own order; a bad image is missing from its batch."""

    dataset: Dataset
    batch_size: int
    transform: EvaluationTransform
    inspect: InspectImages | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {self.batch_size}")

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    @property
    def num_images(self) -> int:
        """The most images of a batch."""
        return self.batch_size

    def first_index(self, number: int) -> int:
        """The index of the first image of that batch."""
        return number * self.batch_size

    def __getitem__(self, number: int) -> _Batch:
        indices = np.arange(number * self.batch_size, min((number + 1) * self.batch_size, len(self.dataset)))

        def transform(pixels: Tensor, part: slice, out: Tensor | None) -> Tensor:
            return self.transform.batch(pixels, out)

        return _make_batch(self.dataset, indices, self.transform.preprocessing, transform, 1, self.inspect)


@dataclass(frozen=True)
class _TrainingBatches:
    """Batch b of the endless run; a bad image is replaced by the next good one of the dataset."""

    dataset: Dataset
    batch_size: int
    transform: TrainingTransform
    sampler: Sampler
    seed: int
    batch_indices: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {self.batch_size}")

    @property
    def num_images(self) -> int:
        """The images of a batch that are made here."""
        return len(self.batch_indices)

    def first_index(self, number: int) -> int:
        """The index of the first image of that batch."""
        return int(self.sampler.indices(number * self.batch_size + self.batch_indices[:1])[0])

    def __getitem__(self, number: int) -> _Batch:
        indices, epochs = self.sampler.sample(number * self.batch_size + self.batch_indices)
        seeds = hash_words(self.seed, epochs, indices)
        alternating = self.transform.augmentation.flip == "alternating"
        mirrored = alternate(self.seed, epochs, indices) if alternating else None

        def transform(pixels: Tensor, part: slice, out: Tensor | None) -> Tensor:
            return self.transform.batch(pixels, seeds[part], out, None if mirrored is None else mirrored[part])

        return _make_batch(self.dataset, indices, self.transform.preprocessing, transform, MAX_REPLACEMENTS)


def _make_batch(
    dataset: Dataset,
    indices: NDArray[np.int64],
    preprocessing: Preprocessing,
    transform: Callable[[Tensor, slice, Tensor | None], Tensor],
    candidates: int,
    inspect: InspectImages | None = None,
) -> _Batch:
    """Read, decode and transform images (B,); a bad one is replaced by the first good one of so many candidates.

    `transform(pixels, part, out)` takes uint8 (b, C, H, W), which part of the batch they are, and the tensor to fill.
    """
    if getattr(dataset, "in_memory", False):
        pixels, labels = dataset.read_batch(indices)
        scale: Scale | None = getattr(dataset, "scale", None)
        if scale is not None:
            pixels = to_levels(pixels if pixels.ndim == 4 else pixels[..., None], dataset.name, scale)
        images = transform(as_images(pixels), slice(None), None)
        inspected = inspect(pixels if isinstance(pixels, np.ndarray) else list(pixels)) if inspect else []
        return _Batch(images, torch.from_numpy(labels), torch.from_numpy(indices), inspected=inspected)

    images = _empty_images(len(indices), preprocessing)
    labels, used, bad, inspected = [], [], {}, []
    for position, index in enumerate(indices.tolist()):
        for number in range(index, index + candidates):
            candidate = number % len(dataset)
            try:
                image, label = read_image(dataset, candidate)
            except BadImage as error:
                bad[error.name] = error.reason
                continue
            filled = len(used)
            transform(as_images(image)[None], slice(position, position + 1), images[filled : filled + 1])
            labels.append(label)
            used.append(candidate)
            if inspect:
                inspected += inspect([image])
            break
    if not used:
        return _Batch(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64), bad)
    return _Batch(images[: len(used)], torch.from_numpy(np.stack(labels)), torch.tensor(used), bad, inspected)


def _empty_images(count: int, preprocessing: Preprocessing) -> Tensor:
    """An uninitialized float32 tensor (B, C, H, W), channels last.

    In a worker process it lies in shared memory, so that it is not copied there on its way out.
    """
    shape = (count, *preprocessing.size, preprocessing.channels)
    if get_worker_info() is None:
        return torch.empty(shape).movedim(-1, 1)  # (B, C, H, W)
    size = math.prod(shape)
    shared = torch.UntypedStorage._new_shared(4 * size)  # as torch's own collation does
    return torch.empty(0).set_(shared, 0, (size,), (1,)).view(shape).movedim(-1, 1)  # (B, C, H, W)


def _load(
    batches: _TrainingBatches | _EvaluationBatches,
    numbers: range,
    num_workers: int | None,
    bad_images: BadImages,
    pin_memory: bool,
) -> Iterator[_Batch]:
    """Make the batches with these numbers, in order, and check the budget of bad images after each."""
    in_memory = getattr(batches.dataset, "in_memory", False)
    if in_memory:
        num_workers = 0  # nothing to decode: a process boundary would cost more than the work
    elif num_workers is None:
        num_workers = max(0, min(MAX_WORKERS, num_cores(), len(numbers) - 1))
    if num_workers and not may_start_processes():
        num_workers = 0
    if num_workers:
        loaded = _from_workers(batches, numbers, num_workers, pin_memory)
    else:
        made = (batches[number] for number in numbers) if in_memory else _from_thread(batches, numbers)
        loaded = (batch.pin_memory() for batch in made) if pin_memory else made
    for batch in loaded:
        for name, reason in batch.bad.items():
            bad_images.add(name, reason)
        bad_images.raise_if_over()
        yield batch


def _from_thread(batches: _TrainingBatches | _EvaluationBatches, numbers: range) -> Iterator[_Batch]:
    """Make each batch in a thread while the one before is used; decoders let other threads compute."""

    def make(number: int, made: Future[_Batch]) -> None:
        try:
            made.set_result(batches[number])
        except BaseException as error:  # raised where the batch is asked for
            made.set_exception(error)

    thread, made = None, None
    try:
        for number in numbers:
            batch = made.result() if made else None
            made = Future[_Batch]()
            # A daemon, so that a read that hangs does not keep an interrupted program from ending.
            thread = threading.Thread(target=make, args=(number, made), name="decode", daemon=True)
            thread.start()
            if batch is not None:
                yield batch
        if made:
            yield made.result()
    finally:
        # The garbage collector may close an abandoned generator in its own thread, which cannot wait for itself.
        if thread and thread is not threading.current_thread():
            thread.join(CLOSE_SECONDS)


def _from_workers(
    batches: _TrainingBatches | _EvaluationBatches, numbers: range, num_workers: int, pin_memory: bool
) -> Iterator[_Batch]:
    # Fork would copy the locks of threads that do not exist in the child; a forkserver has no threads.
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "coatnet.data.loader"])
    loader: Any = DataLoader(
        batches,  # pyrefly: ignore[bad-argument-type]  # a class with __getitem__ is all it needs
        batch_size=None,  # an item is a whole batch
        sampler=numbers,
        num_workers=num_workers,
        prefetch_factor=PREFETCHED_BATCHES,
        timeout=CHECK_SECONDS,
        multiprocessing_context=context,
        worker_init_fn=_start_worker,
        collate_fn=_identity,
        pin_memory=pin_memory,
    )
    preprocessing = batches.transform.preprocessing
    bytes_per_image = 4 * preprocessing.channels * math.prod(preprocessing.size)
    require_shared_memory(num_workers, batches.num_images * bytes_per_image)
    workers, num_received = WorkerReaper(), 0
    try:
        with hide_main_script(unless_it_defines=type(batches.dataset)), block_signals(), workers.starting():
            produced = iter(loader)
        for batch in with_timeout(produced, BATCH_TIMEOUT_SECONDS):
            num_received += 1
            yield batch
    except UserError as error:  # without the traceback that torch puts around a worker's message
        own = str(error).rpartition("UserError: ")[2]
        raise UserError(re.split(r"\n|\\nwhile reading image ", own)[0]) from error
    except (RuntimeError, OSError, EOFError) as error:  # which one depends on what the worker did when it was killed
        if str(error).startswith("Caught "):  # raised in a worker that is alive
            raise
        reason = first_line(error)
        name = batches.dataset.describe(batches.first_index(numbers[min(num_received, len(numbers) - 1)]))
        if "timed out" in reason:
            raise UserError(
                f"no batch for {BATCH_TIMEOUT_SECONDS:g} s: a worker process hangs, or reads too slowly ({name})"
            ) from error
        raise UserError(f"a worker process stopped, perhaps for lack of memory: {reason} (near {name})") from error
    finally:
        workers.kill()


@contextmanager
def hide_main_script(unless_it_defines: type) -> Iterator[None]:
    """Keep processes that are started in the block from running the user's script again.

    Without a `__main__` guard the script would train again. The workers need nothing from it, unless it defines the
    class of the dataset.
    """
    names = vars(sys.modules["__main__"])
    shown = {name: names[name] for name in ("__spec__", "__file__") if name in names}
    if unless_it_defines.__module__ != "__main__":
        names.update(dict.fromkeys(shown))
    try:
        yield
    finally:
        names.update(shown)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # The terminal sends Ctrl-C to the workers too; the main process finishes its step and stops them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _identity(batch: Any) -> Any:
    return batch
