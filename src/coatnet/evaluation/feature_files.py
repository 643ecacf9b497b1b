"""Features of images as a file: .npy with a .csv beside it, or Parquet; whole or not there at all."""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from coatnet.errors import UserError
from coatnet.evaluation.features import FeatureBatch, Features
from coatnet.system.files import atomic_files, translate_write_errors
from coatnet.system.progress import track

ROWS_OF_A_GROUP = 4096  # chosen: 4,096 rows of 768 features are 12 MB, to be held before they are written
_HEADER = ("path", "label")


def write_features(features: Features, out: str | Path) -> int:
    """Write one row an image, in order, a batch at a time; returns the number of rows.

    `out` ends in .npy: an array (N, D) of float32, and beside it a .csv with the columns path and label, row by row
    the same images. Or in .parquet: the columns path, label and features, a list of D float32. Several labels of a
    image are separated by `;` as in a manifest; an image without one has none.

    Raises:
        UserError: `out` has another ending, a file is in the way, pyarrow is missing, or the disk refuses.
    """
    target = Path(out)
    match target.suffix.lower():
        case ".npy":
            # The .npy takes its name last: where there is one, its .csv is there too.
            with _new_files(target.with_suffix(".csv"), target) as (table, array):
                return _write_npy(features, array, table)
        case ".parquet":
            _require_pyarrow(target)
            with _new_files(target) as (file,):
                return _write_parquet(features, file)
    raise UserError(f"{out}: features are written to a .npy (with a .csv beside it) or to a .parquet")


def label_names(features: Features, batch: FeatureBatch) -> list[str | None]:
    """The labels of a batch in words; None for images without labels."""
    classes = features.classes
    if not classes:
        return [None] * len(batch.names)
    if batch.labels.ndim == 1:
        return [classes[label] for label in batch.labels.tolist()]
    return [";".join(classes[k] for k in row.nonzero().flatten().tolist()) for row in batch.labels]


def _write_npy(features: Features, array: Path, table: Path) -> int:
    num_rows = 0
    with array.open("wb") as numbers, table.open("w", encoding="utf-8", newline="") as words:
        writer = csv.writer(words)
        writer.writerow(_HEADER)
        _write_npy_header(numbers, 0, features.num_features)
        for batch in track(features, "features", features.num_batches):
            numbers.write(batch.features.numpy().astype("<f4").tobytes())
            writer.writerows(zip(batch.names, label_names(features, batch), strict=True))
            num_rows += len(batch.names)
        # numpy keeps room in the header for a first dimension that grows, so that it does not move.
        numbers.seek(0)
        _write_npy_header(numbers, num_rows, features.num_features)
    return num_rows


def _write_npy_header(file: IO[bytes], num_rows: int, num_features: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, num_features)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_parquet(features: Features, path: Path) -> int:
    import pyarrow
    from pyarrow import parquet

    numbers = pyarrow.list_(pyarrow.float32(), features.num_features)
    columns = (*((name, pyarrow.string()) for name in _HEADER), ("features", numbers))
    schema = pyarrow.schema(columns)
    num_rows = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for batches in _grouped(track(features, "features", features.num_batches)):
            names = [name for batch in batches for name in batch.names]
            labels = [label for batch in batches for label in label_names(features, batch)]
            flat = np.concatenate([batch.features.numpy().ravel() for batch in batches])
            values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), type=numbers)
            writer.write_table(pyarrow.table([names, labels, values], schema=schema), row_group_size=len(names))
            num_rows += len(names)
    return num_rows


def _grouped(batches: Iterable[FeatureBatch]) -> Iterator[list[FeatureBatch]]:
    """As many batches together as make a row group."""
    group: list[FeatureBatch] = []
    for batch in batches:
        group.append(batch)
        if sum(len(each.names) for each in group) >= ROWS_OF_A_GROUP:
            yield group
            group = []
    if group:
        yield group


def _require_pyarrow(target: Path) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(f"{target}: Parquet needs pyarrow: pip install 'coatnet[parquet]', or give a .npy") from None


@contextmanager
def _new_files(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """`atomic_files` that replace nothing. Raises UserError if a file is in the way or the disk refuses."""
    for target in targets:
        if target.exists():
            raise UserError(f"{target} is there already; give another name, or remove it first")
    with translate_write_errors(targets[-1]), atomic_files(*targets) as staged:
        yield staged
