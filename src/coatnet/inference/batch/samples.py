"""What is to be classified: images by number, with a label where the data has one."""

import hashlib
import threading
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coatnet.data.builtin import is_idx_folder
from coatnet.data.datasets import Dataset, Encoded, FileDataset
from coatnet.data.decode import BadImage
from coatnet.data.folder import open_images
from coatnet.data.hugging_face import is_saved_folder
from coatnet.data.manifest import MANIFEST_SUFFIXES, read_manifest
from coatnet.data.open import NAMES, open_dataset
from coatnet.data.shards.open import is_shard_folder
from coatnet.errors import UserError


class Taken(NamedTuple):
    """An image with its name and label (None if it has none), or the reason why it can not be read."""

    name: str
    label: str | None
    image: Encoded | None
    error: str | None = None


class Images:
    """The images of some datasets, one after the other, in the order in which they are stored."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = tuple(datasets)
        self._ends = np.cumsum([len(dataset) for dataset in datasets])
        thread_safe = all(dataset.thread_safe for dataset in datasets)
        self._turn: AbstractContextManager = nullcontext() if thread_safe else threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, index: int) -> Taken:
        """From any thread. Raises UserError if a shard is gone, or can not be fetched."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        dataset, index = self._datasets[number], index - (int(self._ends[number - 1]) if number else 0)
        with self._turn:
            name = dataset.describe(index)
            try:
                image, label = dataset.read(index)
            except BadImage as error:
                return Taken(name, label_name(dataset, dataset.label(index)), None, error.reason)
        return Taken(name, label_name(dataset, label), image)

    def identity(self) -> str:
        """SHA-256 of the names in their order; of shards, of what their index says."""
        digest = hashlib.sha256()
        for dataset in self._datasets:
            digest.update(f"{dataset.name} {len(dataset)}\n".encode())
            for part in dataset.identity():
                digest.update(part)
        return digest.hexdigest()[:32]


def open_data(sources: Sequence[str]) -> Images:
    """All images of a manifest, of shards or of another dataset, or of files and folders that are searched.

    A manifest needs no labels here, and a folder no classes: where it lies tells what an image is.

    Raises:
        UserError: there is no such data, it holds no image, or a dataset is not given alone.
    """
    whole = [source for source in sources if _is_dataset(source)]
    if whole and len(sources) > 1:
        raise UserError(f"{whole[0]} is a dataset of its own: give it alone, or files and folders of images")
    if not whole:
        return Images([open_images(sources)])
    path = Path(sources[0]).expanduser()
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return Images([_open_manifest(path)])
    splits = open_dataset(sources[0])
    return Images([splits.training, splits.validation])


def label_name(dataset: Dataset, label: np.ndarray) -> str | None:
    """In words; several of an image are separated by `;` as in a manifest."""
    if dataset.multilabel:
        return ";".join(dataset.classes[index] for index in np.flatnonzero(label))
    return dataset.classes[int(label)] if label >= 0 else None


def _is_dataset(source: str) -> bool:
    path = Path(source).expanduser()
    if path.is_dir():
        path = path.resolve()
        return is_idx_folder(path) or is_saved_folder(path) or is_shard_folder(path)
    return "://" in source or path.suffix.lower() in MANIFEST_SUFFIXES or (source in NAMES and not path.exists())


def _open_manifest(path: Path) -> FileDataset:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    paths, labels, numbers = [], array("q"), {"": -1}
    for image, label in read_manifest(path):
        paths.append(image)
        labels.append(numbers.setdefault(label, len(numbers) - 1))
    if not paths:
        raise UserError(f"{path} has no rows; it needs the column path and one row an image")
    return FileDataset(path.stem, tuple(numbers)[1:], path.parent, paths, np.array(labels))
