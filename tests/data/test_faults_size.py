"""Images and metadata of hostile sizes are accepted or refused in bounded memory and time."""

import re
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, features

from coatnet.data import decode as decoding
from coatnet.data.decode import BadImage, decode
from coatnet.errors import UserError


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


@pytest.mark.parametrize("kind", ["text", "profile"])
def test_a_png_with_more_than_a_megabyte_of_metadata_is_decoded(photo, encode, kind, distance):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "x" * 1_100_000, zip=True)
    options = {"pnginfo": text} if kind == "text" else {"icc_profile": bytes(1_100_000)}
    assert distance(decode(encode(photo, **options), "metadata"), photo) == 0


def test_tags_that_name_the_same_bytes_are_not_copied(photo, encode, memory_growth, refused, distance):
    """5,000 EXIF or TIFF tags of 60,000 bytes each, at the same place of the file."""
    count = 5000
    entries = b"".join(struct.pack("<HHII", 1000 + number, 1, 60_000, 8) for number in range(count))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries
    decode(encode(photo), "first use")
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(photo, kind, quality=95, lossless=True, exif=b"Exif\0\0" + exif)
        found = []
        assert memory_growth(lambda data=data, found=found: found.append(distance(decode(data, "tags"), photo))) < 20e6
        assert found[0] < 4
    refused(exif + b"\0" * 60_000, "corrupt")


@pytest.mark.skipif(not features.check("avif"), reason="AVIF needs Pillow 11.3")
def test_exif_tags_of_avif_that_name_the_same_bytes_are_refused_before_pillow_copies_them(
    photo, encode, memory_growth, refused
):
    size = 100_000
    tag = struct.pack("<HHII", 1000, 7, size, 26)
    data = encode(photo, "AVIF", exif=b"II*\0\x08\0\0\0\x01\0" + tag + bytes(4) + b"x" * size)
    start = data.index(b"II*\0")
    count = 3000
    directory = b"II*\0\x08\0\0\0" + struct.pack("<H", count) + struct.pack("<HHII", 1001, 7, 60_000, 8) * count
    bomb = data[:start] + directory + data[start + len(directory) :]
    decode(data, "first use")
    assert memory_growth(lambda: refused(bomb, "corrupt")) < 20e6
    refused(data + b"II*\0" * 17, "corrupt")
    beyond = data[: start + 14] + struct.pack("<I", 2 * size) + data[start + 18 :]  # a length that Pillow warns about
    with warnings.catch_warnings(action="error"):
        assert decoding.image_size(beyond, "beyond") == photo.shape[:2]


# Large images: read where they are valid, refused before the work where they ask for too much


def test_an_image_above_50_megapixels_is_decoded_at_half_its_size(encode, memory_growth):
    data = encode(Image.new("1", (9504, 6336), 1))
    sizes = []
    growth = memory_growth(lambda: sizes.append(decode(data, "large").shape))
    assert sizes == [(3, 3168, 4752)] and growth < 250e6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK"])
