"""Datasets known by name: `fashion-mnist`, `fashion-mnist-small`, `digits`; and folders of IDX files."""

import gzip
import os
import socket
import zlib
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coatnet.data.datasets import ArrayDataset
from coatnet.data.splits import Splits, choose_validation
from coatnet.errors import UserError
from coatnet.system.cache import cache_folder

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_SHEET_COLUMNS = 100
_SMALL_SIDE = 28
_EMBEDDED = files("coatnet.data") / "embedded"
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_UNSIGNED_BYTES = 0x08
_DOWNLOAD_SECONDS = 30  # of silence, not in all


def open_fashion_mnist() -> Splits:
    """The full 60,000 + 10,000, wherever they are; downloaded once if they are nowhere."""
    own = os.environ.get("COATNET_DATA_DIR")
    cache = cache_folder()
    downloaded = cache / "FashionMNIST" / "raw"
    folders = [Path(own) / "fashion-mnist"] if own else []
    found = next((folder for folder in (*folders, _DEBIAN, downloaded) if is_idx_folder(folder)), None)
    if found is None:
        _download_fashion_mnist(cache)
    return open_idx_folder(found or downloaded, "fashion-mnist", FASHION_CLASSES)


def open_fashion_mnist_small() -> Splits:
    """The excerpt inside the package: 1,000 and 200 images of each class."""
    name = "fashion-mnist-small"
    training, validation = (
        ArrayDataset(
            name,
            FASHION_CLASSES,
            images,
            np.arange(10).repeat(len(images) // 10),
            first + np.arange(len(images)),
        )
        for first, images in (
            (0, _read_sheet(f"{name}-training.png")),
            (10_000, _read_sheet(f"{name}-validation.png")),
        )
    )
    note = "an excerpt that comes with the package; the 60,000 + 10,000 are called fashion-mnist"
    return Splits(name, training, validation, (note,))


def open_digits(validation_fraction: float) -> Splits:
    """UCI's 1,797 handwritten digits of 8 x 8 pixels."""
    with (_EMBEDDED / "digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["pictures"], arrays["labels"].astype(np.int64)
    numbers = np.arange(len(labels))
    held_out = choose_validation([f"digits[{number}]" for number in numbers], labels, validation_fraction)
    classes = [str(digit) for digit in range(10)]
    training, validation = (
        ArrayDataset("digits", classes, images[part], labels[part], numbers[part]) for part in (~held_out, held_out)
    )
    return Splits("digits", training, validation)


def is_idx_folder(folder: Path) -> bool:
    return find_idx(folder, "train-images") is not None


def open_idx_folder(folder: Path, name: str, classes: tuple[str, ...] | None = None) -> Splits:
    """MNIST's four files. Without class names, classes are called by their numbers."""
    training, training_labels = _read_pair(folder, "train")
    validation, validation_labels = _read_pair(folder, "t10k")
    if classes is None:
        classes = tuple(str(number) for number in range(max(training_labels.max(), validation_labels.max()) + 1))
    if (highest := max(training_labels.max(), validation_labels.max())) >= len(classes):
        raise UserError(
            f"{folder}: a label is {highest} where there are {len(classes)} classes, 0 to {len(classes) - 1}"
        )
    numbers = len(training) + np.arange(len(validation))
    return Splits(
        name,
        ArrayDataset(name, classes, training, training_labels),
        ArrayDataset(name, classes, validation, validation_labels, numbers),
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of unsigned bytes, from a plain or gzipped file."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable IDX file ({error}); fetch it again") from error

    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTES or not 1 <= data[3] <= 4:
        raise UserError(f"{path}: not an IDX file of bytes; it would begin with 00 00 08, got {data[:4].hex(' ')!r}")
    num_axes = data[3]
    header = 4 + 4 * num_axes
    shape = tuple(int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(num_axes))
    if len(data) - header != int(np.prod(shape, dtype=object)):
        raise UserError(f"{path}: {len(data) - header:,} bytes where its header says {shape}; fetch it again")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def find_idx(folder: Path, stem: str) -> Path | None:
    """The file in `folder` whose name begins with `stem`, such as `train-images`, gzipped or not."""
    return next(iter(sorted(folder.glob(f"{stem}*ubyte*"))), None)


def _read_pair(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    paths = [find_idx(folder, f"{split}-{part}") for part in ("images", "labels")]
    if None in paths:
        raise UserError(f"{folder}: needs {split}-images-idx3-ubyte and {split}-labels-idx1-ubyte, plain or .gz")
    images, labels = (read_idx(path) for path in paths if path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        raise UserError(f"{folder}: {split} has images {images.shape} but labels {labels.shape}; counts must agree")
    return images, labels


def _read_sheet(file_name: str) -> NDArray[np.uint8]:
    """A sheet of 100 images a row to images (N, 28, 28)."""
    with (_EMBEDDED / file_name).open("rb") as file:
        sheet = np.array(Image.open(file, formats=("PNG",)))
    rows = sheet.reshape(-1, _SMALL_SIDE, _SHEET_COLUMNS, _SMALL_SIDE)
    return np.ascontiguousarray(rows.transpose(0, 2, 1, 3)).reshape(-1, _SMALL_SIDE, _SMALL_SIDE)


def _download_fashion_mnist(cache: Path) -> None:
    from torchvision.datasets import FashionMNIST

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_SECONDS)
    try:
        FashionMNIST(str(cache), download=True)
    except Exception as error:
        raise UserError(
            "fashion-mnist is not on this machine and the download failed "
            f"({' '.join(str(error).split())[:120]}): `apt-get install dataset-fashion-mnist`, set "
            "COATNET_DATA_DIR to a folder that holds fashion-mnist/ with the four IDX files, or use "
            "fashion-mnist-small"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
