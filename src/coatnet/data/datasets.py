"""What every source of images offers, and the two simplest sources: arrays in memory and files in a folder."""

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from coatnet.data.decode import BadImage, Scale
from coatnet.data.sampler import EpochSampler
from coatnet.errors import UserError, one_line
from coatnet.system.files import is_url, read_regular

Encoded = bytes | NDArray[np.uint8]
IS_URL = "a URL, which is not opened: fetch the file first; shards behind a URL are data for train, and predict --out"
TRUSTED_ROOTS = "COATNET_DATA_ROOTS"  # environment variable: folders that data may lead to from elsewhere
MAX_LABEL_BYTES = 1 << 30  # chosen: of a table of 0 and 1, such as a million images of a thousand classes
MAX_IMAGE_BYTES = 1 << 30  # chosen: 150 megapixels of three 16-bit values, not compressed


class Dataset(Protocol):
    """Images by number, with labels: what a source of images must offer.

    A class of your own has the four attributes and `__len__`, `read` and `describe`. If it inherits from this class it
    gets the other members too, and may override them where it has a better way; they are optional for the functions
    of `coatnet.data.loader`.

    Attributes:
        name: how messages and reports name the source.
        classes: the names of the K classes; label k stands for `classes[k]`.
        multilabel: whether an image may have several labels, or none.
        labels: class indices (N,) int64; if multi-label, 0 and 1 per class (N, K) uint8.
        in_memory: whether `read_batch` gives many images at once. No worker processes are started then.
        thread_safe: whether several threads may read at the same time.
        scale: how the values of images become levels, where they are not 8-bit RGB.
    """

    name: str
    classes: tuple[str, ...]
    multilabel: bool
    labels: NDArray
    in_memory: bool = False
    thread_safe: bool = False
    scale: Scale | None = None

    @abstractmethod
    def __len__(self) -> int:
        """The number of images, N."""
        ...

    @abstractmethod
    def read(self, index: int) -> tuple[Encoded, NDArray]:
        """An image, as the bytes of its file or as pixels uint8 (H, W) or (H, W, 3), and its label, () or (K,).

        With a scale, pixels are values (H, W, C) of any type.

        Raises:
            BadImage: the image cannot be read.
        """
        ...

    @abstractmethod
    def describe(self, index: int) -> str:
        """The name of an image in messages and reports, such as its path below the folder of the data."""
        ...

    def key(self, index: int) -> str:
        """The name by whose hash an image is held out or not."""
        return self.describe(index)

    def read_batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray]:
        """The pixels (B, H, W) or (B, H, W, 3) and labels (B,) or (B, K) of several images, if `in_memory`."""
        raise NotImplementedError(f"{self.name} is not in memory")

    def label(self, index: int) -> NDArray:
        """The label of an image, () or (K,), without reading the image."""
        return self.labels[index]

    def label_name(self, index: int) -> str:
        """The class of an image, or several joined by `;`; empty without any."""
        label = self.label(index)
        numbers = np.flatnonzero(label) if self.multilabel else [label] if label >= 0 else []
        return ";".join(self.classes[int(number)] for number in numbers)

    @property
    def class_counts(self) -> NDArray[np.int64]:
        """The number of images of each class, (K,)."""
        return count_labels(self.labels, len(self.classes))

    def sampler(self, seed: int) -> EpochSampler:
        """The order in which training reads the images: every image once per epoch."""
        return EpochSampler(len(self), seed)

    def content(self) -> Iterator[bytes]:
        """Bytes to hash that are equal for the same images at another place: their names within the data, labels."""
        of_rows = f"{self.name}["  # a file may lie in a folder of the data's name, which belongs to its own
        for index in range(len(self)):
            name = self.describe(index)
            yield f"{name.removeprefix(self.name) if name.startswith(of_rows) else name}\n".encode()
        yield np.ascontiguousarray(self.labels).tobytes()

    def identity(self) -> Iterator[bytes]:
        """Bytes to hash that distinguish these images from others: their names in order."""
        for index in range(len(self)):
            yield f"{self.describe(index)}\n".encode()

    def state(self) -> Iterator[bytes]:
        """Bytes to hash that are others once the pixels of an image may be others, under its name or not."""
        return self.content()


