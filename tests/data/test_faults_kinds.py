"""Kinds of images that decoders often get wrong have the right pixels."""

import base64
import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from coatnet.data import decode as decoding
from coatnet.data.decode import FORMATS, SNIFFED_BYTES, BadImage, decode, image_size, sniff
from coatnet.data.inspection import inspect

HEIC = zlib.decompress(
    base64.b64decode(
        "eNpjYGCQSSupLMhIzUxmAILczDRDEDs3MzGNgYGxJje1JJEBAhQzUnKKoGyGgszkEgY0oJSZkw82xMWBgREIgYBxAYQGgnAgVs7MzEsD80Ciok"
        "BOKhOUl1GWbAhi8hVkluTClfzJLCgqANJ3MguS84F0KVCZMyMzSGgCWJHcB4Y/f3/8YGDgZ04A6pBwYORh/P8fpIAZpIIZhOR2MTkkAiU1nRgZ"
        "0WQWKDSyTnu1btazB4oLDjQwMPA0gIRbkoCq2VwYDxYf7ATaIZycn1OUl5xTARTlZWADKmEQySwuSIV6zAGKNZJzEkEOE4C6HUz/////ApBmgt"
        "Eg8YLMikyQRmYODg4gJZFZkAsLY2CwsTYyMbO2ANnxuSmJoDAO1mBcz2YkbXisIda5Y/a9////WdmdvuFmXOt+6JtKpby79f8vOV+yAv+rNCy/"
        "MOvVupDj3vIf15vl/2EPq19h/yv7/pM32i0XXiTVvOqqVhWKKVl8+8GPAwBc7nu+"
    )
)

# A4: EXIF orientation

STORED_AS = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize(
    ("kind", "tolerance", "options"),
    [
        ("JPEG", 2.0, {"quality": 95, "subsampling": 0}),
        ("PNG", 0.0, {}),
        ("WEBP", 0.0, {"lossless": True}),
        ("TIFF", 0.0, {}),
    ],
)
def test_every_exif_orientation_gives_the_upright_image(
    photo, encode, orientation, kind, tolerance, options, monkeypatch, distance
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.ascontiguousarray(STORED_AS[orientation](photo)), kind, exif=exif, **options)
    assert distance(decode(data, "turned"), photo) <= tolerance
    monkeypatch.setattr(decoding, "_decode_with_simplejpeg", lambda *_: None)
    assert distance(decode(data, "turned"), photo) <= tolerance


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\xff" * 60]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_data_leaves_the_image_as_it_is(photo, encode, kind, exif, distance):
    assert distance(decode(encode(photo, kind, exif=exif, quality=95), "broken exif"), photo) < 4


# A5: color models and alpha


def cmyk(photo: np.ndarray) -> Image.Image:
    return Image.fromarray(photo).convert("CMYK")


