"""Data sets that are known by name (`digits`, `fashion-mnist`, `fashion-mnist-small`), and folders of IDX files.

IDX is the file format of MNIST: a magic number, the sizes of the axes as 32-bit integers, then the bytes.
"""

import gzip
import math
import os
import shutil
import socket
import zlib
from contextlib import suppress
from importlib.resources import files
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coatnet.data.datasets import ArrayDataset
from coatnet.data.splits import Splits, choose_validation
from coatnet.errors import UserError, reason_of
from coatnet.system.cache import cache_folder, cached_folder
from coatnet.system.files import open_regular, read_regular

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CLASS_NAMES_FILE = "classes.txt"
_SHEET_COLUMNS = 100  # images in a row of an embedded sheet
_SHEET_SIDE = 28  # pixels of an image
_EMBEDDED = files("coatnet.data") / "embedded"
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_DOWNLOAD_TIMEOUT_SECONDS = 30  # without any data, not in all
MAX_UNPACKED_BYTES = 1 << 30  # chosen: of a gzipped file, which may unpack to a thousand times its size
_UNSIGNED_BYTES = 0x08  # IDX code of the data type


def open_fashion_mnist() -> Splits:
    """Open the 60,000 + 10,000 images of Fashion-MNIST.

    They are looked for in `$COATNET_DATA_DIR/fashion-mnist`, in Debian's package `dataset-fashion-mnist` and in the
    cache folder, and are downloaded once if they are nowhere.

    Raises:
        UserError: they are not on this machine and cannot be downloaded.
    """
    own = os.environ.get("COATNET_DATA_DIR")
    folders = [Path(own) / "fashion-mnist"] if own else []
    found = next((folder for folder in (*folders, _DEBIAN) if is_idx_folder(folder)), None)
    if found is None:
        found = cached_folder("downloads", "fashion-mnist", _download_fashion_mnist) / "FashionMNIST" / "raw"
    return open_idx_folder(found, "fashion-mnist", FASHION_CLASSES)


