"""Images of 1 to 16 channels and any depth: files as the values that they hold, which a scale turns into levels.

TIFF (strips or tiles, BigTIFF, planar or interleaved, or a page for each channel), NumPy files and 16-bit PNG are read
with all their bits; TIFF by `tifffile` where Pillow does not reach. A scale is measured over a sample of the images and
stored with the model.
"""

import copy
import io
import itertools
import logging
import math
import mmap
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from coatnet.data.datasets import Dataset, FileDataset, evenly_spaced
from coatnet.data.decode import (
    MAX_CHANNELS,
    BadImage,
    ImageFormat,
    Limits,
    Scale,
    above_pillows_limit,
    allowed_pixels,
    array_header,
    check_tiff,
    decode,
    format_of,
    is_deep_tiff,
    open_with_pillow,
    open_zipped_array,
    orientation_of,
    pixels_of,
    turned,
    weight_of,
)
from coatnet.data.image_headers import NpyHeader, array_layout, read_directory, read_jpeg_header, read_npy_header
from coatnet.errors import UserError, counted, first_line, import_extra, reason_of

D = TypeVar("D", bound=Dataset)

SAMPLED_IMAGES = 256  # chosen: a few seconds of reading; the same number as for the brightness of small images
MEASURED_PIXELS = 1_000_000  # of each; of larger ones every n-th row and column
FULL_SCALES = (255, 1023, 4095, 16_383, 65_535)  # of sensors of 8, 10, 12, 14 and 16 bits
_JPEG = 7  # compression of a TIFF
_ALPHA = 2  # extra sample of a TIFF: an opacity by which the colors are not multiplied
_LONGEST_HEADER = 2**16  # of a NumPy file, in bytes
_PIECE_BYTES = 2**20  # of an array that are unpacked at once
_COMPRESSIONS = {1: "", 5: "LZW", _JPEG: "JPEG", 8: "deflate", 32_946: "deflate", 32_773: "PackBits", 50_000: "zstd"}
_KEPT_BY_PILLOW = ("PNG", "TIFF", "PPM", "BMP")  # formats whose channels and depth it keeps, or most of them
_DEEP_SUFFIXES = (".tif", ".tiff", ".npy", ".npz")  # what may hold more than 8-bit RGB can show
_PNG_COLOR_OF_16_BITS = (2, 4, 6)  # with more than one channel: Pillow drops their lower 8 bits


def read_pixels(data: bytes, name: str, scale: Scale | None = None, *, reduces: bool = True) -> Tensor:
    """The pixels of an image file: uint8 RGB (3, H, W) by the rules of `decode`; with a scale, levels (C, H, W).

    Args:
        data: the bytes of the file.
        name: of the image, for errors.
        scale: of a model of other images than 8-bit RGB.
        reduces: as for `decode`.

    Raises:
        BadImage: as `decode` does, or the image has another number of channels than the scale.
    """
    if scale is not None:
        return to_levels(read_values(data, name, scale.channels, reduces=reduces), name, scale)
    kind = format_of(data, name)
    if kind.name not in ("NPY", "NPZ"):
        return decode(data, name, reduces=reduces)
    header = _checked(array_header(data, kind, name), Limits(name, allowed_pixels()), None)
    count = array_layout(header.shape, None)[2]
    if header.dtype != np.uint8 or count not in (1, 3):  # before the values are read
        raise BadImage(
            name,
            f"pixels: an array of {counted(count, 'channel')} of {header.dtype.name}, where 8-bit RGB is read: a "
            f"model that was trained with --channels {count} takes it",
        )
    values = read_values(data, name)
    return torch.from_numpy(np.broadcast_to(values, (*values.shape[:2], 3)).copy()).permute(2, 0, 1)


def to_levels(values: NDArray, name: str, scale: Scale) -> Tensor:
    """Values (..., H, W, C) to levels (..., C, H, W). Raises BadImage if they have another number of channels."""
    if values.shape[-1] != scale.channels:
        raise BadImage(name, f"channels: it has {counted(values.shape[-1], 'channel')}, {scale.channels} are read")
    return scale.levels(values)


