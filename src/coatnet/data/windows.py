"""Windows of an image: of TIFF and NumPy files only what they touch is read, so the image may be larger than memory."""

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from coatnet.data.channels import TiffValues, map_array, read_pixels, to_levels
from coatnet.data.datasets import read_image_file
from coatnet.data.decode import (
    SNIFFED_BYTES,
    BadImage,
    Limits,
    Scale,
    allowed_pixels,
    check_tiff,
    sniff,
    weight_of,
)
from coatnet.errors import UserError, first_line, import_extra
from coatnet.system.files import open_regular

_ANY_SIZE = 2**62


class Windows(Protocol):
    """An image that is read window by window.

    Attributes:
        size: (H, W) of the whole image in pixels.
        most_pixels: that a window may have.
    """

    size: tuple[int, int]
    most_pixels: int

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        """A window within the image: uint8 RGB (3, height, width), or levels (C, height, width)."""
        ...


class _Whole:
    """An image in memory."""

    def __init__(self, pixels: Tensor) -> None:
        self._pixels, self.size = pixels, (pixels.shape[1], pixels.shape[2])
        self.most_pixels = self.size[0] * self.size[1]

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        return self._pixels[:, top : top + height, left : left + width]


class _Tiff:
    """A TIFF, by its strips or tiles."""

    def __init__(self, values: TiffValues, scale: Scale | None) -> None:
        self._values, self._scale, self.size = values, scale, values.shape[:2]
        self.most_pixels = values.limits.max_pixels // weight_of(values.shape[2], values.dtype.itemsize)

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        values = self._values.read(top, left, height, width)
        if self._scale is not None:
            return to_levels(values, self._values.limits.name, self._scale)
        if values.shape[2] == 4:
            image = Image.fromarray(values)
            page = Image.new("RGBA", image.size, "white")
            page.alpha_composite(image)
            values = np.array(page)[..., :3]
        return torch.from_numpy(values).permute(2, 0, 1).expand(3, -1, -1)


class _Array:
    """A NumPy file, mapped into memory."""

    def __init__(self, values: NDArray, limits: Limits, scale: Scale) -> None:
        self._values, self._limits, self._scale, self.size = values, limits, scale, values.shape[:2]
        self.most_pixels = limits.max_pixels // weight_of(values.shape[2], values.itemsize)

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        self._limits.check(width, height, weight_of(self._values.shape[2], self._values.itemsize))
        window = self._values[top : top + height, left : left + width]
        return to_levels(np.array(window).astype(window.dtype.newbyteorder("=")), self._limits.name, self._scale)


@contextmanager
def open_windows(path: Path, scale: Scale | None) -> Iterator[Windows]:
    """Open an image file for reading windows of it, as a model with this scale reads images.

    Read window by window are upright TIFF, without a scale those of 8-bit gray, RGB or RGBA values, and with a scale
    `.npy`. Everything else is decoded whole, within the limit of pixels.

    Raises:
        BadImage: the file cannot be read, is too large for what must be decoded whole, or needs a package that is not
            installed to be read window by window.
    """
    with ExitStack() as held:
        try:
            windows = _open(path, scale, held)
        except (BadImage, UserError):
            raise
        except OSError as error:
            raise BadImage(str(path), f"unreadable: {error.strerror or first_line(error)}") from error
        except Exception as error:  # parsers of untrusted bytes raise almost anything
            raise BadImage(str(path), f"corrupt: {first_line(error)}") from error
        yield windows


def _open(path: Path, scale: Scale | None, held: ExitStack) -> Windows:
    name = str(path)
    limits = Limits(name, allowed_pixels(), _ANY_SIZE)  # of a window
    file = held.enter_context(open(path, "rb", opener=open_regular))  # noqa: SIM115
    kind = sniff(file.read(SNIFFED_BYTES))
    missing: UserError | None = None
    if kind is not None and kind.name in ("NPY", "TIFF"):
        data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed with what is read from it
        if kind.name == "NPY" and scale is not None:
            return _Array(map_array(data, Limits(name, _ANY_SIZE, _ANY_SIZE), scale.channels), limits, scale)
        if kind.name == "TIFF":
            upright = check_tiff(data, Limits(name, _ANY_SIZE, _ANY_SIZE)).numbers.get(274, 1) == 1
            file.seek(0)
            try:
                if upright and (values := _tiff_values(file, limits, scale)) is not None:
                    return _Tiff(held.enter_context(values), scale)
            except UserError as error:  # a package is not installed; the image may be small enough without it
                missing = error
    try:
        return _Whole(read_pixels(read_image_file(path, name), name, scale, reduces=False))
    except BadImage as bad:
        if missing is not None and bad.code in ("large", "unreadable"):
            raise BadImage(name, f"format: {missing}") from None
        raise


def _tiff_values(file: object, limits: Limits, scale: Scale | None) -> TiffValues | None:
    """The values of a TIFF where they are those that a model reads; None where it has to be decoded whole.

    Raises UserError if tifffile or imagecodecs is not installed.
    """
    import_extra("tifffile", "tiff", "a TIFF that is read tile by tile")
    try:
        values = TiffValues(file, limits, None if scale is None else scale.channels)  # pyrefly: ignore
    except BadImage:
        return None
    except UserError:
        raise
    except Exception:  # of a damaged file, which the decoder then names
        return None
    if scale is None and not (values.dtype == np.uint8 and values.plain_colors):
        values.close()
        return None
    return values