def open_fashion_mnist_small() -> Splits:
    """Open the excerpt that comes with the package: 1,000 training and 200 validation images of each class."""
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
    """Open the 1,797 handwritten digits of UCI, 8 x 8 pixels, which come with the package."""
    with (_EMBEDDED / "digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["pictures"], arrays["labels"].astype(np.int64)
    numbers = np.arange(len(labels))
    held_out = choose_validation([f"digits[{number}]" for number in numbers], labels, validation_fraction)
    classes = [str(digit) for digit in range(10)]
    training, validation = (
        ArrayDataset("digits", classes, images[part], labels[part], numbers[part]) for part in (~held_out, held_out)
    )
    return Splits("digits", training, validation, by_name=True)


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder has the training or the test images of an IDX data set."""
    return any(find_idx(folder, f"{split}-images") for split in ("train", "t10k"))


def open_idx_folder(
    folder: Path, name: str | None = None, classes: tuple[str, ...] | None = None, *, evaluation: bool = False
) -> Splits:
    """Open a folder with MNIST's four files.

    Args:
        name: of the data set; None is the folder's name.
        classes: names of the classes; None takes the lines of `classes.txt` in the folder, or the classes' numbers.
        evaluation: nothing is trained, so the two files of one split are enough.

    Raises:
        UserError: a file is missing or damaged, or a label has no class.
    """
    there = [find_idx(folder, f"{split}-images") for split in ("train", "t10k")]
    if evaluation and None in there and any(there):
        validation, validation_labels = _read_pair(folder, "train" if there[0] else "t10k")
        training, training_labels = validation[:0], validation_labels[:0]
    else:
        training, training_labels = _read_pair(folder, "train")
        validation, validation_labels = _read_pair(folder, "t10k")
    highest = max(int(labels.max(initial=0)) for labels in (training_labels, validation_labels))
    if classes is None and (folder / CLASS_NAMES_FILE).is_file():
        try:
            lines = read_regular(folder / CLASS_NAMES_FILE).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{folder / CLASS_NAMES_FILE} is not text in UTF-8 ({error.reason})") from None
        classes = tuple(line.strip() for line in lines if line.strip())
    elif classes is None:
        classes = tuple(str(number) for number in range(highest + 1))
    if highest >= len(classes):
        raise UserError(
            f"{folder}: a label is {highest} where there are {len(classes)} classes, 0 to {len(classes) - 1}"
        )
    name = name or folder.name
    numbers = len(training) + np.arange(len(validation))
    return Splits(
        name,
        ArrayDataset(name, classes, training, training_labels),
        ArrayDataset(name, classes, validation, validation_labels, numbers),
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an array of unsigned bytes from an IDX file, plain or gzipped.

    Raises:
        UserError: it is not such a file, or it is damaged.
    """
    try:
        with open(path, "rb", opener=open_regular) as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            return _read_idx(path, gzip.GzipFile(fileobj=plain) if packed else plain, packed)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable IDX file ({error}); fetch it again") from error


def _read_idx(path: Path, file: BufferedReader | gzip.GzipFile, packed: bool) -> NDArray[np.uint8]:
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _UNSIGNED_BYTES or not 1 <= head[3] <= 4:
        raise UserError(f"{path}: not an IDX file of bytes; it would begin with 00 00 08, got {head.hex(' ')!r}")
    sizes = file.read(4 * head[3])
    shape = tuple(int.from_bytes(sizes[at : at + 4], "big") for at in range(0, len(sizes), 4))
    size = math.prod(shape)
    if packed and size > MAX_UNPACKED_BYTES:
        raise UserError(f"{path}: {size:,} bytes when unpacked; above {MAX_UNPACKED_BYTES:,} unpack it yourself")
    data = file.read(min(size, MAX_UNPACKED_BYTES if packed else path.stat().st_size) + 1)
    if len(sizes) < 4 * head[3] or len(data) != size:
        found = f"more than {size:,}" if len(data) > size else f"{len(data):,}"
        raise UserError(f"{path}: {found} bytes where its header says {shape}; fetch it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def find_idx(folder: Path, stem: str) -> Path | None:
    """The file in `folder` whose name begins with `stem`, such as `train-images`, gzipped or not."""
    return next(iter(sorted(folder.glob(f"{stem}*ubyte*"))), None)


def _read_pair(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N, H, W) and labels (N,) of a split."""
    paths = [find_idx(folder, f"{split}-{part}") for part in ("images", "labels")]
    if None in paths:
        raise UserError(f"{folder}: needs {split}-images-idx3-ubyte and {split}-labels-idx1-ubyte, plain or .gz")
    images, labels = (read_idx(path) for path in paths if path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        raise UserError(f"{folder}: {split} has images {images.shape} but labels {labels.shape}; counts must agree")
    return images, labels


def _read_sheet(file_name: str) -> NDArray[np.uint8]:
    """Images (N, 28, 28) from a sheet with 100 images in a row."""
    with (_EMBEDDED / file_name).open("rb") as file:
        sheet = np.array(Image.open(file, formats=("PNG",)))
    rows = sheet.reshape(-1, _SHEET_SIDE, _SHEET_COLUMNS, _SHEET_SIDE)  # (rows, 28, 100, 28)
    images = np.ascontiguousarray(rows.transpose(0, 2, 1, 3))  # (rows, 100, 28, 28)
    return images.reshape(-1, _SHEET_SIDE, _SHEET_SIDE)  # (N, 28, 28)


def _download_fashion_mnist(folder: Path) -> None:
    """Download the four files below a folder, or copy what version 0.1 kept, if that is whole."""
    with suppress(OSError, UserError):
        old = cache_folder() / "FashionMNIST"
        open_idx_folder(old / "raw")
        shutil.copytree(old, folder / "FashionMNIST")
        return
    from torchvision.datasets import FashionMNIST

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)
    try:
        FashionMNIST(str(folder), download=True)
    except Exception as error:
        raise UserError(
            "fashion-mnist is not on this machine and the download failed "
            f"({reason_of(error)}): `apt-get install dataset-fashion-mnist`, set "
            "COATNET_DATA_DIR to a folder that holds fashion-mnist/ with the four IDX files, or use "
            "fashion-mnist-small"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
