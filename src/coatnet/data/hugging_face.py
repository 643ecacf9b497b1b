"""Data sets of Hugging Face: a name on the hub, or a folder that `save_to_disk` wrote; images are decoded by us."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from coatnet.data.datasets import (
    TRUSTED_ROOTS,
    TableDataset,
    as_labels,
    empty_label_table,
    is_below,
    printable,
    read_image_file,
    trusted_roots,
)
from coatnet.data.decode import BadImage
from coatnet.data.folder import TEST_NAMES, TRAINING_NAMES, VALIDATION_NAMES, natural_key
from coatnet.data.splits import NONE_TO_HOLD_OUT, Splits, choose_validation, keep_rare_labels
from coatnet.errors import UserError, import_extra, reason_of
from coatnet.system.credentials import token_of

SCHEME = "hf://"
_IMAGE_NAMES = ("image", "img", "picture")
_LABEL_NAMES = ("label", "labels", "class", "fine_label")


class HuggingFaceDataset(TableDataset):
    """Rows of a table with an image column; no other column is read.

    Args:
        name: how messages and reports name the source.
        classes: the names of the K classes.
        table: a `datasets.Dataset` whose image column is not decoded.
        column: the name of the image column.
        rows: the rows of this split, (N,).
        labels: class indices (N,), or 0 and 1 per class (N, K).
        roots: the folders in which the files are that the table names; paths start from the first. Others are read
            only if COATNET_DATA_ROOTS allows it, as the table is untrusted input.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        table: Any,
        column: str,
        rows: NDArray[np.int64],
        labels: NDArray,
        roots: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.classes = tuple(classes)
        self.labels = as_labels(labels)
        self.multilabel = self.labels.ndim == 2
        self.rows = rows
        self._column = column
        self._table = table
        self._roots = [os.path.realpath(root) for root in roots]

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self) -> Iterator[bytes]:
        yield str(getattr(self._table, "_fingerprint", "")).encode()  # of the rows' content
        yield from super().identity()

    def read(self, index: int) -> tuple[bytes, NDArray]:
        cell = self._table[int(self.rows[index])][self._column]
        if cell is None:
            raise BadImage(self.describe(index), "empty: the row has no image")
        if cell["bytes"] is not None:
            return cell["bytes"], self.labels[index]
        path = os.path.join(*self._roots[:1], cell["path"] or "")
        if not is_below(os.path.realpath(path.replace("\0", "")), [*self._roots, *trusted_roots()]):
            raise BadImage(
                self.describe(index),
                f"unreadable: {printable(path)[:200]} is not in the data's folder; {TRUSTED_ROOTS} allows others",
            )
        return read_image_file(path, self.describe(index)), self.labels[index]

    def describe(self, index: int) -> str:
        return f"{self.name}[{self.rows[index]}]"

    def key(self, index: int) -> str:
        return f"{self.name.rpartition('/')[0]}[{self.rows[index]}]"  # without the split

    def with_rows(self, rows: NDArray[np.int64], labels: NDArray) -> Self:
        return type(self)(self.name, self.classes, self._table, self._column, rows, labels, self._roots)