def read_values(
    data: bytes, name: str, channels: int | None = None, *, max_pixels: int | None = None, reduces: bool = True
) -> NDArray:
    """The values of an image file as it holds them, upright: (H, W, C) of whole numbers or floats.

    Args:
        data: the bytes of the file.
        name: of the image, for errors.
        channels: that are wanted, which decides what an array of three axes means, and how many pages of a TIFF are
            channels; by default the shortest outer axis, and one page.
        max_pixels: as for `decode`; of more than three channels or deeper values as many fewer as they take memory.
        reduces: as for `decode`, of the formats that hold 8-bit RGB alone.

    Raises:
        BadImage: as `decode` does, or there are more than 16 channels.
    """
    kind, limits = format_of(data, name), Limits(name, max_pixels or allowed_pixels())
    try:
        if kind.name in ("NPY", "NPZ"):
            read = _read_zipped_array if kind.name == "NPZ" else map_array
            values = read(data, limits, channels)
            return values.astype(values.dtype.newbyteorder("="), copy=False)
        if kind.name == "PNG" and data[24:25] == b"\x10" and data[25] in _PNG_COLOR_OF_16_BITS:
            return _read_deep_png(data, limits)
        if kind.name == "TIFF" and _needs_tifffile(data, limits, channels):
            with TiffValues(io.BytesIO(data), limits, channels) as file:
                height, width = file.shape[:2]
                values = turned(file.read(0, 0, height, width), read_directory(data).numbers.get(274, 1))
        elif kind.name in _KEPT_BY_PILLOW:
            values = _read_with_pillow(data, kind, limits)
        else:  # 8 bits always
            values = _of_colors(decode(data, name, max_pixels=limits.max_pixels, reduces=reduces), channels)
    except BadImage:
        raise
    except UserError as error:  # a package is missing
        raise BadImage(name, f"format: {error}") from None
    except MemoryError as error:
        raise BadImage(name, f"large: no memory for its values ({len(data):,} bytes)") from error
    except Exception as error:  # parsers of untrusted bytes raise almost anything
        raise BadImage(name, f"corrupt: {first_line(error)}") from error
    return values


def values_of(image: Image.Image, name: str, channels: int | None = None) -> NDArray:
    """The values of an image that Pillow has opened or made, by the rules of `read_values`: (H, W, C).

    Raises BadImage as `pixels_of` does.
    """
    if image.format is not None and image.format not in _KEPT_BY_PILLOW:
        return _of_colors(pixels_of(image, name), channels)
    with warnings.catch_warnings(action="ignore"):
        try:
            return _values(image, Limits(name, allowed_pixels()))
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(name, f"corrupt: {reason_of(error)}") from error


def _of_colors(pixels: Tensor, channels: int | None) -> NDArray:
    """RGB (3, H, W) to values (H, W, 3), or (H, W, 1) of gray where one channel is wanted."""
    values = pixels.permute(1, 2, 0).numpy()
    is_gray = channels == 1 and bool((values[..., :1] == values[..., 1:]).all())
    return values[..., :1] if is_gray else values


# NumPy


def map_array(data: bytes | mmap.mmap, limits: Limits, channels: int | None) -> NDArray:
    """The values (H, W, C) of a NumPy file, a view of its bytes.

    Args:
        data: the bytes of a file, or a file that is mapped into memory.
        limits: of the whole image, or without a limit of pixels for one that is read window by window.
        channels: as for `read_values`.

    Raises:
        BadImage: the array is no image within the limits, or the file ends before it.
        ValueError: the header cannot be read.
    """
    return _view(data, _checked(read_npy_header(data[:_LONGEST_HEADER]), limits, channels), limits, channels)