def test_cmyk_jpeg_becomes_rgb(photo, encode, distance):
    assert distance(decode(encode(cmyk(photo), "JPEG", quality=95), "cmyk"), photo) < 3


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_a_whole_cmyk_jpeg_decodes_without_a_warning(subsampling, make_folder, photo, encode):
    root = make_folder({"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    (root / "train/a/ink.jpg").write_bytes(encode(cmyk(photo), "JPEG", subsampling=subsampling))
    inspection = inspect(root, strict=True)
    assert inspection.healthy and not inspection.warnings


def test_ycck_jpeg_becomes_rgb(photo, encode, distance):
    # Adobe's marker with transform 2: the same bytes of ink, stored as YCC and K.
    plain = encode(cmyk(photo), "JPEG", quality=95)
    adobe = plain.index(b"Adobe")
    ycck = plain[: adobe + 11] + b"\x02" + plain[adobe + 12 :]
    expected = np.asarray(Image.open(io.BytesIO(ycck)).convert("RGB"))
    assert distance(decode(ycck, "ycck"), expected) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_gray_images_have_three_equal_channels(photo, encode, kind, distance):
    gray = Image.fromarray(photo).convert("L")
    pixels = decode(encode(gray, kind, quality=95, lossless=True), "gray")
    assert distance(pixels, np.repeat(np.asarray(gray)[..., None], 3, axis=2)) < 2
    assert torch.equal(pixels[0], pixels[1])


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_one_bit_images_are_black_and_white(photo, encode, kind, distance):
    mask = photo[..., 0] > 100
    pixels = decode(encode(Image.fromarray(mask), kind), "one bit")
    assert distance(pixels, np.repeat(mask[..., None] * 255, 3, axis=2)) == 0


def on_white(photo: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return photo * share + 255 * (1 - share)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_on_white(photo, encode, kind, distance):
    alpha = np.linspace(0, 255, 60).astype(np.uint8)[None].repeat(40, axis=0)
    rgba = np.dstack([photo, alpha])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert distance(decode(encode(rgba, kind, **options), "alpha"), on_white(photo, alpha)) < 1


def test_gray_alpha_is_laid_on_white(photo, encode, distance):
    gray, alpha = photo[..., 0], photo[..., 1]
    pixels = decode(encode(Image.fromarray(np.dstack([gray, alpha]), "LA")), "gray alpha")
    assert distance(pixels, on_white(np.repeat(gray[..., None], 3, axis=2), alpha)) < 1


def test_palette_with_transparency_is_laid_on_white(photo, encode, distance):
    image = Image.fromarray(photo).quantize(8)
    expected = np.array(image.convert("RGB"))
    expected[np.asarray(image) == 3] = 255
    assert distance(decode(encode(image, "PNG", transparency=3), "palette"), expected) == 0
    alphas = bytes([255, 255, 255, 0, 255, 255, 255, 255])
    assert distance(decode(encode(image, "PNG", transparency=alphas), "palette"), expected) == 0


def test_both_decoders_agree_on_jpegs_to_the_bit(photo, encode, monkeypatch):
    for options in ({"quality": 90}, {"progressive": True}, {"subsampling": 2}, {"subsampling": 0}):
        data = encode(photo, "JPEG", **options)
        fast = decode(data, "jpeg")
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "_decode_with_simplejpeg", lambda *_: None)
            assert torch.equal(decode(data, "jpeg"), fast)


# A6: deep pixels


def test_16_bit_gray_png_keeps_its_mean(encode):
    wide = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = decode(encode(Image.fromarray(wide)), "deep")
    assert pixels.float().mean().item() == pytest.approx(wide.mean() / 257, abs=0.1)
    assert (pixels.min(), pixels.max()) == (0, 255)


def png_of_16_bits(wide: np.ndarray) -> bytes:
    """Pillow reads 16 bits in color but does not write them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", wide.shape[1], wide.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_16_bit_rgb_png_keeps_its_mean():
    wide = np.linspace(0, 65535, 32 * 32 * 3).reshape(32, 32, 3).astype(">u2")
    pixels = decode(png_of_16_bits(wide), "deep")
    for channel in range(3):
        assert pixels[channel].float().mean().item() == pytest.approx(wide[..., channel].mean() / 257, abs=1)


def test_16_bit_tiff_keeps_its_mean(encode):
    wide = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = decode(encode(Image.fromarray(wide), "TIFF"), "deep")
    assert pixels.float().mean().item() == pytest.approx(wide.mean() / 257, abs=0.1)


@pytest.mark.parametrize(("mode", "dtype"), [("F", np.float32), ("I", np.int32)])
def test_float_and_32_bit_tiffs_are_refused_with_the_reason(encode, mode, dtype, refused):
    image = Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(dtype))
    assert image.mode == mode
    assert "no agreed white" in refused(encode(image, "TIFF"), "pixels").reason


# A7: animations and pages


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_or_page_is_decoded(encode, kind, distance):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "green", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert distance(decode(data, "moving"), np.array(frames[0])) == 0


# A11: every format on the list


@pytest.mark.parametrize("kind", [each.name for each in FORMATS if each.name not in ("HEIF", "NPY", "NPZ")])
def test_each_format_on_the_list_is_recognized_by_its_first_bytes_and_decoded(photo, encode, kind, distance):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow before 11.3 does not read AVIF")
    data = encode(photo, kind, quality=95)
    assert sniff(data[:SNIFFED_BYTES]).name == kind
    assert distance(decode(data, "without an ending"), photo) < 5
    assert image_size(data, "size") == (40, 60)


def test_bigtiff_is_tiff(photo, encode, distance):
    assert distance(decode(encode(photo, "TIFF", big_tiff=True), "big"), photo) == 0


def test_16_bit_pgm_keeps_its_mean():
    wide = np.linspace(0, 65535, 64 * 64).astype(">u2")
    pixels = decode(b"P5\n64 64\n65535\n" + wide.tobytes(), "deep")
    assert pixels.float().mean().item() == pytest.approx(wide.mean() / 257, abs=0.1)


def test_heic_is_read_with_a_package():
    """A red half over a blue one, as libheif 1.23 encodes it."""
    assert sniff(HEIC).name == "HEIF" and image_size(HEIC, "phone.heic") == (16, 16)
    pixels = decode(HEIC, "phone.heic")
    assert pixels.shape == (3, 16, 16)
    assert pixels[:, 2, 2].tolist() == [200, 40, 40] and pixels[:, 13, 2].tolist() == [40, 40, 200]
    with pytest.raises(BadImage):
        decode(HEIC[:-40], "cut.heic")


def test_without_the_package_the_error_of_heic_names_it(monkeypatch):
    kinds = [sniff(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1") for brand in (b"heic", b"mif1", b"heix")]
    assert [kind.name for kind in kinds] == ["HEIF"] * 3
    assert sniff(b"\0\0\0\x20ftypmif1\0\0\0\0mif1avif").name == "AVIF"
    for package in ("pi_heif", "pillow_heif"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(BadImage, match=r"pip install 'coatnet\[heic\]'"):
        decode(HEIC, "phone.heic")


def test_transparent_16_bit_gray_is_white(encode):
    wide = np.array([[0, 1000], [1000, 65535]], np.uint16)
    pixels = decode(encode(Image.fromarray(wide), transparency=1000), "deep")
    assert pixels[0].tolist() == [[0, 255], [255, 255]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_orientation_in_xmp_alone_turns_too(photo, encode, kind, distance):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    stored = np.ascontiguousarray(STORED_AS[6](photo))
    options: dict = {"xmp": xmp}
    if kind == "PNG":
        options = {"pnginfo": PngImagePlugin.PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    if kind == "TIFF":  # which Pillow turns
        probe = Image.new("L", (1, 1))
        probe.info["xmp"] = xmp
        if 0x0112 not in probe.getexif():
            pytest.skip("this Pillow turns by EXIF alone")
        options = {"tiffinfo": {700: xmp}}
    assert distance(decode(encode(stored, kind, quality=95, lossless=True, **options), "turned"), photo) < 4
