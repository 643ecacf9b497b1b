"""From a decoded image to what the model sees: the same every time for evaluation, seeded for training.

Shapes: B batch, C channels, H W the image, R resolution. Images are uint8, of one size within a batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from coatnet.data import augmentation as augment
from coatnet.data.sampler import Words
from coatnet.errors import UserError

Image = Tensor | NDArray[np.uint8]


@dataclass(frozen=True)
class Preprocessing:
    """What the model sees at evaluation; it travels with the weights.

    `center` resizes the shorter side to `resolution / crop_fraction` and cuts the middle out; `squash`
    resizes both sides and cuts the middle out. One mean means a grey model: colour is averaged.
    """

    resolution: int = 224
    crop: Literal["center", "squash"] = "center"
    crop_fraction: float = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        _require(1 <= self.resolution <= 8192, "resolution", "1 to 8192 pixels", self.resolution)
        _require(self.crop in ("center", "squash"), "crop", "center or squash", self.crop)
        _require(0 < self.crop_fraction <= 1, "crop_fraction", "above 0 and at most 1", self.crop_fraction)
        _require(
            self.interpolation in ("bilinear", "bicubic"),
            "interpolation",
            "bilinear or bicubic",
            self.interpolation,
        )
        _require(len(self.mean) in (1, 3), "mean", "one number (grey) or three (colour)", self.mean)
        _require(all(map(math.isfinite, self.mean)), "mean", "finite numbers", self.mean)
        _require(len(self.std) == len(self.mean), "std", f"{len(self.mean)} numbers, as many as mean", self.std)
        _require(all(0 < value < math.inf for value in self.std), "std", "positive numbers", self.std)

    @property
    def channels(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Augmentation:
    """How a training image varies: where it is cut out, then flip, then RandAugment, then erasing.

    `crop` is a random resized crop for photographs; `shift` moves a small image by up to `shift` pixels on
    black. RandAugment's magnitude runs from 0 to 30, as in the paper's "2, 15" (layers, magnitude).
    """

    placement: Literal["crop", "shift", "none"] = "crop"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    shift: int = 2
    flip_rate: float = 0.5
    rand_augment_layers: int = 0
    rand_augment_magnitude: int = 15
    erasing_rate: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))
        object.__setattr__(self, "crop_ratio", tuple(self.crop_ratio))
        scale, ratio = self.crop_scale, self.crop_ratio
        _require(self.placement in ("crop", "shift", "none"), "placement", "crop, shift or none", self.placement)
        _require(len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, "crop_scale", "0 < low <= high <= 1", scale)
        _require(len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < math.inf, "crop_ratio", "0 < low <= high", ratio)
        _require(0 <= self.shift <= 1024, "shift", "0 to 1024 pixels", self.shift)
        _require(0 <= self.flip_rate <= 1, "flip_rate", "0 to 1", self.flip_rate)
        _require(0 <= self.rand_augment_layers <= 16, "rand_augment_layers", "0 to 16", self.rand_augment_layers)
        magnitude = self.rand_augment_magnitude
        _require(0 <= magnitude <= 30, "rand_augment_magnitude", "0 to 30", magnitude)
        _require(0 <= self.erasing_rate <= 1, "erasing_rate", "0 to 1", self.erasing_rate)


class EvaluationTransform:
    """An image to the normalised floats (C, R, R) that the model is judged on."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, image: Image) -> Tensor:
        """A uint8 tensor (3 or 1, H, W), or a uint8 array (H, W) or (H, W, 3), to floats (C, R, R)."""
        return self.batch(as_images(image)[None])[0]

    def batch(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        """uint8 (B, 1 or 3, H, W) to float32 (B, C, R, R), channels last; written to `out` if it is given."""
        return normalise(self.fitted(pixels), self.preprocessing, out)

    def fitted(self, images: Tensor) -> Tensor:
        """All but normalising: uint8 (B, 1 or 3, H, W) to uint8 (B, 1 or C, R, R)."""
        return fit(match_channels(images, self.preprocessing), self.preprocessing)


class TrainingTransform:
    """An image and its seed to normalised floats (C, R, R): a pure function of both."""

    def __init__(self, preprocessing: Preprocessing, augmentation: Augmentation) -> None:
        self.preprocessing = preprocessing
        self.augmentation = augmentation

    def __call__(self, image: Image, seed: int) -> Tensor:
        """A uint8 tensor (3 or 1, H, W), or a uint8 array (H, W) or (H, W, 3), to floats (C, R, R)."""
        return self.batch(as_images(image)[None], np.array([seed], dtype=np.uint64))[0]

    def batch(self, pixels: Tensor, seeds: Words, out: Tensor | None = None) -> Tensor:
        """uint8 (B, 1 or 3, H, W) and seeds (B,) to float32 (B, C, R, R), channels last; written to `out` if given."""
        pixels = self.place(match_channels(pixels, self.preprocessing), seeds)
        pixels = augment.flip(pixels, seeds, self.augmentation.flip_rate)
        if self.augmentation.rand_augment_layers:
            fill = [round(255 * value) for value in self.preprocessing.mean[: pixels.shape[1]]]
            layers, magnitude = (
                self.augmentation.rand_augment_layers,
                self.augmentation.rand_augment_magnitude,
            )
            pixels = augment.rand_augment(pixels, seeds, layers=layers, magnitude=magnitude, fill=fill)
        images = normalise(pixels, self.preprocessing, out)
        return augment.erase_(images, seeds, self.augmentation.erasing_rate)

    def place(self, images: Tensor, seeds: Words) -> Tensor:
        """uint8 (B, C, H, W) to uint8 (B, C, R, R), cut out as the augmentation says."""
        match self.augmentation.placement:
            case "crop":
                boxes = augment.crop_boxes(
                    images.shape[-2:],
                    seeds,
                    scale=self.augmentation.crop_scale,
                    ratio=self.augmentation.crop_ratio,
                )
                resolution = (self.preprocessing.resolution, self.preprocessing.resolution)
                # Channels last, as they are decoded, the kernel neither turns its input nor its output over.
                cuts = [
                    image[None, :, top : top + height, left : left + width].contiguous(
                        memory_format=torch.channels_last
                    )
                    for image, (top, left, height, width) in zip(images, boxes, strict=True)
                ]
                return torch.cat([resize(cut, resolution, self.preprocessing.interpolation) for cut in cuts])
            case "shift":
                return augment.shift(fit(images, self.preprocessing), seeds, self.augmentation.shift)
            case "none":
                return fit(images, self.preprocessing)


def as_images(array: Image) -> Tensor:
    """An array (..., H, W) or (..., H, W, 3) to a tensor (..., C, H, W); a tensor stays what it is."""
    if isinstance(array, Tensor):
        return array
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    colour = array.ndim > 2 and array.shape[-1] == 3
    return tensor.movedim(-1, -3) if colour else tensor.unsqueeze(-3)


def match_channels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Average colour for a grey model. Grey for a colour model stays one channel: normalising repeats it."""
    if preprocessing.channels == 1 and images.shape[-3] == 3:
        return images.float().mean(-3, keepdim=True).round_().to(torch.uint8)
    return images


def fit(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (B, C, H, W) to uint8 (B, C, R, R): resized, then the middle cut out."""
    resolution = preprocessing.resolution
    return center(scale(images, preprocessing), resolution, resolution)


def scale(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (B, C, H, W) to uint8 (B, C, H', W'), neither side below R: resized, with the margin that is cut off."""
    height, width = images.shape[-2:]
    side = math.floor(preprocessing.resolution / preprocessing.crop_fraction)  # as timm computes it
    if preprocessing.crop == "center":
        # A 1 x 5000 image would grow to 256 x 1,280,000 before the cut, which shows 1 x 1 of it.
        short = min(height, width)
        images = center(images, min(height, 4 * short), min(width, 4 * short))
        height, width = images.shape[-2:]
        size = (max(side, side * height // width), max(side, side * width // height))
    else:
        size = (side, side)
    return resize(images, size, preprocessing.interpolation)


def resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Antialiased, on uint8: the kernel that torchvision calls, without the seconds that its import costs."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode=interpolation, antialias=True)


def normalise(pixels: Tensor, preprocessing: Preprocessing, out: Tensor | None = None) -> Tensor:
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


def center(images: Tensor, height: int, width: int) -> Tensor:
    """The middle of (..., H, W), of that height and width."""
    top = round((images.shape[-2] - height) / 2)
    left = round((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]


def _require(condition: bool, field: str, right: str, given: object) -> None:
    if not condition:
        raise UserError(f"{field} must be {right}, got {given!r}")
