"""Images and metadata of hostile sizes are accepted or refused in bounded memory and time."""

import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageCms

from coatnet.data.decode import BadImage, decode


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *, bits: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand: the header may say anything."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + extra
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


# A8: sizes


@pytest.fixture
def memory_growth():
    """Bytes of resident memory that a call needs at its peak, beyond what there was."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux to measure a peak of memory")

    def measure(call) -> int:
        def status(field: str) -> int:
            return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = status("VmRSS")
        call()
        return status("VmHWM") - before

    return measure


def gif_header(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    return screen + b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0" + b"\x02\x02\x44\x01\0;"


def webp_header(width: int, height: int) -> bytes:
    """Lossless, as small as its header: the encoder would need the memory that the decoder must not take."""
    bits = struct.pack("<I", (width - 1) | (height - 1) << 14)
    body = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + bits + b"\0"
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


BOMBS = {
    "png of 65,000 x 65,000": png(65_000, 65_000, bits=8, color=2, rows=b"\0" * 10_000),
    "png of 15,000 x 15,000": png(15_000, 15_000, bits=1, color=0, rows=b"\0" * (1876 * 15_000)),
    "gif of 65,000 x 65,000": gif_header(65_000, 65_000),
    "gif of 15,000 x 15,000": gif_header(15_000, 15_000),
    "webp of 16,000 x 16,000": webp_header(16_000, 16_000),
    "side of 65,536": png(65_536, 1, bits=8, color=0, rows=b"\0" * 65_537),
    "bmp of 20,000 x 20,000": b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, 20_000, 20_000, 1, 24, *[0] * 6),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_decompression_bombs_are_refused_by_their_header_before_memory_is_allocated(bomb, memory_growth, refused):
    decode(png(1, 1, bits=8, color=0, rows=b"\0\0"), "first use")
    growth = memory_growth(lambda: refused(BOMBS[bomb], "large"))
    assert growth < 50e6


def test_jpeg_bomb_is_refused_by_its_header(photo, encode, refused):
    data = bytearray(encode(photo, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    refused(bytes(data), "large")


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (1, 30_000)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_tiny_and_thin_images_are_accepted(encode, height, width, kind, distance):
    image = np.full((height, width, 3), 77, dtype=np.uint8)
    assert distance(decode(encode(image, kind), "thin"), image) < 2


def test_limits_can_be_set(photo, encode, refused):
    refused(encode(photo), "large", max_pixels=40 * 60 - 1)
    refused(encode(photo, "JPEG"), "large", max_side=59)
    assert decode(encode(photo), "fits", max_pixels=40 * 60, max_side=60).shape == (3, 40, 60)


# A10: metadata


def test_color_profile_is_tolerated(photo, encode, distance):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        assert distance(decode(encode(photo, kind, icc_profile=profile, quality=95), "icc"), photo) < 4


def test_huge_exif_and_xmp_are_tolerated_in_bounded_time(photo, encode, distance):
    data = encode(photo, "JPEG", quality=95)
    segment = b"\xff\xe1" + struct.pack(">H", 65_535) + b"http://ns.adobe.com/xap/1.0/\0" + b"x" * (65_533 - 29)
    exif = b"\xff\xe1" + struct.pack(">H", 65_535) + b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * (65_533 - 16)
    started = time.perf_counter()
    assert distance(decode(data[:2] + exif + segment * 200 + data[2:], "metadata"), photo) < 2
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("compressed", [False, True])
def test_100_000_text_chunks_are_decoded_or_refused_in_bounded_time_and_memory(compressed, memory_growth):
    if compressed:  # 100 kB each once inflated
        chunk = png_chunk(b"zTXt", b"key\0\0" + zlib.compress(b"x" * 100_000))
    else:
        chunk = png_chunk(b"tEXt", b"key\0" + b"x" * 20)
    data = png(1, 1, bits=8, color=0, rows=b"\0\0", extra=chunk * 100_000)

    def attempt() -> None:
        try:
            assert decode(data, "chatty").shape == (3, 1, 1)
        except BadImage as error:
            assert error.code in ("corrupt", "large")

    started = time.perf_counter()
    growth = memory_growth(attempt)
    assert time.perf_counter() - started < 20
    assert growth < 200e6
