"""Decode image files to RGB pixels: sizes are checked before memory is allocated, and there is one kind of error.

JPEGs of one or three components are decoded by simplejpeg, which gives the pixels of Pillow in three quarters of the
time; everything else, and what simplejpeg rejects, by Pillow with the one format that the first bytes name. Color
profiles (ICC) are not applied.
"""

import io
import math
import os
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torch import Tensor

from coatnet.data.image_headers import (
    HEADER_ERRORS,
    TIFF_EXIF,
    Directory,
    JpegHeader,
    NpyHeader,
    Webp,
    array_layout,
    count_jpeg2000_pieces,
    has_end_marker,
    jpeg_without_metadata,
    orientation,
    png_without_metadata,
    read_directory,
    read_jpeg_header,
    read_npy_header,
    read_webp,
)
from coatnet.errors import UserError, reason_of

Pixels = NDArray[np.uint8]  # (H, W, 3)


class ImageFormat(NamedTuple):
    """A kind of image file that is read."""

    name: str  # as Pillow has it
    suffixes: tuple[str, ...]
    start: bytes  # a regular expression for its first bytes
    weight: int = 1  # memory that its decoder takes for a pixel, in units of about six bytes


# The one list of what is read: of folders by the suffix, of any file by its first bytes.
FORMATS = (
    ImageFormat("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), rb"\xff\xd8\xff"),
    ImageFormat("PNG", (".png", ".apng"), rb"\x89PNG\r\n\x1a\n"),
    ImageFormat("WEBP", (".webp",), rb"RIFF.{4}WEBP", 3),
    ImageFormat("GIF", (".gif",), rb"GIF8[79]a"),
    ImageFormat("BMP", (".bmp", ".dib"), rb"BM"),
    ImageFormat("TIFF", (".tif", ".tiff"), rb"II[*+]\0|MM\0[*+]"),  # with "+" it is a BigTIFF
    ImageFormat("AVIF", (".avif",), rb".{4}ftyp(?:avi[fs]|m(?:if|sf)1.{4}(?:.{4})*?avi[fs])", 3),
    ImageFormat("HEIF", (".heic", ".heif", ".hif"), rb".{4}ftyp(?:he[iv][cxms]|m(?:if|sf)1)", 3),
    ImageFormat("PPM", (".ppm", ".pgm", ".pbm", ".pnm"), rb"P[1-6][\s#]"),
    ImageFormat("JPEG2000", (".jp2", ".jpx", ".j2k", ".j2c"), rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", 3),
    ImageFormat("NPY", (".npy",), rb"\x93NUMPY"),
    ImageFormat("NPZ", (".npz",), rb"PK\x03\x04"),
)
IMAGE_SUFFIXES = frozenset(suffix for each in FORMATS for suffix in each.suffixes)
ARRAY_SUFFIXES = (".npy", ".npz")  # which beside other images hold features, masks and the like
SNIFFED_BYTES = 32  # of a file, for `sniff`

MAX_PIXELS = 200_000_000  # about 1.2 GB in the decoder; a third of it in formats of weight 3
REDUCED_PIXELS = 50_000_000  # larger images are halved until they have no more
MAX_CHANNELS = 16
MAX_SIDE = 65_535  # pixels, the most that JPEG allows
_SCANNED = 10  # the scans of a JPEG may pass over this many times the pixels that an image may have
MAX_MEGAPIXELS = "COATNET_MAX_MEGAPIXELS"
_JPEG2000_PIECES = (
    5_000_000  # half a gigabyte in the decoder; an image of 64 megapixels in blocks of 8 x 8 has one million
)
_ZIP_ENTRIES = 100  # in an .npz, where one is usual
_EXIF_HEADERS = 16  # in a HEIF container, where one and that of a maker's note are usual
_STRIP_PIXELS = 4_000_000  # converted to RGB at once

# EXIF orientation: how to turn the stored pixels upright.
_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}
_pillow_limit_lock = threading.Lock()


class BadImage(UserError):
    """An image that cannot be used.

    Attributes:
        name: of the image, as `Dataset.describe` gives it.
        reason: a code, a colon and the details.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it can be pickled in a worker process
        self.name = name
        self.reason = reason

    @property
    def code(self) -> str:
        """One of empty, format, truncated, large, pixels, channels, corrupt, unreadable."""
        return self.reason.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Scale(NamedTuple):
    """How the values of images that are not 8-bit RGB become levels, 0 to 255 in single precision.

    Attributes:
        channels: that every image has.
        low: the value of level 0; NaN and infinity count as it.
        high: the value of level 255. What lies beyond either is not cut off.
    """

    channels: int
    low: float
    high: float

    def levels(self, values: NDArray) -> Tensor:
        """Values (..., H, W, C) of any type to levels float32 (..., C, H, W), channels last in memory."""
        single = values.astype(np.float32)
        if values.dtype.kind == "f":
            single[~np.isfinite(single)] = self.low
        single -= np.float32(self.low)
        single *= np.float32(255 / (self.high - self.low))
        return torch.from_numpy(single).movedim(-1, -3)

    def values(self, levels: Tensor) -> Tensor:
        """Levels to the values that they stand for."""
        return levels * ((self.high - self.low) / 255) + self.low


class Limits(NamedTuple):
    """What may be decoded of one image, and its name for errors."""

    name: str
    max_pixels: int
    max_side: int = MAX_SIDE
    reduces: bool = True  # whether images of more than `REDUCED_PIXELS` are halved

    def check(self, width: int, height: int, weight: int = 1, what: str = "") -> None:
        """Raise BadImage if so many pixels are too many."""
        most = self.max_pixels // weight
        if max(width, height) > self.max_side:
            raise BadImage(self.name, f"large: {what}{width} x {height} pixels, a side may have {self.max_side:,}")
        if width * height > most:
            needed = math.ceil(width * height * weight / 1e6)
            allows = f" (--max-megapixels {needed} or {MAX_MEGAPIXELS}={needed} admits it)"
            raise BadImage(self.name, f"large: {what}{width} x {height} pixels, it may have {most:,}{allows}")

    def check_scans(self, scans: int, pixels: int) -> None:
        """Raise BadImage if so many scans of a JPEG pass over too many pixels."""
        if scans * pixels > _SCANNED * self.max_pixels:
            raise BadImage(self.name, f"large: {scans:,} scans over {pixels:,} pixels would take too long to decode")

    def reduction(self, width: int, height: int) -> int:
        """The power of two by which both sides are divided, so that no more than `REDUCED_PIXELS` remain."""
        factor = 1
        while self.reduces and -(-width // factor) * -(-height // factor) > REDUCED_PIXELS:
            factor *= 2
        return factor


def sniff(start: bytes) -> ImageFormat | None:
    """The format of an image file by its first `SNIFFED_BYTES`; None if it is none that is read."""
    return next((each for each in FORMATS if re.match(each.start, start[:SNIFFED_BYTES], re.DOTALL)), None)


def decode(
    data: bytes, name: str, *, max_pixels: int | None = None, max_side: int = MAX_SIDE, reduces: bool = True
) -> Tensor:
    """Decode an image file.

    It is turned upright as its EXIF data says; transparent parts become white; of an animation the first frame is
    taken; 16-bit values are scaled to 8 bits. An image of more than 50 million pixels is halved until it has no more.

    Args:
        data: the bytes of the file.
        name: of the image, for errors.
        max_pixels: the most pixels that are decoded, a third of it in WebP, AVIF, HEIC and JPEG 2000, whose decoders
            take three times the memory; by default 200 million, or what COATNET_MAX_MEGAPIXELS says.
        max_side: the longest side that is decoded, in pixels.
        reduces: whether large images are halved.

    Returns:
        uint8 RGB (3, H, W), channels last in memory.

    Raises:
        BadImage: the format is none of `FORMATS` or needs a package, the image exceeds the limits, the data is
            truncated or corrupt, or the values have no agreed white (floating point, 32-bit integers).
    """
    kind, limits = format_of(data, name), Limits(name, max_pixels or allowed_pixels(), max_side, reduces)
    if kind.name in ("NPY", "NPZ"):
        raise BadImage(name, "format: a NumPy file is not decoded, its values are read (coatnet.data.channels)")
    pixels = _decode_jpeg(data, limits) if kind.name == "JPEG" else _decode_with_pillow(data, kind, limits)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def allowed_pixels() -> int:
    """The most pixels of an image, 200 million or what COATNET_MAX_MEGAPIXELS says, which worker processes inherit.

    Raises UserError if that is not a number of megapixels.
    """
    text = os.environ.get(MAX_MEGAPIXELS)
    if not text:
        return MAX_PIXELS
    try:
        megapixels = float(text)
    except ValueError:
        megapixels = math.nan
    if not 0 < megapixels < 1e6:
        raise UserError(f"{MAX_MEGAPIXELS} is {text!r:.40}; it is a number of megapixels, such as 400")
    return int(1e6 * megapixels)


def pixels_of(image: Image.Image, name: str) -> Tensor:
    """The pixels of an image that Pillow has opened or made, by the rules of `decode`: uint8 RGB (3, H, W).

    Raises BadImage as `decode` does.
    """
    limits = Limits(name, allowed_pixels())
    with warnings.catch_warnings(action="ignore"):
        limits.check(*image.size)
        if 0 in image.size:
            raise BadImage(name, f"empty: {image.width} x {image.height} pixels")
        try:
            image.load()
            pixels = turned(_to_rgb(image, limits), orientation_of(image))
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(name, f"corrupt: {reason_of(error)}") from error
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) in pixels from the header, before turning upright. Raises BadImage as `decode` does."""
    return _header(data, format_of(data, name), name)


def decoding_pixels(data: bytes, name: str, scale: Scale | None = None) -> int:
    """The pixels of an image by its header, as many times as they take the memory of 8-bit RGB: three times in formats
    whose decoder takes so much, by channels and bits where there are more, and as levels for a model with a scale.

    Raises BadImage as `decode` does.
    """
    kind = format_of(data, name)
    levels = 1 if scale is None else weight_of(min(4, scale.channels), 4)  # what Pillow decodes to has no more
    return math.prod(_header(data, kind, name)) * max(kind.weight, _weight(data, kind, name), levels)


def jpeg_warning(data: object) -> str:
    """The warning of the JPEG library about an image that it decodes nevertheless, such as flipped bytes, or ""."""
    import simplejpeg

    if isinstance(data, bytes) and data.startswith(b"\xff\xd8\xff") and _suits_simplejpeg(read_jpeg_header(data)):
        try:
            simplejpeg.decode_jpeg(data)
        except ValueError as error:
            return reason_of(error)
    return ""


def format_of(data: bytes, name: str) -> ImageFormat:
    if not data:
        raise BadImage(name, "empty: the file has 0 bytes")
    if kind := sniff(data):
        return kind
    known = ", ".join(each.name for each in FORMATS)
    raise BadImage(name, f"format: not one of {known}; it begins with {str(data[:8])[1:]}")


def _header(data: bytes, kind: ImageFormat, name: str) -> tuple[int, int]:
    """(height, width) before turning upright."""
    if kind.name == "JPEG":
        if header := read_jpeg_header(data):
            return header.height, header.width
        raise BadImage(name, f"corrupt: its JPEG header cannot be read in {len(data):,} bytes")
    if kind.name == "WEBP":
        return _webp(data, name).canvas
    if kind.name in ("NPY", "NPZ"):
        return array_layout(array_header(data, kind, name).shape, None)[:2]
    if kind.name == "TIFF":
        check_tiff(data, Limits(name, 2**63, 2**63))
        directory = read_directory(data)
        if is_deep_tiff(directory):  # Pillow opens few of them
            return directory.numbers.get(257, 0), directory.numbers.get(256, 0)
    with warnings.catch_warnings(action="ignore"), above_pillows_limit(), open_with_pillow(data, kind, name) as image:
        return image.height, image.width


def array_header(data: bytes, kind: ImageFormat, name: str) -> NpyHeader:
    """The header of a NumPy file, of an .npz that of its array, with two or three axes.

    Raises BadImage if it cannot be read.
    """
    start = data
    try:
        if kind.name == "NPZ":
            with open_zipped_array(data, name) as file:
                start = file.read(2**16)
        header = read_npy_header(start)
        array_layout(header.shape, None)
        return header
    except BadImage:
        raise
    except Exception as error:  # of zipfile almost anything
        raise BadImage(name, f"corrupt: no NumPy header can be read in {len(data):,} bytes") from error


def open_zipped_array(data: bytes, name: str) -> IO[bytes]:
    """The array of an .npz, opened for reading.

    Raises BadImage if there is not one array, or its compression is not one of NumPy's; of zipfile almost anything.
    """
    if (entries := data.count(b"PK\1\2")) > _ZIP_ENTRIES:  # zipfile takes half a kilobyte for each
        raise BadImage(name, f"corrupt: {entries:,} entries in the .npz; an image is one array")
    archive = zipfile.ZipFile(io.BytesIO(data))
    arrays = [each for each in archive.infolist() if each.filename.endswith(".npy")]
    if len(arrays) != 1:
        raise BadImage(name, f"corrupt: {len(arrays)} arrays in the .npz; an image is one")
    if arrays[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile unpacks others unbounded
        raise BadImage(name, f"format: compression {arrays[0].compress_type} of an .npz is not read; deflate is")
    return archive.open(arrays[0])


def weight_of(channels: int, item_bytes: int) -> int:
    """Memory for a pixel: its values and as many in single precision, in the units of `Limits`, of six bytes."""
    return max(1, math.ceil(channels * (item_bytes + 4) / 6))


def _weight(data: bytes, kind: ImageFormat, name: str) -> int:
    """How many times a pixel of a TIFF or NumPy file takes the memory of 8-bit RGB; 1 if that is unknown."""
    with suppress(*HEADER_ERRORS):
        if kind.name == "TIFF" and is_deep_tiff(directory := read_directory(data)):
            return weight_of(min(MAX_CHANNELS, directory.numbers.get(277, 1)), min(8, -(-directory.bits // 8)))
        if kind.name in ("NPY", "NPZ"):
            header = array_header(data, kind, name)
            return weight_of(min(MAX_CHANNELS, array_layout(header.shape, None)[2]), header.dtype.itemsize)
    return 1


# JPEG


def _decode_jpeg(data: bytes, limits: Limits) -> Pixels:
    header = read_jpeg_header(data)
    if header:
        limits.check(header.width, header.height)
        if header.several_scans:
            limits.check_scans(data.count(b"\xff\xda", header.scan), header.width * header.height)
    if not has_end_marker(data, header):
        raise BadImage(limits.name, f"truncated: no end-of-image marker in {len(data):,} bytes")
    if header is None:
        raise BadImage(limits.name, f"corrupt: its JPEG header cannot be read in {len(data):,} bytes")
    pixels = _decode_with_simplejpeg(data, header, limits)
    if pixels is None:
        pixels = _decode_with_pillow(jpeg_without_metadata(data), FORMATS[0], limits)
    return turned(pixels, header.turn)


def _suits_simplejpeg(header: JpegHeader | None) -> bool:
    """Whether simplejpeg supports the kind of JPEG: one or three components, of 8 bits."""
    return header is not None and header.bits == 8 and header.components in (1, 3)


def _decode_with_simplejpeg(data: bytes, header: JpegHeader, limits: Limits) -> Pixels | None:
    """None if simplejpeg does not support the kind of JPEG or rejects it: then Pillow decides."""
    if not _suits_simplejpeg(header):
        return None
    import simplejpeg

    factor = limits.reduction(header.width, header.height)
    height, width = (header.height // factor, header.width // factor) if factor > 1 else (0, 0)  # 0: as they are
    try:
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
    except ValueError:
        return None


# Everything else


def _decode_with_pillow(data: bytes, kind: ImageFormat, limits: Limits) -> Pixels:
    try:
        return _attempt(data, kind, limits)
    except Image.DecompressionBombError:  # above Pillow's limit, which is that of the process; ours is checked anyway
        with above_pillows_limit():
            return _attempt(data, kind, limits)
    except BadImage as error:
        # Pillow refuses a PNG with more than 1 MB of text or color profile; neither is needed.
        if kind.name == "PNG" and error.code == "corrupt" and len(bare := png_without_metadata(data)) < len(data):
            return _attempt(bare, kind, limits)
        raise


@contextmanager
def above_pillows_limit() -> Iterator[None]:
    """Images of any size can be opened in the block, by one thread at a time."""
    with _pillow_limit_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _attempt(data: bytes, kind: ImageFormat, limits: Limits) -> Pixels:
    webp = None
    if kind.name == "WEBP":
        webp = _webp(data, limits.name)
        height, width = webp.canvas
        limits.check(width, height, kind.weight)
        data = webp.first_frame
    elif kind.name == "TIFF":
        samples = check_tiff(data, limits).numbers.get(277, 1)
        if samples > 4:
            takes = f"a model that was trained with --channels {samples} takes it"
            raise BadImage(limits.name, f"pixels: it has {samples} channels, where RGB is read: {takes}")
    elif kind.name == "JPEG2000" and (pieces := count_jpeg2000_pieces(data)) > _JPEG2000_PIECES:
        raise BadImage(limits.name, f"large: {pieces:,} precincts and code blocks would take too long to decode")
    # Pillow warns about odd metadata, and about sizes, which are checked here.
    with warnings.catch_warnings(action="ignore"), open_with_pillow(data, kind, limits.name) as image:
        limits.check(*image.size, kind.weight)
        try:
            if kind.name == "JPEG" and (factor := limits.reduction(*image.size)) > 1:
                image.draft(None, (image.width // factor, image.height // factor))
            image.load()
            if webp:
                page = _on_canvas(webp, _to_rgb(image, limits), limits)
                return turned(page, orientation(webp.exif, webp.xmp))
            return turned(_to_rgb(image, limits), orientation_of(image))
        except (BadImage, Image.DecompressionBombError):
            raise
        except MemoryError as error:
            raise BadImage(limits.name, f"large: no memory for {image.width} x {image.height} pixels") from error
        except Exception as error:  # parsers of untrusted bytes raise almost anything
            code = "truncated" if "truncated" in str(error) else "corrupt"
            raise BadImage(limits.name, f"{code}: {reason_of(error)}") from error


def open_with_pillow(data: bytes, kind: ImageFormat, name: str) -> Image.Image:
    """Read the header only. Naming the format keeps all other parsers of Pillow from running."""
    if kind.name == "AVIF" and not features.check("avif"):
        raise BadImage(name, "format: AVIF is read by Pillow 11.3 or later: pip install --upgrade pillow")
    if kind.name in ("AVIF", "HEIF"):
        _check_exif(data, name)
    open_heif: Any = _heif_opener(name) if kind.name == "HEIF" else None
    try:
        return open_heif(io.BytesIO(data)) if open_heif else Image.open(io.BytesIO(data), formats=(kind.name,))
    except Image.DecompressionBombError:
        raise
    except Exception as error:
        raise BadImage(name, f"corrupt: its {kind.name} header cannot be read in {len(data):,} bytes") from error


def _heif_opener(name: str) -> Any:
    """Opens HEIC without changing what Pillow opens elsewhere in this process."""
    try:
        from pi_heif import HeifImageFile  # pyrefly: ignore[missing-import]
    except ImportError:
        try:
            from pillow_heif import HeifImageFile  # pyrefly: ignore[missing-import]
        except ImportError:
            raise BadImage(name, "format: HEIC is read with another package: pip install 'coatnet[heic]'") from None
    return HeifImageFile


def _to_rgb(image: Image.Image, limits: Limits) -> Pixels:
    """A loaded image to RGB (H, W, 3), in strips, so that little memory is needed beside the decoder's."""
    if image.mode in ("F", "LAB") or (image.mode == "I" and image.format != "PPM"):
        held = {"F": "floating-point", "I": "32-bit"}.get(image.mode, image.mode)
        raise BadImage(limits.name, f"pixels: {held} values have no agreed white; save it with 8 or 16 bits")
    if image.width * image.height <= _STRIP_PIXELS:
        return np.array(_strip_to_rgb(image))
    factor = limits.reduction(*image.size)
    rows = max(1, _STRIP_PIXELS // image.width // factor) * factor
    pixels = np.empty((-(-image.height // factor), -(-image.width // factor), 3), np.uint8)
    for top in range(0, image.height, rows):
        strip = _strip_to_rgb(image.crop((0, top, image.width, min(top + rows, image.height))))
        pixels[top // factor : (top + rows) // factor] = np.asarray(strip.reduce(factor) if factor > 1 else strip)
    return pixels


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits
        # Pillow's own conversion clips to white; dividing by 257 maps 65,535 to 255.
        wide = np.asarray(image).astype(np.uint32)
        gray = ((wide + 128) // 257).astype(np.uint8)
        gray[wide == image.info.get("transparency", -1)] = 255
        return Image.fromarray(gray).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image)
        image = page
    return image.convert("RGB")


def turned(pixels: Pixels, orientation: int) -> Pixels:
    return _TURNS[orientation](pixels) if orientation in _TURNS else pixels


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image, found where Pillow's `getexif` finds it."""
    info = image.info
    exif, raw, xmp = info.get("exif") or b"", info.get("Raw profile type exif"), info.get("xmp") or b""  # None of HEIC
    if image.format == "TIFF":  # turned by Pillow already
        return 1
    if not exif and isinstance(raw, str):
        try:
            exif = bytes.fromhex("".join(raw.split("\n")[3:]))
        except ValueError:
            exif = b""
    if isinstance(text := info.get("XML:com.adobe.xmp"), str):
        xmp = text.encode("utf-8", "replace")
    return orientation(exif, xmp)


def _check_exif(data: bytes, name: str) -> None:
    """Raise BadImage if EXIF tags name far more than the file, all of which Pillow copies as it opens AVIF and HEIC."""
    for number, found in enumerate(re.finditer(rb"II\*\0|MM\0\*", data)):
        num_bytes = 0
        with suppress(*HEADER_ERRORS):
            num_bytes = read_directory(data[found.start() :]).num_bytes
        if number == _EXIF_HEADERS or num_bytes > 4 * len(data) + 2**20:
            raise BadImage(name, f"corrupt: EXIF tags name more than the {len(data):,} bytes of the file")


def is_deep_tiff(directory: Directory) -> bool:
    """Whether Pillow would lose bits or channels: it keeps one channel of any depth, and 3 or 4 of 8 bits."""
    samples = directory.numbers.get(277, 1)
    return samples != 1 and (samples not in (3, 4) or directory.bits != 8)


def check_tiff(data: bytes, limits: Limits) -> Directory:
    """The first directory. Raises BadImage if tags, tiles, strips or the scans within them would take far more than
    the image."""
    try:
        directory = read_directory(data)
    except HEADER_ERRORS:
        raise BadImage(limits.name, f"corrupt: its TIFF header cannot be read in {len(data):,} bytes") from None
    numbers, num_bytes = directory.numbers, directory.num_bytes
    for tag in TIFF_EXIF & set(numbers):
        with suppress(*HEADER_ERRORS):
            num_bytes += read_directory(data, numbers[tag]).num_bytes
    if num_bytes > 4 * len(data) + 2**20:  # Pillow copies the bytes of each tag, which may be the same ones
        raise BadImage(limits.name, f"corrupt: TIFF tags name {num_bytes:,} bytes in a file of {len(data):,}")
    width, height, rows = (max(0, numbers.get(tag, 0)) for tag in (256, 257, 278))
    tile_width, tile_height = (max(0, numbers.get(tag, 0)) for tag in (322, 323))
    limits.check(width, height)
    if tile_width and tile_height:
        limits.check(-(-width // tile_width) * tile_width, -(-height // tile_height) * tile_height, what="tiles of ")
    if numbers.get(259) in (6, 7) and isinstance(data, bytes):  # JPEG; each scan passes over one tile or strip
        segment = tile_width * tile_height or width * min(rows or height, height)
        limits.check_scans(data.count(b"\xff\xda"), segment)
    return directory


def _webp(data: bytes, name: str) -> Webp:
    try:
        return read_webp(data)
    except HEADER_ERRORS:
        raise BadImage(name, f"corrupt: its WEBP header cannot be read in {len(data):,} bytes") from None


def _on_canvas(webp: Webp, frame: Pixels, limits: Limits) -> Pixels:
    """The pixels of the first frame of an animation on a white canvas."""
    if webp.corner is None:
        return frame
    (height, width), (top, left) = webp.canvas, webp.corner
    page = np.full((height, width, 3), 255, np.uint8)
    page[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
    factor = limits.reduction(width, height)
    return page if factor == 1 else np.array(Image.fromarray(page).reduce(factor))