def _read_zipped_array(data: bytes, limits: Limits, channels: int | None) -> NDArray:
    with open_zipped_array(data, limits.name) as file:
        start = file.read(_LONGEST_HEADER)
        header = _checked(read_npy_header(start), limits, channels)
        array, size = bytearray(start), header.offset + header.num_bytes
        while len(array) < size and (piece := file.read(min(_PIECE_BYTES, size - len(array)))):
            array += piece  # in place: zipfile would join a copy
    return _view(array, header, limits, channels)


def _checked(header: NpyHeader, limits: Limits, channels: int | None) -> NpyHeader:
    """The header of an array, if it is that of an image within the limits."""
    if header.dtype.kind not in "biuf" or len(header.shape) not in (2, 3) or 0 in header.shape:
        raise BadImage(
            limits.name,
            f"pixels: an array of {header.dtype} of the shape {header.shape}; an image is (H, W), (H, W, C) or "
            "(C, H, W) of numbers",
        )
    height, width, count, _ = array_layout(header.shape, channels)
    _check_channels(count, limits)
    limits.check(width, height, weight_of(count, header.dtype.itemsize))
    return header


def _view(data: bytes | bytearray | mmap.mmap, header: NpyHeader, limits: Limits, channels: int | None) -> NDArray:
    if len(data) < header.offset + header.num_bytes:
        raise BadImage(limits.name, f"truncated: {len(data):,} bytes for an array of {header.num_bytes:,}")
    values = np.ndarray(header.shape, header.dtype, data, header.offset, order="F" if header.fortran else "C")
    height, width, count, first = array_layout(header.shape, channels)
    return np.moveaxis(values, 0, -1) if first else values.reshape(height, width, count)


def _check_channels(count: int, limits: Limits) -> None:
    if not 1 <= count <= MAX_CHANNELS:
        raise BadImage(limits.name, f"channels: it has {count}; images of 1 to {MAX_CHANNELS} are read")


# PNG and what else Pillow keeps whole


def _read_deep_png(data: bytes, limits: Limits) -> NDArray:
    width, height = (int.from_bytes(data[place : place + 4], "big") for place in (16, 20))
    limits.check(width, height, weight_of(4, 2))
    return import_extra("imagecodecs", "tiff", "a PNG of 16 bits in several channels").png_decode(data)


def _read_with_pillow(data: bytes, kind: ImageFormat, limits: Limits) -> NDArray:
    try:
        return _attempt(data, kind, limits)
    except Image.DecompressionBombError:  # above the limit of Pillow, which is that of the process
        with above_pillows_limit():
            return _attempt(data, kind, limits)


def _attempt(data: bytes, kind: ImageFormat, limits: Limits) -> NDArray:
    with warnings.catch_warnings(action="ignore"), open_with_pillow(data, kind, limits.name) as image:
        return _values(image, limits)


def _values(image: Image.Image, limits: Limits) -> NDArray:
    limits.check(*image.size, weight_of(len(image.getbands()), 4))
    image.load()
    turn = orientation_of(image)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    values = turned(np.asarray(image), turn)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow's type for 16 bits of some formats
        values = values.astype(np.uint16)
    return values.reshape(*values.shape[:2], -1)


# TIFF


def _needs_tifffile(data: bytes, limits: Limits, channels: int | None) -> bool:
    directory = check_tiff(data, limits)
    pages = directory.numbers.get(277, 1) == 1 and channels is not None and channels > 1  # one for each
    return pages or is_deep_tiff(directory)