class ArrayDataset(Dataset):
    """Images of one size, held in memory.

    Args:
        name: how messages and reports name the source.
        classes: the names of the K classes.
        images: uint8 (N, H, W) or (N, H, W, 3).
        labels: class indices (N,), or 0 and 1 per class (N, K).
        numbers: the images' numbers in the set they come from (N,), if this is a part of it.
    """

    in_memory = True
    thread_safe = True

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        images: NDArray[np.uint8],
        labels: NDArray,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        self.name = name
        self.classes = tuple(classes)
        self.images = images
        self.labels = as_labels(labels)
        self.multilabel = self.labels.ndim == 2
        self.numbers = np.arange(len(images)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray]:
        return self.images[index], self.labels[index]

    def read_batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray]:
        return self.images[indices], self.labels[indices]

    def describe(self, index: int) -> str:
        return f"{self.name}[{self.numbers[index]}]"


class FileDataset(Dataset):
    """Image files below one folder, each named by its path from there on.

    The names are kept in one buffer, which is cheap to send to worker processes.

    Args:
        name: how messages and reports name the source.
        classes: the names of the K classes.
        root: the folder.
        paths: relative to `root`; names that are not UTF-8 hold surrogates, as from `os`.
        labels: class indices (N,), or 0 and 1 per class (N, K).
        source: the folder of the whole data set, if `root` is a part of it; names begin there.
    """

    thread_safe = True

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        root: Path,
        paths: Iterable[str],
        labels: NDArray,
        source: Path | None = None,
    ) -> None:
        self.name = name
        self.classes = tuple(classes)
        self.root = root
        self.source = source or root
        self._prefix = f"{root.relative_to(source)}/" if source and source != root else ""
        self.labels = as_labels(labels)
        self.multilabel = self.labels.ndim == 2
        encoded = [os.fsencode(path) for path in paths]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / self._name(index)

    def key(self, index: int) -> str:
        return self._name(index)

    def _name(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._names[start : self._ends[index]])

    def read(self, index: int) -> tuple[bytes, NDArray]:
        return read_image_file(self.path(index), self.describe(index)), self.labels[index]

    def describe(self, index: int) -> str:
        return printable(self._prefix + self._name(index))

    def identity(self) -> Iterator[bytes]:
        for index in range(len(self)):
            yield f"{printable(str(self.path(index)))}\n".encode()

    def state(self) -> Iterator[bytes]:
        for index in range(len(self)):
            try:
                found = os.stat(self.path(index))
                yield f"{found.st_size} {found.st_mtime_ns}\n".encode()
            except (OSError, ValueError):
                yield b"missing\n"


class TableDataset(Dataset):
    """Some rows (N,) of a table of images."""

    rows: NDArray[np.int64]

    @abstractmethod
    def with_rows(self, rows: NDArray[np.int64], labels: NDArray) -> Self:
        """Other rows of the same table, and their labels."""
        ...


