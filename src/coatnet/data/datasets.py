"""What every source of images is: a length, class names, labels, and `read(index)`."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coatnet.data.decode import BadImage
from coatnet.errors import one_line

Encoded = bytes | NDArray[np.uint8]


class Dataset(Protocol):
    """Images by number. `labels` are class indices (N,), or 0 and 1 a class (N, K) if multi-label."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def multilabel(self) -> bool: ...
    @property
    def labels(self) -> NDArray: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Encoded, NDArray]:
        """The encoded bytes or the pixels (H, W) or (H, W, 3) of an image, and its label.

        Raises `BadImage` if the image cannot be read.
        """
        ...

    def describe(self, index: int) -> str:
        """How a report names this image."""
        ...


class ArrayDataset:
    """Images of one size, held in memory as uint8 (N, H, W) or (N, H, W, 3)."""

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        images: NDArray[np.uint8],
        labels: NDArray,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        """`numbers` are the images' numbers in the set they come from, if this is a part of it."""
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

    def describe(self, index: int) -> str:
        return f"{self.name}[{self.numbers[index]}]"


class FileDataset:
    """Images in files below one folder; their names live in one buffer, cheap to send to workers."""

    def __init__(self, name: str, classes: Sequence[str], root: Path, paths: Iterable[str], labels: NDArray) -> None:
        """`paths` are relative to `root`; names that are not UTF-8 hold surrogates, as from `os`."""
        self.name = name
        self.classes = tuple(classes)
        self.root = root
        self.labels = as_labels(labels)
        self.multilabel = self.labels.ndim == 2
        encoded = [os.fsencode(path) for path in paths]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, index: int) -> Path:
        start = self._ends[index - 1] if index else 0
        return self.root / os.fsdecode(self._names[start : self._ends[index]])

    def read(self, index: int) -> tuple[bytes, NDArray]:
        try:
            return self.path(index).read_bytes(), self.labels[index]
        except OSError as error:
            raise BadImage(self.describe(index), f"unreadable: {error.strerror}") from error

    def describe(self, index: int) -> str:
        return printable(str(self.path(index)))


def as_labels(labels: NDArray) -> NDArray:
    """Class indices as int64 (N,), or 0 and 1 as uint8 (N, K)."""
    return labels.astype(np.int64) if labels.ndim == 1 else labels.astype(np.uint8)


def printable(name: str) -> str:
    r"""A file name on one line of any terminal or JSON file: bytes that are not UTF-8 become \xNN, breaks \n."""
    return one_line(os.fsencode(name).decode("utf-8", "backslashreplace"))
