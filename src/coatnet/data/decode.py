"""Decode image files to RGB pixels: few formats, sizes checked before memory is allocated, one kind of error.

JPEGs of one or three components are decoded by simplejpeg, which gives the pixels of Pillow in three quarters of the
time; everything else, and what simplejpeg rejects, by Pillow with the list of formats. Color profiles (ICC) are not
applied. The frame header of a JPEG is read here without decoding (ITU-T T.81, annex B).
"""

import io
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from coatnet.errors import UserError

MAX_PIXELS = 50_000_000
MAX_SIDE = 30_000
Pixels = NDArray[np.uint8]  # (H, W, 3)

_MAGIC = (
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("WEBP", 8, b"WEBP"),
    ("GIF", 0, b"GIF87a"),
    ("GIF", 0, b"GIF89a"),
    ("BMP", 0, b"BM"),
    ("TIFF", 0, b"II*\0"),
    ("TIFF", 0, b"MM\0*"),
)
_ORIENTATION_TAG = 0x0112
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


_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 without DHT, JPG and DAC
_JPEG_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}  # TEM, RST0 to RST7, SOI
_JPEG_SCAN = 0xDA
_JPEG_APP1 = 0xE1
_JPEG_EXIF = b"Exif\0\0"
_JPEG_END = b"\xff\xd9"


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
        """One of empty, format, truncated, large, pixels, corrupt, unreadable."""
        return self.reason.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class JpegHeader(NamedTuple):
    bits: int
    height: int
    width: int
    components: int
    scan: int  # byte offset of the first scan
    exif: bytes  # the first Exif segment, from its "Exif" on; empty if there is none