def is_saved_folder(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder. Raises UserError if the folder cannot be read."""
    try:
        os.stat(folder / "state.json")  # Path.is_file reports a missing permission in some versions of Python only
    except PermissionError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}): give yourself access, or another folder"
        ) from error
    except OSError:  # usually there is no such file
        pass
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def open_hugging_face(source: str, validation_fraction: float, *, evaluation: bool = False) -> Splits:
    """Open `hf://owner/name`, `hf://owner/name:configuration`, or a saved folder.

    Args:
        validation_fraction: of the images, to hold out if the data set has no split for it.
        evaluation: nothing is trained, so one class, one image a class or a test split alone are enough.

    Raises:
        UserError: there is no such dataset, or it is unclear which columns hold images and labels.
    """
    place = source.removeprefix(SCHEME)
    name = printable(Path(place).name if Path(place).exists() else place)
    tables = _load(place, token_of(source))
    splits = _splits(source, tables, evaluation)
    features = tables[splits[0]].features
    image, label = _image_column(source, features), _label_column(source, features)
    for split in splits:
        if not {image, label} <= tables[split].features.keys():
            raise UserError(f"{source}: {split} lacks {image} or {label}, which {splits[0]} has")
    values = [_values(f"{source}, {split}", tables[split], label) for split in splits]
    class_names = getattr(_inner(features[label]), "names", None)
    every = [value for part in values for value in part] if evaluation else values[0]
    classes = _classes(source, class_names, every, evaluation)
    images, labels = [], []
    for split, found in zip(splits, values, strict=True):
        images.append(_undecoded(tables[split], image))
        labels.append(_encode(f"{source}, {split}", found, classes, named=class_names is not None))

    by_name = False
    if evaluation and len(splits) == 1 and splits[0].lower() in (*VALIDATION_NAMES, *TEST_NAMES):
        rows = [np.arange(0), np.arange(len(labels[0]))]
        note = f"its split {splits[0]}"
        splits, images, labels = splits * 2, images * 2, [labels[0][:0], labels[0]]
    elif len(splits) == 2:
        rows = [np.arange(len(part)) for part in labels]
        note = f"its splits {splits[0]} and {splits[1]}"
        if others := [each for each in tables if each not in splits]:
            note += f", without {', '.join(others)}"
    else:
        held_out = choose_validation(
            [f"{name}[{row}]" for row in range(len(labels[0]))], labels[0], validation_fraction
        )
        if labels[0].ndim == 2:
            alone = np.arange(len(held_out))
            keep_rare_labels(labels[0], alone, np.zeros_like(held_out), held_out)
        note = f"held out {held_out.mean():.0%} of {splits[0]}, class by class, by the hash of the row's number"
        if not held_out.any():
            if not evaluation:
                raise UserError(f"{source}: no image can be held out without taking a class its only one")
            held_out[:], note = True, NONE_TO_HOLD_OUT
        by_name = not held_out.all()
        rows = [np.flatnonzero(~held_out), np.flatnonzero(held_out)]
        splits, images, labels = splits * 2, images * 2, [labels[0][part] for part in rows]
    roots = _roots(place)
    training, validation = (
        HuggingFaceDataset(f"{name}/{split}", list(classes), table, image, numbers, part, roots)
        for split, table, numbers, part in zip(splits, images, rows, labels, strict=True)
    )
    return Splits(name, training, validation, (f"{note}; images are {image}, labels {label}",), by_name)


def _roots(place: str) -> list[str]:
    """The folders that hold the files of a data set: its own, or what was fetched from the hub."""
    if Path(place).exists():
        return [place]
    import datasets  # pyrefly: ignore[missing-import]  # an extra
    from huggingface_hub.constants import HF_HUB_CACHE

    return [str(datasets.config.HF_DATASETS_CACHE), HF_HUB_CACHE]


def _splits(source: str, tables: Mapping[str, Any], evaluation: bool) -> list[str]:
    """The name of the training split and, if there is one, of the split to validate on."""
    by_name = {name.lower(): name for name in tables}
    training = next((by_name[name] for name in TRAINING_NAMES if name in by_name), None)
    if training is None and len(tables) == 1:
        (training,) = tables
    held_out = next((by_name[name] for name in (*VALIDATION_NAMES, *TEST_NAMES) if name in by_name), training)
    if training is None and held_out and evaluation:
        return [held_out]
    if training is None or held_out is None:
        raise UserError(f"{source}: no split is called train; it has {', '.join(tables)}")
    return [training] if held_out == training else [training, held_out]


def _load(name: str, token: str | None = None) -> Mapping[str, Any]:
    datasets = import_extra("datasets", "datasets", f"{name}: a dataset of the Hugging Face hub")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if is_saved_folder(Path(name)):
            loaded = datasets.load_from_disk(name)
        else:
            path, _, configuration = name.partition(":") if not Path(name).exists() else (name, "", "")
            loaded = datasets.load_dataset(path, configuration or None, token=token)
    except Exception as error:  # errors of files, parsers and the network come through as they are
        raise UserError(f"{SCHEME}{name} cannot be opened ({type(error).__name__}: {reason_of(error)})") from error
    return {str(split): each for split, each in loaded.items()} if isinstance(loaded, dict) else {"train": loaded}


def _image_column(source: str, features: Mapping[str, Any]) -> str:
    found = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    return _choose(source, "images", found, _IMAGE_NAMES, features)


def _label_column(source: str, features: Mapping[str, Any]) -> str:
    found = [name for name, feature in features.items() if hasattr(_inner(feature), "names")]
    if not found:  # else plain numbers or texts in a column with a usual name
        found = [name for name in features if name in _LABEL_NAMES]
    return _choose(source, "labels", found, _LABEL_NAMES, features)


def _choose(source: str, what: str, found: list[str], preferred: Sequence[str], features: Mapping[str, Any]) -> str:
    named = [name for name in preferred if name in found]
    if len(found) == 1 or named:
        return named[0] if named else found[0]
    problem = f"{' and '.join(found)} could all be" if found else "no column holds"
    columns = ", ".join(features)
    raise UserError(f"{source}: {problem} {what}; call one of them {preferred[0]!r} (its columns: {columns})")


def _inner(feature: Any) -> Any:
    """The feature of a list's items; the feature itself if it is not a list."""
    return getattr(feature, "feature", feature)


def _undecoded(table: Any, column: str) -> Any:
    import datasets  # pyrefly: ignore[missing-import]  # an extra

    return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _values(where: str, table: Any, column: str) -> list[Any]:
    found = table.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    for row, value in enumerate(found):
        for item in value if isinstance(value, list) else [value]:
            if item is None or item != item or (isinstance(item, int) and item < 0):  # -1 if labels are not published
                raise UserError(f"{where}, row {row}: the label is {value!r:.80}; remove the row, or the split")
    return found


def _classes(source: str, names: Sequence[str] | None, values: list[Any], evaluation: bool) -> dict[str, int]:
    """The index of each class, by name; without given names, the values of the rows are the names."""
    if names is None:
        items = (item for value in values for item in (value if isinstance(value, list) else [value]))
        names = sorted({str(item) for item in items}, key=natural_key)
    if len(names) < 2 and not (evaluation and names):
        raise UserError(f"{source}: one class, {', '.join(names)!r}; a classifier needs at least two")
    return {name: number for number, name in enumerate(names)}


def _encode(where: str, values: list[Any], classes: Mapping[str, int], *, named: bool) -> NDArray:
    """Class indices (n,), or 0 and 1 per class (n, K); the values of a `named` column are indices already."""
    several = any(isinstance(value, list) for value in values)
    labels: NDArray = np.zeros(len(values), dtype=np.int64)
    if several:
        labels = empty_label_table(f"{where}:", len(values), len(classes))
    for row, value in enumerate(values):
        for item in value if several else [value]:
            number = item if named else classes.get(str(item), -1)
            if not 0 <= number < len(classes):
                raise UserError(f"{where}, row {row}: the label {item!r} is none of the {len(classes)} classes")
            if several:
                labels[row, number] = 1
            else:
                labels[row] = number
    return labels
