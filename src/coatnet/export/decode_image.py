"""Decode an image file as coatnet does, with Pillow and numpy alone: programs that use an export hold this code."""

from contextlib import suppress
from typing import Any

import numpy
from PIL import Image, ImageOps


def decode(file: Any) -> numpy.ndarray:
    """An image file to uint8 (H, W, 3): upright, 16 bits scaled to 8, white where it is transparent."""
    with Image.open(file) as image:
        image.load()
        with suppress(Exception):  # broken EXIF data turns nothing
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        wide = numpy.asarray(image).astype(numpy.uint32)
        gray = ((wide + 128) // 257).astype(numpy.uint8)
        gray[wide == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(gray)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return numpy.array(image.convert("RGB"))


def prepare(pixels: numpy.ndarray, seen: dict[str, Any]) -> numpy.ndarray:
    """uint8 (H, W, 3) to float32 (1, C, R, R) for a network alone: resized, cropped and normalized."""
    if len(seen["mean"]) == 1:
        pixels = numpy.rint(pixels.mean(2, dtype=numpy.float32)).astype(numpy.uint8)
    image, side = Image.fromarray(pixels), seen["resolution"]
    size = (int(side / seen["crop_fraction"]),) * 2
    if seen["crop"] == "center":
        image = crop(image, *(min(length, 4 * min(image.size)) for length in image.size))
        width, height = image.size
        size = max(size[0], size[0] * width // height), max(size[0], size[0] * height // width)
    image = crop(image.resize(size, Image.Resampling[seen["interpolation"].upper()]), side, side)
    planes = numpy.asarray(image, dtype=numpy.float32).reshape(side, side, -1) / 255
    planes = (planes - numpy.float32(seen["mean"])) / numpy.float32(seen["std"])
    return numpy.ascontiguousarray(planes.transpose(2, 0, 1)[None])


def crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The center of an image."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