def decode(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE) -> Tensor:
    """Decode an image file.

    It is turned upright as its EXIF data says; transparent parts become white; of an animation the first frame is
    taken; 16-bit values are scaled to 8 bits.

    Args:
        data: the bytes of the file.
        name: of the image, for errors.
        max_pixels: the most pixels that are decoded.
        max_side: the longest side that is decoded, in pixels.

    Returns:
        uint8 RGB (3, H, W), channels last in memory.

    Raises:
        BadImage: the format is not JPEG, PNG, WebP, GIF, BMP or TIFF, the image exceeds the limits, the data is
            truncated or corrupt, or the values have no agreed white (floating point, 32-bit integers).
    """
    kind = _sniff(data, name)
    if kind == "JPEG":
        header = read_jpeg_header(data)
        if header:
            _check_size(header.width, header.height, name, max_pixels, max_side)
        if not has_end_marker(data, header):
            raise BadImage(name, f"truncated: no end-of-image marker in {len(data):,} bytes")
        if header and (pixels := _decode_with_simplejpeg(data, header)) is not None:
            return _as_tensor(pixels)
    return _as_tensor(_decode_with_pillow(data, kind, name, max_pixels, max_side))


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) in pixels from the header, before turning upright. Raises BadImage as `decode` does."""
    kind = _sniff(data, name)
    if kind == "JPEG" and (header := read_jpeg_header(data)):
        return header.height, header.width
    with warnings.catch_warnings(action="ignore"):
        width, height = _open(data, kind, name).size
    return height, width


def jpeg_warning(data: object) -> str:
    """The warning of the JPEG library about an image that it decodes nevertheless, such as flipped bytes, or ""."""
    import simplejpeg

    if isinstance(data, bytes) and data.startswith(b"\xff\xd8\xff"):
        try:
            simplejpeg.decode_jpeg(data)
        except ValueError as error:
            return _one_line(error)
    return ""


def _sniff(data: bytes, name: str) -> str:
    if not data:
        raise BadImage(name, "empty: the file has 0 bytes")
    for kind, offset, magic in _MAGIC:
        if data[offset : offset + len(magic)] == magic and (kind != "WEBP" or data[:4] == b"RIFF"):
            return kind
    raise BadImage(name, f"format: not a JPEG, PNG, WebP, GIF, BMP or TIFF; it begins with {data[:8]!r}")


def _check_size(width: int, height: int, name: str, max_pixels: int, max_side: int) -> None:
    if max(width, height) > max_side:
        raise BadImage(name, f"large: {width} x {height} pixels, a side may have {max_side:,}")
    if width * height > max_pixels:
        raise BadImage(name, f"large: {width} x {height} pixels, an image may have {max_pixels:,}")


def _decode_with_simplejpeg(data: bytes, header: JpegHeader) -> Pixels | None:
    """None if simplejpeg does not support the kind of JPEG or rejects it: then Pillow decides."""
    if header.bits != 8 or header.components not in (1, 3):
        return None
    import simplejpeg

    try:
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return pixels if not header.exif else _upright(pixels, lambda: _loaded(header.exif))


def _decode_with_pillow(data: bytes, kind: str, name: str, max_pixels: int, max_side: int) -> Pixels:
    # Pillow warns about odd metadata, and about sizes, which are checked here.
    with warnings.catch_warnings(action="ignore"):
        image = _open(data, kind, name)
        _check_size(*image.size, name, max_pixels, max_side)
        try:
            image.load()
            return _upright(np.array(_to_rgb(image, name)), image.getexif)
        except BadImage:
            raise
        except Exception as error:  # parsers of untrusted bytes raise almost anything
            code = "truncated" if "truncated" in str(error) else "corrupt"
            raise BadImage(name, f"{code}: {_one_line(error)}") from error


def _open(data: bytes, kind: str, name: str) -> Image.Image:
    """Read the header only. Naming the format keeps all other parsers of Pillow from running."""
    try:
        return Image.open(io.BytesIO(data), formats=(kind,))
    except Image.DecompressionBombError as error:
        raise BadImage(name, f"large: {_one_line(error)}") from error
    except Exception as error:
        raise BadImage(name, f"corrupt: its {kind} header cannot be read in {len(data):,} bytes") from error


def _upright(pixels: Pixels, read_exif: Callable[[], Image.Exif]) -> Pixels:
    try:
        turn = _TURNS.get(read_exif().get(_ORIENTATION_TAG, 1))
    except Exception:  # an image with broken EXIF data is used as it is
        turn = None
    return pixels if turn is None else turn(pixels)


def _loaded(segment: bytes) -> Image.Exif:
    exif = Image.Exif()
    with warnings.catch_warnings(action="ignore"):
        exif.load(segment)
    return exif


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips to white; dividing by 257 maps 65,535 to 255.
        wide = np.array(image).astype(np.uint16)
        return Image.fromarray(((wide + np.uint32(128)) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        held = "floating-point" if image.mode == "F" else "32-bit"
        raise BadImage(name, f"pixels: {held} values have no agreed white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image)
        image = page
    return image.convert("RGB")


def _as_tensor(pixels: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the frame header; None if the segments do not lead to a scan, so the file is truncated or corrupt."""
    frame, exif = None, b""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker in _JPEG_WITHOUT_LENGTH:
            position += 2
        elif marker == _JPEG_SCAN:
            return JpegHeader(*frame, position, exif) if frame and all(frame) else None
        else:
            if marker in _JPEG_FRAMES and position + 10 <= len(data):
                bits, components = data[position + 4], data[position + 9]
                height = int.from_bytes(data[position + 5 : position + 7], "big")
                width = int.from_bytes(data[position + 7 : position + 9], "big")
                frame = (bits, height, width, components)
            end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            if marker == _JPEG_APP1 and not exif and data.startswith(_JPEG_EXIF, position + 4):
                exif = data[position + 4 : end]
            position = end
    return None


def has_end_marker(data: bytes, header: JpegHeader | None) -> bool:
    """Whether the scans end. Some decoders add a missing marker, and grey pixels for missing data."""
    return data.rfind(_JPEG_END, header.scan if header else 0) >= 0  # searched from the end, where it usually is