class JoinedDataset(Dataset):
    """The images of several datasets, one after the other, with classes that are theirs by name.

    Args:
        name: how messages and reports name the images.
        classes: the names of the K classes, with all those of the datasets.
        datasets: of one label per image.
    """

    def __init__(self, name: str, classes: Sequence[str], datasets: Sequence[Dataset]) -> None:
        self.name, self.classes, self.multilabel = name, tuple(classes), False
        self.datasets = tuple(datasets)
        self.thread_safe = all(each.thread_safe for each in datasets)
        self._ends = np.cumsum([len(each) for each in datasets])
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.concatenate(
            [np.array([numbers[name] for name in each.classes])[each.labels] for each in datasets]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def place(self, index: int) -> tuple[Dataset, int]:
        """The dataset of an image and its index there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[number], index - (int(self._ends[number - 1]) if number else 0)

    def read(self, index: int) -> tuple[Encoded, NDArray]:
        dataset, place = self.place(index)
        return dataset.read(place)[0], self.labels[index]

    def describe(self, index: int) -> str:
        dataset, place = self.place(index)
        return dataset.describe(place)

    def key(self, index: int) -> str:
        dataset, place = self.place(index)
        return dataset.key(place)


def select(datasets: Sequence[Dataset], chosen: NDArray[np.bool_]) -> Dataset:
    """The chosen images of datasets of one source and class, one after the other, read as before."""
    selected = _select(datasets, chosen)
    if (scale := getattr(datasets[0], "scale", None)) is not None:
        selected.scale = scale
    return selected


def _select(datasets: Sequence[Dataset], chosen: NDArray[np.bool_]) -> Dataset:
    first, labels = datasets[0], np.concatenate([each.labels for each in datasets])[chosen]
    if isinstance(first, TableDataset):
        return first.with_rows(
            np.concatenate([each.rows for each in datasets if isinstance(each, TableDataset)])[chosen], labels
        )
    if isinstance(first, FileDataset):
        keys = [each.key(index) for each in datasets for index in range(len(each))]
        paths = [keys[row] for row in np.flatnonzero(chosen)]
        return FileDataset(first.name, first.classes, first.root, paths, labels, first.source)
    arrays = [each for each in datasets if isinstance(each, ArrayDataset)]
    images, numbers = (np.concatenate([getattr(each, name) for each in arrays]) for name in ("images", "numbers"))
    return ArrayDataset(first.name, first.classes, images[chosen], labels, numbers[chosen])


def below_one_folder(paths: Sequence[str], folders: Sequence[str] = ()) -> tuple[Path, list[str]]:
    """The folder above all paths, or above `folders`, and the paths from there on; relative paths stay as they are.

    What is written about images names no folder above that of the data, which is the user's.
    """
    if not any(map(os.path.isabs, paths)):
        return Path(), list(paths)
    whole = list(map(os.path.abspath, paths))
    # What the first and the last have in common all have that are in order between them.
    root = os.path.commonpath([*map(os.path.abspath, folders)] or [os.path.dirname(each(whole)) for each in (min, max)])
    return Path(root), [path.removeprefix(root.rstrip(os.sep) + os.sep) for path in whole]


def read_image_file(path: str | Path, name: str) -> bytes:
    """The bytes of an image file. Raises BadImage, which names the image `name`, for what is no regular file too."""
    try:
        return read_regular(path, MAX_IMAGE_BYTES)
    except OSError as error:
        reason = IS_URL if is_url(path) else error.strerror or error
        raise BadImage(name, f"unreadable: {reason}") from error


def links_outside(dataset: Dataset) -> list[tuple[str, str]]:
    """Images whose files are links that leave the data's folder and COATNET_DATA_ROOTS: name, and what is linked to."""
    if not isinstance(dataset, FileDataset):
        return []
    roots = [os.path.realpath(dataset.source), *trusted_roots()]
    targets = ((index, os.path.realpath(dataset.path(index))) for index in range(len(dataset)))
    return [(dataset.describe(index), printable(target)) for index, target in targets if not is_below(target, roots)]


def trusted_roots() -> list[str]:
    """The folders that COATNET_DATA_ROOTS names, to which links and paths of data may lead out of its own."""
    named = [name for name in os.environ.get(TRUSTED_ROOTS, "").split(os.pathsep) if name]
    return [spelled(name) for name in named for spelled in (os.path.abspath, os.path.realpath)]


def is_below(path: str, roots: Iterable[str]) -> bool:
    """Whether an absolute path is in one of the folders, or one of them itself."""
    return any(path == root or path.startswith(os.path.join(root, "")) for root in roots)


def empty_label_table(where: str, num_images: int, num_classes: int) -> NDArray[np.uint8]:
    """Zeros (N, K) for images with several labels. Raises UserError, which begins with `where`, if it is too large."""
    if num_images * num_classes > MAX_LABEL_BYTES:
        raise UserError(
            f"{where} {num_images:,} images of {num_classes:,} classes take {num_images * num_classes / 1e9:,.0f} GB "
            f"of labels, {MAX_LABEL_BYTES / 1e9:.0f} GB are read: are the labels what you mean?"
        )
    return np.zeros((num_images, num_classes), dtype=np.uint8)


def evenly_spaced(num_images: int, count: int) -> list[int]:
    """The indices of `count` images, or of all if they are fewer, from the first to the last."""
    return np.linspace(0, num_images - 1, min(count, num_images)).astype(np.int64).tolist()


def count_labels(labels: NDArray, num_classes: int) -> NDArray[np.int64]:
    """The number of images of each class, (K,), of class indices (N,), or of 0 and 1 per class (N, K)."""
    if labels.ndim == 2:
        return labels.sum(axis=0, dtype=np.int64)
    return np.bincount(labels, minlength=num_classes)


def as_labels(labels: NDArray) -> NDArray:
    """Class indices as int64 (N,), or 0 and 1 per class as uint8 (N, K)."""
    return labels.astype(np.int64 if labels.ndim == 1 else np.uint8, copy=False)


def printable(name: str) -> str:
    r"""A file name on one line of any terminal or JSON file: bytes that are not UTF-8 become \xNN, line breaks \n."""
    return one_line(os.fsencode(name).decode("utf-8", "backslashreplace"))
