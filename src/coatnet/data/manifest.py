"""Manifests: tables with a row per image and the columns path, label and optionally split, as CSV, TSV or Parquet."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coatnet.data.datasets import FileDataset
from coatnet.data.folder import TEST_NAMES, TRAINING_NAMES, VALIDATION_NAMES, natural_key
from coatnet.data.splits import Splits, choose_validation
from coatnet.errors import UserError, import_extra

REQUIRED = ("path", "label")
MANIFEST_SUFFIXES = (".csv", ".tsv", ".parquet")
CHECKED_ROWS = 20  # chosen: files may be missing, but if none of the first is there, the paths start elsewhere
_SEPARATORS = re.compile(r"[;|]")


class _Row(NamedTuple):
    number: int  # as a spreadsheet shows it: the header of a CSV is row 1
    path: str
    labels: tuple[str, ...]
    split: str  # training, validation, test, or empty


def open_manifest(path: Path, validation_fraction: float) -> Splits:
    """Open the images of a manifest; paths start from its folder.

    Labels separated by ; or | in any row make it multi-label.

    Raises:
        UserError: a row is wrong; the message has its number.
    """
    root = path.resolve().parent
    cells = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    rows = [_parse(path, root, number, *values) for number, values in cells]
    if not rows:
        raise UserError(f"{path} has no rows; it needs the columns path and label and one row per image")
    if not any((root / row.path).exists() for row in rows[:CHECKED_ROWS]):
        others = f", nor that of the next {len(rows[:CHECKED_ROWS]) - 1} rows" if len(rows) > 1 else ""
        raise UserError(
            f"{path}, row {rows[0].number}: no file {rows[0].path!r} in {root}{others}; paths start from there"
        )

    multilabel = any(len(row.labels) > 1 for row in rows)
    for row in rows:
        if not row.labels and not multilabel:
            raise UserError(f"{path}, row {row.number}: no label; every image needs one")
    rows, held_out, notes = _split(path, rows, validation_fraction, multilabel)
    classes = tuple(sorted({label for row in rows for label in row.labels}, key=natural_key))
    if len(classes) < 2:
        raise UserError(f"{path}: one class, {classes[0]!r}; a classifier needs at least two")
    _check_validation_labels(path, rows, held_out)
    labels = _encode(rows, classes, multilabel)
    if multilabel and (unlabelled := sum(not row.labels for row in rows)):
        notes.append(f"{unlabelled:,} images carry no label: all their classes are counted as absent")
    datasets = [
        FileDataset(path.stem, classes, root, [rows[index].path for index in np.flatnonzero(part)], labels[part])
        for part in (~held_out, held_out)
    ]
    return Splits(path.stem, datasets[0], datasets[1], tuple(notes))


def read_manifest(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the path, from the manifest's folder, and the label of each row, whatever its split.

    Labels are as they are written, and empty where there are none.

    Raises:
        UserError: a row is wrong; the message has its number.
    """
    root = path.resolve().parent
    required = ("path",)
    cells = _read_parquet(path, required) if path.suffix.lower() == ".parquet" else _read_csv(path, required)
    for number, (image, label, _) in cells:
        text = ";".join(map(str, label)) if isinstance(label, list) else str(label)
        yield _below(root, f"{path}, row {number}", image), text


def _split(
    path: Path, rows: list[_Row], fraction: float, multilabel: bool
) -> tuple[list[_Row], NDArray[np.bool_], list[str]]:
    """The rows to use, a mask of those that are held out, and notes on both."""
    if not any(row.split for row in rows):
        first_labels = np.zeros(len(rows), int)
        if not multilabel:
            first_labels = np.unique([row.labels[0] for row in rows], return_inverse=True)[1]
        held_out = choose_validation([row.path for row in rows], first_labels, fraction)
        _keep_rare_labels(rows, held_out)
        if not held_out.any():
            raise UserError(f"{path}: no class has two images, so none can be held out; add a split column or rows")
        return (
            rows,
            held_out,
            [f"held out {held_out.mean():.0%} by the hash of the path; new rows move no old ones"],
        )

    named = {row.split for row in rows}
    for row in rows:
        if not row.split:
            raise UserError(f"{path}, row {row.number}: no split, though other rows have one; say train or val")
    if "training" not in named or len(named) == 1:
        raise UserError(f"{path}: its split column names only {', '.join(sorted(named))}; it needs train and val")
    held_out_name = "validation" if "validation" in named else "test"
    used = [row for row in rows if row.split in ("training", held_out_name)]
    notes = [f"split by its column split: training and {held_out_name}"]
    if len(used) < len(rows):
        notes.append(f"{len(rows) - len(used):,} rows of the test split left out")
    return used, np.array([row.split == held_out_name for row in used]), notes