def test_reduced_images_are_the_mean_of_their_pixels(photo, encode, kind, mode, monkeypatch, distance):
    image = Image.fromarray(np.tile(photo, (2, 2, 1))).convert(mode)
    if (kind, mode) in {("JPEG", "RGBA"), ("GIF", "CMYK"), ("PNG", "CMYK"), ("WEBP", "CMYK"), ("BMP", "CMYK")}:
        image = image.convert("RGB")
    whole = decode(encode(image, kind, quality=95, lossless=True), "whole").permute(1, 2, 0).numpy()
    monkeypatch.setattr(decoding, "REDUCED_PIXELS", 80 * 120 // 5)
    monkeypatch.setattr(decoding, "_STRIP_PIXELS", 120 * 8)
    halved = np.asarray(Image.fromarray(whole).reduce(4))
    pixels = decode(encode(image, kind, quality=95, lossless=True), "reduced")
    assert distance(pixels, halved) < (4 if kind == "JPEG" else 0.01)


def test_the_variable_admits_larger_images_and_must_be_a_number(photo, encode, refused, monkeypatch):
    monkeypatch.setenv("COATNET_MAX_MEGAPIXELS", "0.002")
    reason = refused(encode(photo), "large").reason
    assert (
        reason == "large: 60 x 40 pixels, it may have 2,000 (--max-megapixels 1 or COATNET_MAX_MEGAPIXELS=1 admits it)"
    )
    monkeypatch.setenv("COATNET_MAX_MEGAPIXELS", "0.0024")
    decode(encode(photo), "fits")
    refused(encode(photo, "WEBP"), "large")  # its decoder takes three times the memory
    monkeypatch.setenv("COATNET_MAX_MEGAPIXELS", "many")
    with pytest.raises(UserError, match="COATNET_MAX_MEGAPIXELS is 'many'; it is a number of megapixels, such as 400"):
        decode(encode(photo), "photo")


def test_images_above_pillows_own_limit_are_decoded_and_the_limit_stays(photo, encode, monkeypatch, distance):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind in ("PNG", "WEBP", "GIF", "TIFF"):
        assert distance(decode(encode(photo, kind, lossless=True), "large"), photo) < 5
    assert Image.MAX_IMAGE_PIXELS == 1000


def tiff(tags: dict[int, int], data: bytes) -> bytes:
    """A TIFF written by hand, with the data behind its one directory."""
    start = 8 + 2 + 12 * len(tags) + 4
    entries = [
        struct.pack("<HHII", tag, 4, 1, start if value is None else value) for tag, value in sorted(tags.items())
    ]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(entries) + b"\0" * 4 + data


@pytest.mark.parametrize("compression", [1, 5, 8])
def test_a_tile_larger_than_any_image_is_refused_before_it_is_inflated(compression, memory_growth, refused):
    body = zlib.compress(bytes(1 << 22))
    tags = {256: 100, 257: 100, 258: 8, 259: compression, 262: 1, 277: 1, 322: 45_008, 323: 45_008, 324: None}
    data = tiff(tags | {325: len(body)}, body)
    assert memory_growth(lambda: refused(data, "large")) < 20e6


def test_the_first_frame_of_an_animation_does_not_take_a_canvas_for_each(encode, memory_growth, distance):
    frames = [Image.new("RGBA", (20, 10), color) for color in ((255, 0, 0, 255), (0, 0, 255, 255))]
    data = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    side = 6000
    header = data.index(b"VP8X")
    data[header + 12 : header + 18] = (side - 1).to_bytes(3, "little") * 2
    decode(bytes(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])), "first use")
    seen = []
    growth = memory_growth(lambda: seen.append(decode(bytes(data), "moving")))
    assert growth < 1.2 * 3 * side * side
    (pixels,) = seen
    assert pixels.shape == (3, side, side)
    assert pixels[:, 5, 5].tolist() == [255, 0, 0] and pixels[:, 20, 5].tolist() == [255, 255, 255]
    data[header + 12 : header + 18] = (16_000).to_bytes(3, "little") * 2
    with pytest.raises(BadImage, match="large: 16001 x 16001"):
        decode(bytes(data), "moving")


def progressive(side: int, scans: int) -> bytes:
    """A JPEG whose many scans refine nothing: a few bytes each, and a pass over all coefficients."""

    def segment(marker: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body

    blocks = (-(-side // 8)) ** 2
    no_bands = b"\0" * -(-blocks // 8)  # the one code of both tables is "0": no difference, and a run of 2^14 blocks
    tables = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    tables += segment(0xC4, b"\0\1" + b"\0" * 15 + b"\0") + segment(0xC4, b"\x10\1" + b"\0" * 15 + b"\xe0")
    first = segment(0xDA, b"\1\1\0\0\0\0") + no_bands
    return b"\xff\xd8" + tables + first + (segment(0xDA, b"\1\1\0\1\x3f\x10") + b"\0\0\x7f") * scans + b"\xff\xd9"


def test_hundreds_of_scans_of_a_large_jpeg_are_refused_and_the_usual_ten_are_not(photo, encode, refused, distance):
    started = time.perf_counter()
    assert "scans over 16,000,000 pixels" in refused(progressive(4000, 300), "large").reason
    jpeg = encode(np.tile(photo, (8, 8, 1)), "JPEG", progressive=True)
    in_tiff = tiff({256: 4000, 257: 4000, 258: 8, 259: 7, 262: 1, 277: 1, 278: 4000, 273: None, 279: 9000}, jpeg * 200)
    refused(in_tiff, "large")
    assert time.perf_counter() - started < 1
    assert distance(decode(encode(photo, "JPEG", progressive=True, quality=95), "usual"), photo) < 2


def test_millions_of_precincts_of_a_jpeg_2000_are_refused(encode, memory_growth, refused):
    data = bytearray(encode(Image.new("L", (4500, 4500)), "JPEG2000", no_jp2=True, precinct_size=(32, 32)))
    decode(bytes(data), "usual precincts")
    coding = data.index(b"\xff\x52")
    levels = data[coding + 9]
    data[coding + 14 : coding + 15 + levels] = b"\0" + b"\x11" * levels
    assert "precincts" in refused(bytes(data), "large").reason
    data[coding + 6 : coding + 8] = b"\xff\xff"  # layers
    assert memory_growth(lambda: refused(bytes(data), "large")) < 20e6
