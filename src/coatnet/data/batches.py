"""Whole batches by number, each a pure function of that number: what a worker process computes."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from coatnet.data.datasets import ArrayDataset, Dataset
from coatnet.data.decode import BadImage, decode
from coatnet.data.sampler import BalancedSampler, EpochSampler, hash_words
from coatnet.data.transforms import EvaluationTransform, Image, Preprocessing, TrainingTransform, as_images
from coatnet.errors import UserError

_REPLACEMENTS = 64  # tried for one bad image; after as many in a row the batch stays short


@dataclass
class Batch:
    """Images (B, C, R, R), labels (B,) or (B, K), indices (B,), and why each image left out was no use."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: dict[str, str] = field(default_factory=dict)


class TrainingBatches:
    """Batch b of the endless run; a bad image is replaced by the next good one of the dataset.

    `places` are those of its images, 0 to `batch_size` - 1, that are made here, in their order; all if None.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: TrainingTransform,
        order: EpochSampler | BalancedSampler,
        batch_size: int,
        seed: int,
        places: NDArray[np.int64] | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        self.dataset = dataset
        self.transform = transform
        self.order = order
        self.batch_size = batch_size
        self.seed = seed
        self.places = np.arange(batch_size) if places is None else places

    @property
    def num_bytes(self) -> int:
        """Of the images of a batch."""
        return len(self.places) * bytes_of(self.transform.preprocessing)

    def first_index(self, number: int) -> int:
        """Of the first image of that batch."""
        indices, _ = self.order.sample(number * self.batch_size + self.places[:1])
        return int(indices[0])

    def __getitem__(self, number: int) -> Batch:
        indices, epochs = self.order.sample(number * self.batch_size + self.places)
        seeds = hash_words(self.seed, epochs, indices)
        if isinstance(self.dataset, ArrayDataset):
            images = self.transform.batch(as_images(self.dataset.images[indices]), seeds)
            return _batch(images, self.dataset.labels[indices], indices)

        images = empty_images(len(indices), self.transform.preprocessing)
        labels, used, bad = [], [], {}
        for place, index in enumerate(indices.tolist()):
            for candidate in range(index, index + _REPLACEMENTS):
                try:
                    image, label = read_image(self.dataset, candidate % len(self.dataset))
                except BadImage as error:
                    bad[error.name] = error.reason
                    continue
                at = len(used)
                self.transform.batch(as_images(image)[None], seeds[place : place + 1], images[at : at + 1])
                labels.append(label)
                used.append(candidate % len(self.dataset))
                break
        return _filled(images, labels, used, bad)


class EvaluationBatches:
    """Batch b of the dataset in its own order; a bad image is missing from its batch."""

    def __init__(self, dataset: Dataset, transform: EvaluationTransform, batch_size: int) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        self.dataset = dataset
        self.transform = transform
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    @property
    def num_bytes(self) -> int:
        """Of the images of a batch."""
        return self.batch_size * bytes_of(self.transform.preprocessing)

    def first_index(self, number: int) -> int:
        """Of the first image of that batch."""
        return number * self.batch_size

    def __getitem__(self, number: int) -> Batch:
        indices = np.arange(number * self.batch_size, min((number + 1) * self.batch_size, len(self.dataset)))
        if isinstance(self.dataset, ArrayDataset):
            images = self.transform.batch(as_images(self.dataset.images[indices]))
            return _batch(images, self.dataset.labels[indices], indices)
        images = empty_images(len(indices), self.transform.preprocessing)
        labels, used, bad = [], [], {}
        for index in indices.tolist():
            try:
                image, label = read_image(self.dataset, index)
            except BadImage as error:
                bad[error.name] = error.reason
                continue
            self.transform.batch(as_images(image)[None], images[len(used) : len(used) + 1])
            labels.append(label)
            used.append(index)
        return _filled(images, labels, used, bad)


def bytes_of(preprocessing: Preprocessing) -> int:
    """What one image takes."""
    return 4 * preprocessing.channels * preprocessing.resolution**2


def read_image(dataset: Dataset, index: int) -> tuple[Image, NDArray]:
    """Pixels and label; raises `BadImage` if the image cannot be read or decoded."""
    try:
        encoded, label = dataset.read(index)
        if isinstance(encoded, bytes):
            return decode(encoded, dataset.describe(index)), label
        return encoded, label
    except BadImage:
        raise
    except Exception as error:
        error.add_note(f"while reading image {index} of {dataset.name}")
        raise


def empty_images(count: int, preprocessing: Preprocessing) -> Tensor:
    """float32 (B, C, R, R), channels last, to be filled; in a worker in shared memory, so that it is not copied there
    on its way out."""
    shape = (count, preprocessing.resolution, preprocessing.resolution, preprocessing.channels)
    if get_worker_info() is None:
        return torch.empty(shape).movedim(-1, 1)
    size = math.prod(shape)
    shared = torch.UntypedStorage._new_shared(4 * size)  # as torch's own collation does
    return torch.empty(0).set_(shared, 0, (size,), (1,)).view(shape).movedim(-1, 1)


def _filled(images: Tensor, labels: list[NDArray], indices: list[int], bad: dict[str, str]) -> Batch:
    if not indices:
        return _batch(torch.empty(0), np.empty(0), np.empty(0, np.int64), bad)
    return _batch(images[: len(indices)], np.stack(labels), np.array(indices), bad)


def _batch(images: Tensor, labels: NDArray, indices: NDArray[np.int64], bad: dict[str, str] | None = None) -> Batch:
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(indices), bad or {})