class TiffValues:
    """A TIFF whose values are read window by window, each from the strips or tiles that it touches.

    Args:
        file: opened in binary mode, at any place.
        limits: of one window; the whole may be larger.
        channels: as for `read_values`.

    Attributes:
        shape: (H, W, C) of the whole image.
        dtype: of its values.

    Raises:
        BadImage: the header says nothing that can be read, or a compression that is not.
        UserError: tifffile is not installed, or imagecodecs where the file is compressed.
    """

    def __init__(self, file: BinaryIO, limits: Limits, channels: int | None = None) -> None:
        tifffile = import_extra("tifffile", "tiff", "a TIFF of these channels or values")
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it reports there what is raised here as well
        self.limits = limits
        self._file = tifffile.TiffFile(file)
        page = self._file.pages.first
        separate = channels is not None and channels > 1 and page.samplesperpixel == 1
        self._pages = [self._page(number) for number in range(channels)] if separate and channels else [page]
        samples = page.samplesperpixel if len(self._pages) == 1 else len(self._pages)
        _check_channels(samples, limits)
        self.shape, self.dtype = (page.imagelength, page.imagewidth, samples), np.dtype(page.dtype)
        if self.dtype.kind not in "biuf" or page.imagedepth != 1 or 0 in self.shape:
            raise BadImage(limits.name, f"pixels: values of {page.dtype} in {page.imagedepth} layers are not read")
        if any((each.shaped, each.dtype) != (page.shaped, page.dtype) for each in self._pages):
            raise BadImage(limits.name, "channels: its pages differ in size or type, so they are not channels")
        if separate and (more := self._next_page()) and (more.shaped, more.dtype) == (page.shaped, page.dtype):
            raise BadImage(
                limits.name, f"channels: it has more than {counted(samples, 'channel')}, one a page; {samples} are read"
            )
        if page.compression not in _COMPRESSIONS:
            known = ", ".join(sorted({*_COMPRESSIONS.values()} - {""}))
            raise BadImage(
                limits.name, f"format: compression {int(page.compression)} of a TIFF is not read; {known} are"
            )
        if page.compression != 1 or page.predictor != 1:
            import_extra("imagecodecs", "tiff", "a compressed TIFF")

    def _page(self, number: int) -> Any:
        try:
            return self._file.pages[number]
        except IndexError:
            raise BadImage(
                self.limits.name, f"channels: it has {counted(number, 'channel')}, one a page; more are read"
            ) from None

    def _next_page(self) -> Any:
        """The page after those that are channels; None if there is none."""
        try:
            return self._file.pages[len(self._pages)]
        except IndexError:
            return None

    def __enter__(self) -> "TiffValues":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, top: int, left: int, height: int, width: int) -> NDArray:
        """The values (height, width, C) of a window within the image. Raises BadImage if it is too large or damaged."""
        self.limits.check(width, height, weight_of(self.shape[2], self.dtype.itemsize))
        values = np.zeros((height, width, self.shape[2]), self.dtype)
        for first, page in enumerate(self._pages):
            for channel, place, segment in self._segments(page, top, top + height, left, left + width):
                rows, columns = (
                    (max(at, begin), min(at + size, begin + length))
                    for at, size, begin, length in zip(place, segment.shape, (top, left), (height, width), strict=False)
                )
                if rows[0] < rows[1] and columns[0] < columns[1]:
                    part = segment[
                        rows[0] - place[0] : rows[1] - place[0], columns[0] - place[1] : columns[1] - place[1]
                    ]
                    values[
                        rows[0] - top : rows[1] - top,
                        columns[0] - left : columns[1] - left,
                        first + channel : first + channel + part.shape[2],
                    ] = part
        return values

    @property
    def plain_colors(self) -> bool:
        """Whether 8-bit values are gray, RGB or RGBA as they stand, white as the largest."""
        page = self._pages[0]
        if self.shape[2] == 4:
            return int(page.photometric) == 2 and tuple(map(int, page.extrasamples)) == (_ALPHA,)
        return self.shape[2] in (1, 3) and (int(page.photometric) in (1, 2) or page.compression == _JPEG)

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def _segments(
        self, page: Any, top: int, bottom: int, left: int, right: int
    ) -> Iterator[tuple[int, tuple[int, int], NDArray]]:
        """First channel, place (top, left) and values (h, w, c) of each strip or tile in these rows and columns."""
        handle = page.parent.filehandle
        planes, _, height, width, samples = page.shaped
        tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
        self.limits.check(wide, tall, weight_of(samples, self.dtype.itemsize), what="a tile or strip of ")
        down, across = -(-height // tall), -(-width // wide)
        rows, columns = range(top // tall, -(-bottom // tall)), range(left // wide, -(-right // wide))
        for plane, row, column in itertools.product(range(planes), rows, columns):
            number = (plane * down + row) * across + column
            offset, size = page.dataoffsets[number], page.databytecounts[number]
            if not size:
                continue  # sparse: zeros
            handle.seek(offset)
            encoded = handle.read(min(size, handle.size))
            options: dict[str, Any] = {}
            if page.compression == _JPEG:
                header = read_jpeg_header(encoded)
                if header is None or header.width > wide or header.height > tall:
                    raise BadImage(self.limits.name, "corrupt: a JPEG within the TIFF is none, or larger than its tile")
                self.limits.check_scans(encoded.count(b"\xff\xda"), wide * tall)
                options["jpegtables"] = page.jpegtables
            segment, (_, _, at, begin, _), _ = page.decode(encoded, number, **options)
            yield plane, (at, begin), segment[0]


def to_shown(pixels: Tensor) -> Tensor:
    """Images to look at or to compare: uint8 (..., C, H, W); of levels each channel from its least to its greatest."""
    if pixels.dtype == torch.uint8:
        return pixels
    low, high = (reduce(pixels, dim=(-2, -1), keepdim=True) for reduce in (torch.amin, torch.amax))
    return ((pixels - low) * (255 / (high - low).clamp_min(1e-12))).round().clamp(0, 255).byte()


def to_rgb(pixels: Tensor) -> Tensor:
    """The same in color, uint8 (3, H, W): the first three channels as red, green and blue; one or two as gray."""
    shown = to_shown(pixels)
    return shown[:3] if len(shown) > 2 else shown[:1].expand(3, -1, -1)


# Data sets


def with_scale(dataset: D, scale: Scale | None) -> D:
    """The dataset, its images read as levels of the scale, or as 8-bit RGB without one."""
    if getattr(dataset, "scale", None) == scale:
        return dataset
    scaled = copy.copy(dataset)
    scaled.scale = scale
    return scaled


def find_scale(dataset: Dataset) -> Scale | None:
    """The scale that shows images which are not 8-bit RGB, by the first that can be read; None for all others.

    Only TIFF and NumPy files are looked at, as others hold no more than Pillow reads unless they are asked for.

    Raises:
        BadImage: it needs a package that is not installed, or has a compression that is not read.
    """
    for index in range(0 if getattr(dataset, "in_memory", False) else min(len(dataset), 3)):
        name = dataset.describe(index)
        if isinstance(dataset, FileDataset) and not name.lower().endswith(_DEEP_SUFFIXES):
            return None
        try:
            data = dataset.read(index)[0]
            if not isinstance(data, bytes) or format_of(data, name).name not in ("TIFF", "NPY", "NPZ"):
                return None
        except BadImage:
            continue
        try:
            read_pixels(data, name)
            return None
        except BadImage as error:
            if error.code not in ("pixels", "channels"):
                continue
        try:
            return scale_of(read_values(data, name))
        except BadImage as error:
            if error.code == "format":  # a package is missing, or a compression is not read
                raise
    return None


class ChannelStatistics(NamedTuple):
    """Of a sample of images: the scale of their values; mean and deviation of each channel, of values from 0 to 1."""

    scale: Scale
    mean: tuple[float, ...]
    std: tuple[float, ...]


def measure_if_deep(dataset: Dataset, channels: int | None) -> ChannelStatistics | None:
    """Measure images that are read as levels: with another number of channels than 1 or 3, or deeper than 8 bits.

    Args:
        channels: that are asked for; None: those of the first image, where it is none of 8-bit RGB.
    """
    scale: Scale | None = getattr(dataset, "scale", None)
    if channels in (1, 3) and scale is None and not _is_deep(dataset, channels):
        return None
    if channels is None and scale is None:
        return None
    return measure(dataset, channels or (scale.channels if scale else 0))


def _is_deep(dataset: Dataset, channels: int) -> bool:
    """Whether the first image that can be read has values of more than 8 bits, or the channels are pages of a TIFF."""
    for index in range(min(len(dataset), 3)):
        name = dataset.describe(index)
        try:
            encoded = dataset.read(index)[0]
            if not isinstance(encoded, bytes):
                return encoded.dtype != np.uint8
            kind = format_of(encoded, name).name
        except BadImage:
            continue
        try:
            values = read_values(encoded, name)
        except BadImage as error:
            if error.code == "format" and kind in ("PNG", "TIFF", "NPY", "NPZ"):  # a package is missing
                raise
            continue
        if values.dtype != np.uint8 or kind != "TIFF":
            return values.dtype != np.uint8
        with suppress(BadImage):
            return read_values(encoded, name, channels).shape[2] > values.shape[2]
        return False
    return False


def measure(dataset: Dataset, channels: int) -> ChannelStatistics:
    """Measure up to 256 images, evenly spread.

    Raises:
        UserError: two images have different numbers of channels, or none can be read.
    """
    sums, squares, count, low, high = np.zeros(channels), np.zeros(channels), 0, math.inf, -math.inf
    kind = np.dtype(bool)
    fitting, failure = "", None
    for index in evenly_spaced(len(dataset), SAMPLED_IMAGES):
        name = dataset.describe(index)
        try:
            encoded = dataset.read(index)[0]
            values = read_values(encoded, name, channels) if isinstance(encoded, bytes) else as_values(encoded)
        except BadImage as bad:
            failure = failure or bad
            continue
        if values.shape[-1] != channels:
            failure = BadImage(
                name, f"channels: it has {counted(values.shape[-1], 'channel')}, {channels} are asked for"
            )
            continue
        fitting, kind = fitting or name, np.promote_types(kind, values.dtype)
        step = math.ceil(math.sqrt(values.shape[0] * values.shape[1] / MEASURED_PIXELS))
        some = values[::step, ::step].astype(np.float64)
        kept = some[np.isfinite(some).all(axis=-1)]  # (N, C)
        if not len(kept):
            continue
        extremes = kept if values.dtype.kind == "f" else values  # the largest whole number says how many bits there are
        low, high = min(low, float(extremes.min())), max(high, float(extremes.max()))
        sums, squares, count = sums + kept.sum(0), squares + (kept**2).sum(0), count + len(kept)
    if failure is not None and (not count or failure.code == "channels"):
        beside = f"; {fitting} has {channels}: all images of a data set need the same number" if fitting else ""
        raise UserError(f"{failure}{beside}")
    scale = Scale(channels, *_ends(kind, low, high))
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    reach = scale.high - scale.low
    rounded = [tuple(float(f"{each:.6g}") for each in column) for column in ((mean - scale.low) / reach, std / reach)]
    return ChannelStatistics(scale, rounded[0], tuple(each if each > 1e-6 else 1.0 for each in rounded[1]))


def scale_of(values: NDArray) -> Scale:
    """The scale of one image."""
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = finite.min(initial=math.inf), finite.max(initial=-math.inf)
    return Scale(values.shape[-1], *_ends(values.dtype, float(low), float(high)))


def as_values(array: NDArray) -> NDArray:
    """Pixels (H, W) or (H, W, C) to (H, W, C)."""
    return array[..., None] if array.ndim == 2 else array


def _ends(dtype: np.dtype, low: float, high: float) -> tuple[float, float]:
    """The values of level 0 and 255: whole numbers from 0 to the full scale of the sensor; floats from 0 to 1 if all
    are; else from the least to the greatest."""
    if not math.isfinite(low) or not math.isfinite(high):
        return 0.0, 1.0
    if dtype.kind == "u" and high <= FULL_SCALES[-1]:
        return 0.0, float(255 if dtype.itemsize == 1 else next(each for each in FULL_SCALES if high <= each))
    if dtype.kind == "f" and low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1.0
