"""From a dataset to batches of tensors: in this process for arrays, in worker processes for files.

A batch is a pure function of its number: the same whatever the workers, and a run resumes by its step number alone.
Batch b of size B takes the positions [b * B, (b + 1) * B) of the endless sequence of epochs.
"""

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from coatnet.data.augmentation import alternate
from coatnet.data.channels import as_values, read_pixels, to_levels, with_scale
from coatnet.data.datasets import Dataset, Encoded, evenly_spaced
from coatnet.data.decode import BadImage, Scale
from coatnet.data.sampler import BalancedSampler, EpochSampler, Sampler, hash_words
from coatnet.data.test_time_augmentation import MultiViewTransform
from coatnet.data.transforms import (
    Augmentation,
    Image,
    Preprocessing,
    TrainingTransform,
    as_images,
)
from coatnet.data.worker_processes import load_in_workers, may_start_processes, workers_that_fit
from coatnet.errors import UserError
from coatnet.system.hardware import num_cores

InspectImages = Callable[[Sequence[Image] | NDArray[np.uint8]], list[Any]]  # an array holds images of one size

CLOSE_SECONDS = 5.0  # that an end waits for the batch that a thread is making
MAX_WORKERS = 8
TIMED_IMAGES = 64  # read to see how long reading takes: drawings differ in size by a factor of a hundred
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
    views: str = "one",
) -> Generator[tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, list[Any]], None, None]:
    """Yield every image once, in order: images (B, C, R, R), labels (B,) or (B, K), indices (B,). B varies.

    With V views of each image they are (B * V, C, R, R), those of an image neighbors; B is at most the larger of
    `batch_size // V` and 1.

    An image that cannot be used is left out, because another one in its place would count twice.

    Args:
        num_workers: processes that decode; None is one per core, up to 8. Arrays in memory never need any.
        bad_images: collects the images that cannot be used.
        first: number of the first batch to make.
        every: distance to the next.
        pin_memory: yield tensors in pinned memory, which a GPU copies while it computes.
        inspect: called with decoded images, where they are decoded; what it gives for each is yielded as a list of B.
        views: test-time augmentation, as in `augmented_views`.

    Raises:
        UserError: batch_size is below 1, there are no such views, `bad_images` is over its budget, or a worker process
            died or hangs.
    """
    dataset = with_scale(dataset, preprocessing.scale)
    batches = _EvaluationBatches(dataset, batch_size, MultiViewTransform(preprocessing, views), inspect)
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


def seconds_to_read(images: Dataset, transform: Callable[[Image], object] = lambda image: None) -> float:
    """Seconds to read and decode an image, and to do with it what `transform` does, found with some of them.

    They are spread evenly, but those of shards are neighbors, as a training reads them: each would fetch a whole block.
    """
    shares_blocks = hasattr(images, "block_size")
    chosen = range(min(TIMED_IMAGES, len(images))) if shares_blocks else evenly_spaced(len(images), TIMED_IMAGES)
    started = time.monotonic()
    for index in chosen:
        with suppress(BadImage):
            transform(read_image(images, index)[0])
    return (time.monotonic() - started) / len(chosen)


@dataclass
class _Batch:
    """Images (B, C, R, R), or (B * V, C, R, R) of several views, labels (B,) or (B, K), indices (B,), the reason for
    each bad image by name, and what `inspect` gave for each image, if anything."""

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
    transform: MultiViewTransform
    inspect: InspectImages | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {self.batch_size}")

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.images_read)

    @property
    def num_images(self) -> int:
        """The most images of a batch, each view counted."""
        return self.images_read * self.transform.num_views

    @property
    def images_read(self) -> int:
        """The most images that are read for a batch; `batch_size` counts the views of each."""
        return max(1, self.batch_size // self.transform.num_views)

    def first_index(self, number: int) -> int:
        """The index of the first image of that batch."""
        return number * self.images_read

    def __getitem__(self, number: int) -> _Batch:
        indices = np.arange(self.first_index(number), min(self.first_index(number + 1), len(self.dataset)))

        def transform(pixels: Tensor, part: slice, out: Tensor | None) -> Tensor:
            return self.transform.batch(pixels, out)

        num_views = self.transform.num_views
        return _make_batch(self.dataset, indices, self.transform.preprocessing, transform, 1, self.inspect, num_views)


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
    num_views: int = 1,
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

    images = _empty_images(len(indices) * num_views, preprocessing)
    labels, used, bad, inspected = [], [], {}, []
    for position, index in enumerate(indices.tolist()):
        for number in range(index, index + candidates):
            candidate = number % len(dataset)
            try:
                image, label = read_image(dataset, candidate)
            except BadImage as error:
                bad[error.name] = error.reason
                continue
            filled = len(used) * num_views
            transform(as_images(image)[None], slice(position, position + 1), images[filled : filled + num_views])
            labels.append(label)
            used.append(candidate)
            if inspect:
                inspected += inspect([image])
            break
    if not used:
        return _Batch(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64), bad)
    return _Batch(
        images[: len(used) * num_views], torch.from_numpy(np.stack(labels)), torch.tensor(used), bad, inspected
    )


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


def bytes_of_batch(num_images: int, preprocessing: Preprocessing) -> int:
    """Bytes of the float32 images of a batch."""
    return 4 * num_images * preprocessing.channels * math.prod(preprocessing.size)


def _load(
    batches: _TrainingBatches | _EvaluationBatches,
    numbers: range,
    num_workers: int | None,
    bad_images: BadImages,
    pin_memory: bool,
) -> Iterator[_Batch]:
    """Make the batches with these numbers, in order, and check the budget of bad images after each."""
    in_memory = getattr(batches.dataset, "in_memory", False)
    bytes_per_batch = bytes_of_batch(batches.num_images, batches.transform.preprocessing)
    if in_memory:
        num_workers = 0  # nothing to decode: a process boundary would cost more than the work
    elif num_workers is None:
        num_workers = max(0, int(min(MAX_WORKERS, num_cores(), len(numbers) - 1, workers_that_fit(bytes_per_batch))))
    elif isinstance(batches, _EvaluationBatches):  # an error would cost what was trained before
        num_workers = int(min(num_workers, workers_that_fit(bytes_per_batch)))
    if num_workers and not may_start_processes():
        num_workers = 0
    if num_workers:
        loaded = load_in_workers(batches, numbers, num_workers, bytes_per_batch=bytes_per_batch, pin_memory=pin_memory)
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
