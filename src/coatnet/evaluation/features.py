"""Features of images: what a model gives to its classifier, batch by batch or as a file.

Shapes: B batch, N images, K classes, D features.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.loader import BadImages
from coatnet.data.splits import Splits
from coatnet.errors import UserError, import_extra
from coatnet.evaluation.evaluate import choose_datasets, load_model
from coatnet.inference.logits import infer, workers_for
from coatnet.system.files import atomic_files, output_path, require_absent, translate_write_errors
from coatnet.system.progress import track

MIN_ROW_GROUP_IMAGES = 4096  # chosen: 4,096 rows of 768 features are 12 MB, held in memory before they are written
_COLUMNS = ("path", "label")


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Features of a batch.

    Attributes:
        features: float32 on the CPU, (B, D).
        labels: class indices (B,), or 0 and 1 per class (B, K), of the dataset's own classes; -1 without labels.
        names: path or name of each image, B.
    """

    features: Tensor
    labels: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Features:
    """Features of the images of some datasets, in their order. Iterating computes one `FeatureBatch` at a time.

    Attributes:
        bundle: the model.
        name: of the data.
        split: validation, training or all.
        datasets: whose images are read.
        batch_size: images per batch.
        num_workers: processes that decode, as in `extract_features`.
        bad_images: why each unreadable image was left out, by its name; complete after the last batch.
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
        """Names of the classes; empty for images without labels."""
        return self.datasets[0].classes

    @property
    def num_features(self) -> int:
        """D."""
        return self.bundle.model.num_features

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return sum(-(-len(dataset) // self.batch_size) for dataset in self.datasets)

    def __len__(self) -> int:
        """Number of images, including those that may turn out to be unreadable."""
        return sum(map(len, self.datasets))

    def __iter__(self) -> Iterator[FeatureBatch]:
        """Compute the features, batch by batch.

        Raises:
            UserError: the split is empty, none of its images can be read, or a feature is NaN or infinite.
        """
        if not len(self):
            raise UserError(f"{self.name}: the {self.split} split holds no images")
        bad_images = BadImages(len(self), budget=1.0)
        found_any = False
        try:
            for dataset in filter(len, self.datasets):
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
                    for features, labels, indices, *_ in batches:
                        found_any = True
                        _require_finite(features)
                        yield FeatureBatch(features, labels, tuple(map(dataset.describe, indices.tolist())))
        finally:
            self.bad_images.update(bad_images.records)
        if not found_any:
            raise UserError(
                f"{self.name}: none of the {len(self):,} images of the {self.split} split could be read, the last one "
                f"{bad_images.last}"
            )

    def gather(self) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Compute all features.

        Returns:
            features (N, D), labels (N,) or (N, K), and the names of the N images that could be read.

        Raises:
            UserError: as when iterating.
        """
        table = torch.empty(len(self), self.num_features)
        labels, names = [], []
        for batch in track(self, f"features of {self.split}", self.num_batches):
            table[len(names) : len(names) + len(batch.names)] = batch.features
            labels.append(batch.labels)
            names += batch.names
        return table[: len(names)], torch.cat(labels), tuple(names)