def _keep_rare_labels(rows: list[_Row], held_out: NDArray[np.bool_]) -> None:
    """Move held-out rows with a label that no training row has to training; the hash of a name ignores labels."""
    known = {label for row, out in zip(rows, held_out, strict=True) if not out for label in row.labels}
    for index in np.flatnonzero(held_out):
        if not known.issuperset(rows[index].labels):
            held_out[index] = False
            known.update(rows[index].labels)


def _check_validation_labels(path: Path, rows: list[_Row], held_out: NDArray[np.bool_]) -> None:
    known = {label for row, out in zip(rows, held_out, strict=True) if not out for label in row.labels}
    for row, out in zip(rows, held_out, strict=True):
        if out and (unknown := set(row.labels) - known):
            raise UserError(f"{path}, row {row.number}: the label {min(unknown)!r} is in no training row")


def _encode(rows: list[_Row], classes: tuple[str, ...], multilabel: bool) -> NDArray:
    number = {name: index for index, name in enumerate(classes)}
    if not multilabel:
        return np.array([number[row.labels[0]] for row in rows])
    labels = np.zeros((len(rows), len(classes)), dtype=np.uint8)
    for index, row in enumerate(rows):
        labels[index, [number[label] for label in row.labels]] = 1
    return labels


def _parse(path: Path, root: Path, number: int, image: str, label: object, split: str) -> _Row:
    where = f"{path}, row {number}"
    relative = _below(root, where, image)
    parts = [str(part) for part in label] if isinstance(label, list) else _SEPARATORS.split(str(label))
    labels = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if any(name.lower() in ("nan", "null", "none") for name in labels):
        raise UserError(f"{where}: the label is {label!r}, a missing value; write a class name or remove the row")
    return _Row(number, relative, labels, _parse_split(where, split))


def _below(root: Path, where: str, image: str) -> str:
    """The path from `root` on."""
    if not image:
        raise UserError(f"{where}: the path is empty")
    whole = os.path.normpath(os.path.join(root, image))
    if os.path.commonpath([root, whole]) != str(root) or whole == str(root):
        raise UserError(f"{where}: the path {image!r} leads out of {root}; keep the images below the manifest")
    return os.path.relpath(whole, root)


def _parse_split(where: str, split: str) -> str:
    known = {"training": TRAINING_NAMES, "validation": VALIDATION_NAMES, "test": TEST_NAMES}
    name = split.strip().lower()
    for meaning, spellings in known.items():
        if name in spellings:
            return meaning
    if name:
        raise UserError(f"{where}: the split is {split!r}; it must be train, val or test")
    return ""


def _read_csv(path: Path, required: Sequence[str] = REQUIRED) -> Iterator[tuple[int, tuple[str, str, str]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            columns = _columns(path, header, required)
            for number, cells in enumerate(reader, start=2):
                if not any(cells):
                    continue
                if len(cells) != len(header):
                    raise UserError(f"{path}, row {number}: {len(cells)} cells where the header has {len(header)}")
                values = [cells[column].strip() if column is not None else "" for column in columns]
                yield number, (values[0], values[1], values[2])
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as CSV UTF-8"
        ) from error
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num if reader else 1}: {error}; is a quotation mark left open or too many?"
        ) from error


def _read_parquet(path: Path, required: Sequence[str] = REQUIRED) -> Iterator[tuple[int, tuple[str, object, str]]]:
    parquet = import_extra("pyarrow.parquet", "parquet", f"{path}: Parquet")
    import pyarrow

    try:
        file = parquet.ParquetFile(path)
        header = [name.lower() for name in file.schema_arrow.names]
        columns = _columns(path, header, required)
        names = [None if column is None else file.schema_arrow.names[column] for column in columns]
        table = file.read(columns=[name for name in names if name]).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({' '.join(str(error).split())[:120]})") from error
    values = [table[name] if name else [""] * file.metadata.num_rows for name in names]
    for number, (image, label, split) in enumerate(zip(*values, strict=True), start=1):
        yield number, (str(image or ""), "" if label is None else label, str(split or ""))


def _columns(path: Path, header: list[str], required: Sequence[str]) -> list[int | None]:
    for name in required:
        if name not in header:
            raise UserError(f"{path} has no column {name!r}; it has {', '.join(header) or 'nothing'}")
    return [header.index(name) if name in header else None for name in ("path", "label", "split")]
