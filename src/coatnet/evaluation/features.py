"""What a finished model makes of images in front of its classifier. Shapes: B batch, N images, D features."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.splits import Splits
from coatnet.data.unreadable import BadImages
from coatnet.errors import UserError
from coatnet.evaluation.evaluate import choose_datasets
from coatnet.inference.logits import infer, workers_for
from coatnet.system.progress import track


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Features (B, D) float32, labels (B,) or (B, K) of the dataset's own classes, and where each image lies."""

    features: Tensor
    labels: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Features:
    """The images of some datasets, in their order; iterating computes a batch at a time and holds no more.

    `bad_images` tells why each image left out was no use, once all batches have been seen.
    """

    bundle: Bundle
    name: str
    split: str
    datasets: Sequence[Dataset]
    batch_size: int
    num_workers: int | None
    bad_images: dict[str, str] = field(default_factory=dict, init=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """What the labels mean; empty for images without labels, whose labels are all -1."""
        return self.datasets[0].classes

    @property
    def num_features(self) -> int:
        return self.bundle.model.num_features

    @property
    def num_batches(self) -> int:
        return sum(-(-len(dataset) // self.batch_size) for dataset in self.datasets)

    def __len__(self) -> int:
        """Images, those that may turn out bad among them."""
        return sum(map(len, self.datasets))

    def __iter__(self) -> Iterator[FeatureBatch]:
        """Raises UserError if the split is empty, not an image of it can be read, or a feature is not finite."""
        if not len(self):
            raise UserError(f"{self.name}: the {self.split} split holds no images")
        bad_images = BadImages(len(self), budget=1.0)
        found_any = False
        try:
            for dataset in self.datasets:
                batches = infer(
                    self.bundle.model,
                    dataset,
                    preprocessing=self.bundle.preprocessing,
                    batch_size=self.batch_size,
                    num_workers=workers_for(dataset, self.num_workers),
                    bad_images=bad_images,
                    output="features",
                )
                with closing(batches):
                    for features, labels, indices in batches:
                        found_any = True
                        _require_finite(features)
                        yield FeatureBatch(features, labels, tuple(map(dataset.describe, indices.tolist())))
        finally:
            self.bad_images.update(bad_images.records)
        if not found_any:
            raise UserError(f"{self.name}: none of the {len(self):,} images of the {self.split} split could be read")

    def gather(self) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """All of them at once: features (N, D), labels (N,) or (N, K), names."""
        table = torch.empty(len(self), self.num_features)
        labels, names = [], []
        for batch in track(self, f"features of {self.split}", self.num_batches):
            table[len(names) : len(names) + len(batch.names)] = batch.features
            labels.append(batch.labels)
            names += batch.names
        return table[: len(names)], torch.cat(labels), tuple(names)


def extract(
    bundle: Bundle,
    data: str | Path | Dataset | Splits,
    *,
    split: Literal["validation", "training", "all"] = "all",
    batch_size: int = 64,
    num_workers: int | None = None,
) -> Features:
    """The features of a dataset or a split of it, to be iterated or gathered; its classes need not be the model's.

    Data is split as it was for the training of the bundle. Without `num_workers`, up to 2,000 images are read in
    this process, and more of them by a worker process a core.

    Raises:
        UserError: there is no such data or split, or batch_size is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    name, datasets, split_name = choose_datasets(data, split, bundle)
    return Features(bundle, name, split_name, datasets, batch_size, num_workers)


def _require_finite(features: Tensor) -> None:
    if not torch.isfinite(features).all():
        raise UserError("the model's features are not finite (NaN or infinity): its weights are broken")
