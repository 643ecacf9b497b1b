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


def read_values(file: Any, channels: int) -> numpy.ndarray:
    """A NumPy file, a TIFF by tifffile, or an image of up to 16 bits by Pillow to float32 (H, W, C): its values."""
    name, turn = str(file).lower(), 1
    if name.endswith((".npy", ".npz")):
        values = numpy.load(file)
        values = values if name.endswith(".npy") else values[values.files[0]]
    elif name.endswith((".tif", ".tiff")):
        import tifffile

        with tifffile.TiffFile(file) as tiff:
            values, turn = tiff.asarray(), int(tiff.pages.first.tags.valueof(274, default=1))  # the EXIF orientation
    else:
        with Image.open(file) as image, open(file, "rb") as stored:
            if stored.read(26)[24:] in (b"\x10\2", b"\x10\4", b"\x10\6") and image.format == "PNG":
                raise ValueError(f"{file}: Pillow drops half of the 16 bits of a PNG in color; write a TIFF")
            values = numpy.asarray(ImageOps.exif_transpose(image))
    values = values[..., None] if values.ndim == 2 else values
    values = values if values.shape[-1] == channels else numpy.moveaxis(values, 0, -1)
    values = values.swapaxes(0, 1) if turn > 4 else values
    values = values[:: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
    return numpy.ascontiguousarray(values, dtype=numpy.float32)


def prepare_values(values: numpy.ndarray, seen: dict[str, Any]) -> numpy.ndarray:
    """float32 (H, W, C) to float32 (1, C, R, R) for a network alone: resized, cropped and normalized."""
    low, high = seen["value_range"]
    scaled = (numpy.where(numpy.isfinite(values), values, low) - low) / (high - low)
    planes = [
        numpy.asarray(fit(Image.fromarray(plane), seen)) for plane in scaled.astype(numpy.float32).transpose(2, 0, 1)
    ]
    mean, std = (numpy.array(seen[name], numpy.float32)[:, None, None] for name in ("mean", "std"))
    return ((numpy.stack(planes) - mean) / std)[None]


def prepare(pixels: numpy.ndarray, seen: dict[str, Any]) -> numpy.ndarray:
    """uint8 (H, W, 3) to float32 (1, C, R, R) for a network alone: resized, cropped and normalized."""
    if len(seen["mean"]) == 1:
        pixels = numpy.rint(pixels.mean(2, dtype=numpy.float32)).astype(numpy.uint8)
    planes = numpy.asarray(fit(Image.fromarray(pixels), seen), dtype=numpy.float32)
    planes = planes.reshape(*planes.shape[:2], -1) / 255
    planes = (planes - numpy.float32(seen["mean"])) / numpy.float32(seen["std"])
    return numpy.ascontiguousarray(planes.transpose(2, 0, 1)[None])


def fit(image: Image.Image, seen: dict[str, Any]) -> Image.Image:
    """The part of an image that the network sees, at its resolution."""
    sides = seen["resolution"] if isinstance(seen["resolution"], list | tuple) else [seen["resolution"]] * 2
    tall, wide = (int(side / seen["crop_fraction"]) for side in sides)
    size = wide, tall
    if seen["crop"] == "center":
        width, height = image.size
        height = min(height, max(1, 4 * width * tall // wide))
        width = min(width, max(1, 4 * height * wide // tall))
        image = crop(image, width, height)
        size = max(wide, tall * width // height), max(tall, wide * height // width)
    return crop(image.resize(size, Image.Resampling[seen["interpolation"].upper()]), sides[1], sides[0])


def crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The center of an image."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