def extract_features(
    bundle: Bundle | str | Path,
    data: str | Path | Dataset | Splits,
    *,
    split: Literal["validation", "training", "test", "all"] = "all",
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str | None = None,
) -> Features:
    """Extract features: the input of the classifier, (D,) per image.

    Nothing is computed before the result is iterated, gathered, or written with `write_features`.

    Args:
        bundle: the model: a bundle, its folder, or its id on the hub.
        data: a dataset, splits, or what `open_dataset` opens; its classes need not be the model's. Without a split of
            its own it is split as it was for the training of the bundle.
        split: which part of data that has splits; "all" is training and validation.
        batch_size: images per batch.
        num_workers: processes that decode. By default, up to 2,000 images are decoded in this process, and more of
            them by one process per core, up to 8.
        device: as in `evaluate`.

    Raises:
        UserError: there is no such model, data, split or device, or batch_size is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    bundle = load_model(bundle, device)
    name, datasets, split_name = choose_datasets(data, split, bundle)
    return Features(bundle, name, split_name, datasets, batch_size, num_workers)


def _require_finite(features: Tensor) -> None:
    if not torch.isfinite(features).all():
        raise UserError("the model's features are not finite (NaN or infinity): its weights are broken")


def write_features(features: Features, out: str | Path) -> int:
    """Compute features and write them to a file, one row per image, in order. Memory holds one batch of them.

    Several labels of an image are separated by `;` as in a manifest; an image without a label has an empty one.

    Args:
        features: from `extract_features`.
        out: a new file. `.npy`: an array (N, D) of float32, and beside it a .csv with the columns path and label,
            whose rows are the same images: a manifest, in the folder of the data. `.parquet`: the columns path, label
            and features, a list of D float32.

    Returns:
        The number of rows.

    Raises:
        UserError: `out` has another suffix, a file is there already, pyarrow is missing, the disk refuses, or as when
            iterating over the features.
    """
    target = output_path(out)
    match target.suffix.lower():
        case ".npy":
            # The .npy is renamed last: where there is one, its .csv is there too.
            with _new_files(target.with_suffix(".csv"), target) as (table, array):
                return _write_npy(features, array, table)
        case ".parquet":
            import_extra("pyarrow", "parquet", f"{target}: Parquet")
            with _new_files(target) as (file,):
                return _write_parquet(features, file)
    raise UserError(f"{out}: features are written to a .npy (with a .csv beside it) or to a .parquet")


def _label_names(features: Features, batch: FeatureBatch) -> list[str | None]:
    """Class names of the labels of a batch, joined by `;`; None for images without labels."""
    classes = features.classes
    if not classes:
        return [None] * len(batch.names)
    if batch.labels.ndim == 1:
        return [classes[label] for label in batch.labels.tolist()]
    return [";".join(classes[k] for k in row.nonzero().flatten().tolist()) for row in batch.labels]


def _write_npy(features: Features, array: Path, table: Path) -> int:
    num_rows = 0
    with array.open("wb") as array_file, table.open("w", encoding="utf-8", newline="") as table_file:
        writer = csv.writer(table_file)
        writer.writerow(_COLUMNS)
        _write_npy_header(array_file, 0, features.num_features)
        for batch in track(features, "features", features.num_batches):
            array_file.write(batch.features.numpy().astype("<f4").tobytes())
            writer.writerows(zip(batch.names, _label_names(features, batch), strict=True))
            num_rows += len(batch.names)
        # numpy reserves room in the header for a larger first dimension, so its length does not change.
        array_file.seek(0)
        _write_npy_header(array_file, num_rows, features.num_features)
    return num_rows


def _write_npy_header(file: IO[bytes], num_rows: int, num_features: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, num_features)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_parquet(features: Features, path: Path) -> int:
    import pyarrow
    from pyarrow import parquet

    numbers = pyarrow.list_(pyarrow.float32(), features.num_features)
    columns = (*((name, pyarrow.string()) for name in _COLUMNS), ("features", numbers))
    schema = pyarrow.schema(columns)
    num_rows = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for batches in _grouped(track(features, "features", features.num_batches)):
            names = [name for batch in batches for name in batch.names]
            labels = [label for batch in batches for label in _label_names(features, batch)]
            flat = np.concatenate([batch.features.numpy().ravel() for batch in batches])
            values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), type=numbers)
            writer.write_table(pyarrow.table([names, labels, values], schema=schema), row_group_size=len(names))
            num_rows += len(names)
    return num_rows


def _grouped(batches: Iterable[FeatureBatch]) -> Iterator[list[FeatureBatch]]:
    """Yield lists of batches, of a row group each."""
    group: list[FeatureBatch] = []
    for batch in batches:
        group.append(batch)
        if sum(len(each.names) for each in group) >= MIN_ROW_GROUP_IMAGES:
            yield group
            group = []
    if group:
        yield group


@contextmanager
def _new_files(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """`atomic_files` that replace nothing. Raises UserError if a file is in the way or the disk refuses."""
    for target in targets:
        require_absent(target)
    with translate_write_errors(targets[-1]), atomic_files(*targets) as staged:
        yield staged
