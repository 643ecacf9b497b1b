"""Encoded bytes to RGB pixels: few formats, sizes checked before memory is spent, one kind of error.

JPEGs of one or three components go through torchcodec, which is right on them and about twice as fast as
Pillow; everything else goes through Pillow, restricted to the list of formats. Colour profiles (ICC) are not
applied.
"""

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coatnet.data.jpeg import JpegHeader, has_end_marker, read_jpeg_header
from coatnet.errors import UserError

MAX_PIXELS = 50_000_000
MAX_SIDE = 30_000

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
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(UserError):
    """A picture that cannot be used: `name` says which, `reason` is a short code, a colon and the details."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it survives the way out of a worker process
        self.name = name
        self.reason = reason

    @property
    def code(self) -> str:
        """empty, format, truncated, large, pixels, corrupt or unreadable."""
        return self.reason.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE) -> Tensor:
    """The picture in `data` as uint8 RGB (3, H, W): EXIF turned, alpha on white, first frame, 16 bit scaled.

    Raises `BadImage`, bearing `name`, if the format is not on the list, the picture exceeds the limits, or
    the data is cut off, corrupt, or of a kind without an agreed white (float, 32-bit integers).
    """
    kind = _sniff(data, name)
    if kind == "JPEG":
        header = read_jpeg_header(data)
        if header:
            _check_size(header.width, header.height, name, max_pixels, max_side)
        if not has_end_marker(data, header):
            raise BadImage(name, f"truncated: no end-of-image marker in {len(data):,} bytes")
        if header and (pixels := _decode_with_torchcodec(data, header)) is not None:
            return pixels
    return _decode_with_pillow(data, kind, name, max_pixels, max_side)


def picture_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) as the header says, before any EXIF turn; raises `BadImage` as `decode` does."""
    kind = _sniff(data, name)
    if kind == "JPEG" and (header := read_jpeg_header(data)):
        return header.height, header.width
    with warnings.catch_warnings(action="ignore"):
        width, height = _open(data, kind, name).size
    return height, width


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
        raise BadImage(name, f"large: {width} x {height} pixels, a picture may have {max_pixels:,}")


def _decode_with_torchcodec(data: bytes, header: JpegHeader) -> Tensor | None:
    """None where torchcodec is not trusted, or fails: then Pillow has the last word."""
    if header.bits != 8 or header.components not in (1, 3):
        return None
    from torchcodec.decoders import decode_jpeg

    try:
        pixels = decode_jpeg(data, mode="RGB")
    except RuntimeError:
        return None
    assert isinstance(pixels, Tensor)
    return pixels


def _decode_with_pillow(data: bytes, kind: str, name: str, max_pixels: int, max_side: int) -> Tensor:
    # Pillow warns of odd metadata, and of sizes that are checked here; neither is news to anyone.
    with warnings.catch_warnings(action="ignore"):
        image = _open(data, kind, name)
        _check_size(*image.size, name, max_pixels, max_side)
        try:
            image.load()
            pixels = np.array(_to_rgb(_upright(image), name))
        except BadImage:
            raise
        except Exception as error:  # parsers of hostile bytes raise nearly anything
            code = "truncated" if "truncated" in str(error) else "corrupt"
            raise BadImage(name, f"{code}: {_one_line(error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open(data: bytes, kind: str, name: str) -> Image.Image:
    """Read the header only. Naming the one format keeps every other parser of Pillow out of reach."""
    try:
        return Image.open(io.BytesIO(data), formats=(kind,))
    except Image.DecompressionBombError as error:
        raise BadImage(name, f"large: {_one_line(error)}") from error
    except Exception as error:
        raise BadImage(name, f"corrupt: its {kind} header cannot be read in {len(data):,} bytes") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a picture with broken EXIF data is still a picture
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips to white; 257 takes 65,535 to 255.
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
