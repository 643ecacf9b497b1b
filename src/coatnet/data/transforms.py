"""From decoded images to what the model sees: deterministic for evaluation, seeded for training.

Shapes: B batch, C channels, H W the image; R R the size that the model sees, which need not be square. Images are
levels from 0 to 255, uint8, or float32 where a scale gives them; they are of one size within a batch.
"""

import math
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from coatnet.data import augmentation as augment
from coatnet.data.decode import MAX_CHANNELS, Scale
from coatnet.data.sampler import Words
from coatnet.errors import UserError
from coatnet.system.validated import (
    Boolean,
    Integer,
    Names,
    Number,
    PositiveFloat,
    PositiveFraction,
    Probability,
    Size,
    validated,
)

Image = Tensor | NDArray[np.uint8]

MAX_SIDE_SEEN = 8192
MAX_RESIZED_SIDE = 9_400  # an image four times as wide then takes 1 GB


@validated
class Preprocessing:
    """What the model sees at evaluation; it is stored with the weights."""

    resolution: Size = 224
    """Side of the square image that the model sees, pixels, 1 to 8192, or height and width; by default 224, in a run as
    `resolution`."""
    crop: Literal["center", "squash"] = "center"
    """`center` resizes the shorter side to `resolution / crop_fraction`, `squash` both; the middle is cut out."""
    crop_fraction: Annotated[Number, Field(gt=0, le=1)] = 0.875
    """Side of the middle, as a fraction of the resized image; by default 0.875, and 1 for small images."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """How images are resized; both with antialiasing."""
    mean: tuple[Number, ...] = (0.5, 0.5, 0.5)
    """Subtracted from each channel, of pixels from 0 to 1; one number means a gray model, three a color
    model. By default 0.5, and the mean of the data for small images, or with a `value_range`."""
    std: tuple[PositiveFloat, ...] = (0.5, 0.5, 0.5)
    """What each channel is divided by after that; by default 0.5, and the deviation of the data likewise."""
    value_range: tuple[Number, Number] | None = None
    """The values of images that stand for 0 and 1, such as [0,4095], where they are read as they are, with 1 to 16
    channels; by default those of the data where it is deeper than 8-bit RGB, and else none: images are 8-bit RGB."""

    channel_names: Names = ()
    """With a `value_range`, what the channels are, such as blue,green,red,nir; with `init`, those called red, green and
    blue keep the weights of a network for RGB. By default without names."""

    def __post_init__(self) -> None:
        if self.channel_names and len(self.channel_names) != len(self.mean):
            raise UserError(f"channel_names must be {len(self.mean)}, one a channel, got {self.channel_names}")
        if not 1 <= min(self.size) <= max(self.size) <= MAX_SIDE_SEEN:
            raise UserError(f"resolution must be 1 to {MAX_SIDE_SEEN}, got {self.resolution!r}")
        if self.value_range is None and len(self.mean) not in (1, 3):
            raise UserError(f"mean must be one number (gray) or three (color), got {self.mean}")
        if self.value_range is not None:
            if not 1 <= len(self.mean) <= MAX_CHANNELS:
                raise UserError(f"mean must be 1 to {MAX_CHANNELS} numbers, one a channel, got {self.mean}")
            low, high = self.value_range
            if not (high - low >= 1e-30 and max(abs(low), abs(high)) <= 1e30):
                raise UserError(f"value_range must be two values, the first below the second, got {self.value_range}")
        if len(self.std) != len(self.mean):
            raise UserError(f"std must be {len(self.mean)} numbers, as many as mean, got {self.std}")
        # Pixels are from 0 to 1; beyond these bounds single precision gives infinity or nothing.
        if max(map(abs, self.mean)) > 1e6 or min(self.std) < 1e-6 or max(self.std) > 1e6:
            raise UserError(
                f"mean must be at most 1e6 and std from 1e-6 to 1e6, of pixels from 0 to 1, got {self.mean}, {self.std}"
            )
        if max(self.resized_size) > MAX_RESIZED_SIDE:
            raise UserError(
                f"crop_fraction {self.crop_fraction:g} of {self.shown_size} pixels enlarges images to "
                f"{max(self.resized_size):,}, of which there may be {MAX_RESIZED_SIDE:,}; give a larger fraction"
            )

    @property
    def channels(self) -> int:
        """Channels of the image that the model sees: 1 (gray) or 3 (color), or up to 16 with a value range."""
        return len(self.mean)

    @property
    def scale(self) -> Scale | None:
        """How values become levels; None for images of 8-bit RGB."""
        return None if self.value_range is None else Scale(self.channels, *self.value_range)

    @property
    def rgb(self) -> tuple[int, int, int] | None:
        """Which channels are called red, green and blue; None if not all three are."""
        names = [name.lower() for name in self.channel_names]
        if not {"red", "green", "blue"} <= set(names):
            return None
        return names.index("red"), names.index("green"), names.index("blue")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image that the model sees, in pixels."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)

    @property
    def side(self) -> int:
        """The longer side of the image that the model sees, in pixels."""
        return max(self.size)

    @property
    def shown_size(self) -> int | str:
        """The side of a square, 224; else height and width, `192 x 320`."""
        return self.size[0] if self.size[0] == self.size[1] else f"{self.size[0]} x {self.size[1]}"

    @property
    def resized_size(self) -> tuple[int, int]:
        """The least height and width of the resized image, before the middle is cut out, in pixels."""
        height, width = (math.floor(min(side / self.crop_fraction, 1e9)) for side in self.size)  # as timm computes it
        return height, width

    @property
    def resized_side(self) -> int:
        """The shorter side of that, in pixels."""
        return min(self.resized_size)


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise UserError("must be two numbers of which the first is not the larger")
    return limits


_ASCENDING = AfterValidator(_ascending)


@validated
class Augmentation:
    """How a training image varies: where it is cut out, then flip, then RandAugment or TrivialAugment, then erasing."""

    placement: Literal["crop", "shift", "none"] = "crop"
    """`crop` cuts out a random part and resizes it, for photographs; `shift` moves a small image on black;
    by default shift up to 64 pixels, else crop."""
    crop_scale: Annotated[tuple[PositiveFraction, PositiveFraction], _ASCENDING] = (0.08, 1.0)
    """For `crop`: least and greatest area of the part, as a fraction of the image; by default [0.35,1], or [0.6,1] in
    runs of less than 25 epochs without `init`."""
    crop_ratio: Annotated[tuple[PositiveFloat, PositiveFloat], _ASCENDING] = (3 / 4, 4 / 3)
    """For `crop`: least and greatest width over height of the part."""
    shift: Annotated[Integer, Field(ge=0, le=1024)] = 2
    """For `shift`: the most that an image moves, pixels in each direction; by default 1 for every 28 of its side."""
    flip_rate: Probability = 0.5
    """Probability that an image is mirrored left to right; by default 0.5, and 0 for small gray images (signs)."""
    flip: Literal["random", "alternating"] = "random"
    """`random`: by `flip_rate` each time; `alternating`: on every second of its epochs, from a random start, without
    `flip_rate`."""
    rand_augment_layers: Annotated[Integer, Field(ge=0, le=16)] = 0
    """Operations of RandAugment on each image; by default 2 for photographs, but 0 in runs of less than
    25 epochs without `init`; 0 for small images."""
    rand_augment_magnitude: Annotated[Integer, Field(ge=0, le=30)] = 15
    """Strength of these operations, 0 to 30; by default 9 for photographs (the paper: "2, 15"); RandAugment alone."""
    trivial_augment: Boolean = False
    """Whether TrivialAugment, one operation of random strength on each image, takes the place of RandAugment."""
    erasing_rate: Probability = 0.0
    """Probability that a random box of an image is erased; by default 0.5 for 20,000 small images or more in runs of 25
    epochs or more."""

    @property
    def varies_colors(self) -> bool:
        """Whether operations on colors are among those of 8-bit RGB images."""
        return self.trivial_augment or bool(self.rand_augment_layers)

    def __post_init__(self) -> None:
        if self.trivial_augment and self.rand_augment_layers:
            raise UserError(
                "trivial_augment takes the place of RandAugment, but rand_augment_layers is "
                f"{self.rand_augment_layers}: give 0, or leave trivial_augment out"
            )


class EvaluationTransform:
    """Resizes, crops and normalizes images for evaluation."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, image: Image) -> Tensor:
        """One image, a uint8 tensor (3 or 1, H, W) or array (H, W) or (H, W, 3), to float32 (C, R, R)."""
        return self.batch(as_images(image)[None])[0]

    def batch(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        """uint8 (B, 1 or 3, H, W) to float32 (B, C, R, R), channels last; written to `out` if it is given."""
        return normalize(self.resize(pixels), self.preprocessing, out)

    def resize(self, images: Tensor) -> Tensor:
        """Everything but normalizing: uint8 (B, 1 or 3, H, W) to uint8 (B, 1 or C, R, R)."""
        return resize_and_crop(match_channels(images, self.preprocessing), self.preprocessing)


class TrainingTransform:
    """Crops, varies and normalizes images for training: a pure function of each image and its seed."""

    def __init__(self, preprocessing: Preprocessing, augmentation: Augmentation) -> None:
        self.preprocessing = preprocessing
        self.augmentation = augmentation

    def __call__(self, image: Image, seed: int) -> Tensor:
        """One image, a uint8 tensor (3 or 1, H, W) or array (H, W) or (H, W, 3), to float32 (C, R, R)."""
        return self.batch(as_images(image)[None], np.array([seed], dtype=np.uint64))[0]

    def batch(
        self, pixels: Tensor, seeds: Words, out: Tensor | None = None, mirrored: NDArray[np.bool_] | None = None
    ) -> Tensor:
        """uint8 (B, 1 or 3, H, W) and seeds (B,) to float32 (B, C, R, R), channels last; written to `out` if given.

        `mirrored` (B,) says which images are mirrored, for alternating flips; without it `flip_rate` decides.
        """
        ours = self.augmentation
        pixels = self.crop(match_channels(pixels, self.preprocessing), seeds)
        pixels = augment.flip(pixels, seeds, ours.flip_rate) if mirrored is None else augment.mirror(pixels, mirrored)
        fill = [round(255 * value) for value in self.preprocessing.mean[: pixels.shape[1]]]
        colors = self.preprocessing.value_range is None
        if ours.rand_augment_layers:
            layers, magnitude = ours.rand_augment_layers, ours.rand_augment_magnitude
            pixels = augment.rand_augment(pixels, seeds, layers=layers, magnitude=magnitude, fill=fill, colors=colors)
        elif ours.trivial_augment:
            pixels = augment.trivial_augment(pixels, seeds, fill=fill, colors=colors)
        images = normalize(pixels, self.preprocessing, out)
        return augment.erase_(images, seeds, ours.erasing_rate)

    def crop(self, images: Tensor, seeds: Words) -> Tensor:
        """uint8 (B, C, H, W) to uint8 (B, C, R, R): a random crop, a shift, or the crop of evaluation."""
        match self.augmentation.placement:
            case "crop":
                boxes = augment.crop_boxes(
                    images.shape[-2:],
                    seeds,
                    scale=self.augmentation.crop_scale,
                    ratio=self._crop_ratio,
                )
                resolution = self.preprocessing.size
                # In channels last, as images are decoded, the kernel transposes neither its input nor its output.
                cuts = [
                    image[None, :, top : top + height, left : left + width].contiguous(
                        memory_format=torch.channels_last
                    )
                    for image, (top, left, height, width) in zip(images, boxes, strict=True)
                ]
                return torch.cat([resize(cut, resolution, self.preprocessing.interpolation) for cut in cuts])
            case "shift":
                return augment.shift(resize_and_crop(images, self.preprocessing), seeds, self.augmentation.shift)
            case "none":
                return resize_and_crop(images, self.preprocessing)

    @property
    def _crop_ratio(self) -> tuple[float, float]:
        """Width over height of a random part: that of the augmentation, around the shape that the model sees."""
        (low, high), (tall, wide) = self.augmentation.crop_ratio, self.preprocessing.size
        return (low, high) if tall == wide else (low * wide / tall, high * wide / tall)


def as_images(array: Image) -> Tensor:
    """An array (..., H, W) or (..., H, W, 3) to a tensor (..., C, H, W); a tensor is returned unchanged.

    Levels in single precision are always (..., H, W, C).
    """
    if isinstance(array, Tensor):
        return array
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    color = array.ndim > 2 and (array.shape[-1] == 3 or array.dtype == np.float32)
    return tensor.movedim(-1, -3) if color else tensor.unsqueeze(-3)


def match_channels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Average the colors for a gray model; a gray image for a color model keeps one channel until `normalize`."""
    if preprocessing.channels == 1 and images.shape[-3] == 3 and preprocessing.value_range is None:
        return images.float().mean(-3, keepdim=True).round_().to(torch.uint8)
    return images


def resize_and_crop(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (B, C, H, W) to uint8 (B, C, R, R): resize, then crop the center."""
    return center_crop(resize_with_margin(images, preprocessing), *preprocessing.size)


def resize_with_margin(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (B, C, H, W) to uint8 (B, C, H', W'): resize, keeping the margin that the center crop removes."""
    kept, size = _resized_size(images.shape[-2], images.shape[-1], preprocessing)
    return resize(center_crop(images, *kept), size, preprocessing.interpolation)


def _resized_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the center that is resized, and what it is resized to."""
    tall, wide = preprocessing.resized_size
    if preprocessing.crop == "squash":
        return (height, width), (tall, wide)
    # A 1 x 5000 image would grow to 256 x 1,280,000 before the crop, which shows 1 x 1 of it.
    height, width = min(height, max(1, 4 * width * tall // wide)), min(width, max(1, 4 * height * wide // tall))
    return (height, width), (max(tall, wide * height // width), max(wide, tall * width // height))


def seen_box(height: int, width: int, preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """The part of an image that the model sees: left, top, right and bottom, as fractions of its width and height."""
    sides = []
    kept, size = _resized_size(height, width, preprocessing)
    for whole, center, resized, shown in zip((height, width), kept, size, preprocessing.size, strict=True):
        first = round((whole - center) / 2)  # as in `center_crop`
        cut = round((resized - shown) / 2)
        edges = (cut, cut + shown)
        sides.append([(first + edge * center / resized) / whole for edge in edges])
    (top, bottom), (left, right) = sides
    return left, top, right, bottom


def resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize uint8 (B, C, H, W) to `size` with antialiasing, by torchvision's kernel; importing it takes seconds."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode=interpolation, antialias=True)


def normalize(pixels: Tensor, preprocessing: Preprocessing, out: Tensor | None = None) -> Tensor:
    """uint8 (B, 1 or C, H, W) to float32 (B, C, H, W), channels last: (value / 255 - mean) / std.

    Whole rows of pixels are computed at once: a broadcast over three channels innermost takes six times as long (0.50
    against 0.08 ms at 224 pixels).
    """
    batch, _, height, width = pixels.shape
    images = torch.empty(batch, height, width, preprocessing.channels).movedim(-1, 1) if out is None else out
    images.copy_(pixels.contiguous(memory_format=torch.channels_last))
    rows = images.movedim(1, -1).view(batch, height, -1)  # the same memory
    mean, std = torch.tensor(preprocessing.mean).repeat(width), torch.tensor(preprocessing.std).repeat(width)
    rows.mul_(1 / 255).sub_(mean).div_(std)
    return images


def center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """The center (..., height, width) of images (..., H, W)."""
    top = round((images.shape[-2] - height) / 2)
    left = round((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]
