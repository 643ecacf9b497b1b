"""Random augmentations of training images, each a pure function of the images and one seed per image.

Shapes: B batch, C channels, H W the image. Each augmentation draws from a stream of its own, so switching one off
does not change the others.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coatnet.data.sampler import Words, expand_words, hash_words, uniform

GEOMETRIC_OPERATIONS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
Range = tuple[float, float]
Box = tuple[int, int, int, int]  # top, left, height, width

_FLIP, _SHIFT, _CROP, _RAND_AUGMENT, _ERASE, _TRIVIAL_AUGMENT, _FIRST_FLIP = map(np.uint64, range(1, 8))
_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
# Zhong et al. 2017, "Random Erasing", section 4: fraction of the image, and aspect ratio.
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 3.3)


def flip(images: Tensor, seeds: Words, rate: float) -> Tensor:
    """Mirror left and right, each image of (B, C, H, W) with probability `rate`."""
    return mirror(images, _draw(seeds, _FLIP, 1)[:, 0] < rate)


def alternate(seed: int, epochs: NDArray[np.int64], indices: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images (B,) are mirrored if each is on every second of its epochs, from a random start.

    Any two epochs that follow each other show both sides. Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single
    GPU", has the idea.

    Args:
        seed: of the run.
        epochs: how often each image was shown before (B,).
        indices: of the images (B,).
    """
    return (hash_words(seed, indices, _FIRST_FLIP) + epochs.astype(np.uint64)) % np.uint64(2) == 1


def mirror(images: Tensor, which: NDArray[np.bool_]) -> Tensor:
    """Mirror left and right those images of (B, C, H, W) for which `which` (B,) is true."""
    chosen = np.flatnonzero(which)
    if len(chosen) in (0, len(images)):  # always so if images come one by one
        return images.flip(-1) if len(chosen) else images
    mirrored = images.clone()
    mirrored[chosen] = images[chosen].flip(-1)
    return mirrored


def shift(images: Tensor, seeds: Words, limit: int) -> Tensor:
    """Move each image of (B, C, H, W) by up to `limit` pixels in both directions; uncovered pixels are black."""
    if limit == 0:
        return images
    height, width = images.shape[-2:]
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (limit, limit), (limit, limit)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))  # (B, C, dy, dx, H, W)
    top, left = (_draw(seeds, _SHIFT, 2) * (2 * limit + 1)).astype(np.int64).T
    return torch.from_numpy(windows[np.arange(len(top)), :, top, left])


def crop_boxes(size: Sequence[int], seeds: Words, *, scale: Range, ratio: Range) -> list[Box]:
    """The box of a random resized crop for each seed (Szegedy et al. 2014, "Going deeper", section 6).

    Args:
        size: (H, W) of the images.
        scale: range of the box's share of the area.
        ratio: range of its width / height.
    """
    return [_crop_box(size[0], size[1], numbers, scale, ratio) for numbers in _draw(seeds, _CROP, 4 * _CROP_ATTEMPTS)]


def rand_augment(
    images: Tensor, seeds: Words, *, layers: int, magnitude: int, fill: list[int], colors: bool = True
) -> Tensor:
    """RandAugment (Cubuk et al. 2019) of each image (B, C, H, W); uncovered pixels become `fill`.

    Without `colors`, for images of other channels or types than uint8 RGB, only operations that move pixels are drawn.
    """
    return _each_seeded(_rand_augment(layers, magnitude, tuple(fill), colors), images, seeds ^ _RAND_AUGMENT)


def trivial_augment(images: Tensor, seeds: Words, *, fill: list[int], colors: bool = True) -> Tensor:
    """TrivialAugment (Müller and Hutter 2021, the wide ranges) of each image (B, C, H, W): one operation of random
    strength; uncovered pixels become `fill`, and `colors` is as for `rand_augment`."""
    return _each_seeded(_trivial_augment(tuple(fill), colors), images, seeds ^ _TRIVIAL_AUGMENT)


def _each_seeded(policy: Any, images: Tensor, words: Words) -> Tensor:
    """Transform each image (B, C, H, W) with random numbers of its own word."""
    generators = [torch.Generator().manual_seed(int(word)) for word in expand_words(words, 1)[:, 0]]
    return torch.stack([_transform(policy, *each) for each in zip(images, generators, strict=True)])


def _transform(policy: Any, image: Tensor, generator: torch.Generator) -> Tensor:
    """What a policy of torchvision does to an image (C, H, W), with the random numbers of a generator.

    Torchvision draws from the global one, which a step of the training seeds meanwhile in another thread.
    """
    names = tuple(policy._AUGMENTATION_SPACE)
    for _ in range(getattr(policy, "num_ops", 1)):
        name, magnitude = names[int(torch.randint(len(names), (), generator=generator))], 0.0
        magnitudes_of, signed = policy._AUGMENTATION_SPACE[name]
        magnitudes = magnitudes_of(policy.num_magnitude_bins, *image.shape[-2:])
        if magnitudes is not None:
            level = getattr(policy, "magnitude", None)
            if level is None:  # of TrivialAugment
                level = int(torch.randint(policy.num_magnitude_bins, (), generator=generator))
            magnitude = float(magnitudes[level])
            if signed and torch.rand((), generator=generator) <= 0.5:
                magnitude = -magnitude
        options = {"interpolation": policy.interpolation, "fill": policy._fill}
        image = policy._apply_image_or_video_transform(image, name, magnitude, **options)
    return image


def erase_(images: Tensor, seeds: Words, rate: float) -> Tensor:
    """Random erasing: set a box of each normalized image of (B, C, H, W) to 0, with probability `rate`, in place."""
    if rate == 0:
        return images
    height, width = images.shape[-2:]
    for image, numbers in zip(images, _draw(seeds, _ERASE, 5), strict=True):
        if numbers[0] < rate:
            area = height * width * _between(numbers[1], _ERASED_AREA)
            ratio = math.exp(_between(numbers[2], (math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1]))))
            box_height = min(height, max(1, round(math.sqrt(area * ratio))))
            box_width = min(width, max(1, round(math.sqrt(area / ratio))))
            top = int(numbers[3] * (height - box_height + 1))
            left = int(numbers[4] * (width - box_width + 1))
            image[:, top : top + box_height, left : left + box_width] = 0
    return images


def _crop_box(height: int, width: int, numbers: NDArray[np.float64], scale: Range, ratio: Range) -> Box:
    low, high = ratio
    for area, shape, down, right in numbers.reshape(_CROP_ATTEMPTS, 4):
        box_area = height * width * _between(area, scale)
        box_ratio = math.exp(_between(shape, (math.log(low), math.log(high))))
        box_height, box_width = round(math.sqrt(box_area / box_ratio)), round(math.sqrt(box_area * box_ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            return (
                int(down * (height - box_height + 1)),
                int(right * (width - box_width + 1)),
                box_height,
                box_width,
            )
    box_height = min(height, max(1, round(width / low)))
    box_width = min(width, max(1, round(height * high)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _draw(seeds: Words, stream: np.uint64, count: int) -> NDArray[np.float64]:
    """Random numbers (B, count) in [0, 1) from one stream of each seed."""
    return uniform(expand_words(expand_words(seeds ^ stream, 1)[:, 0], count))


def _between(number: float, limits: Range) -> float:
    return limits[0] + number * (limits[1] - limits[0])


@cache
def _rand_augment(layers: int, magnitude: int, fill: tuple[int, ...], colors: bool) -> Any:
    from torchvision.transforms import v2  # takes 2.5 s, so only when RandAugment is used

    return _limited(v2.RandAugment(num_ops=layers, magnitude=magnitude, num_magnitude_bins=31, fill=list(fill)), colors)


@cache
def _trivial_augment(fill: tuple[int, ...], colors: bool) -> Any:
    from torchvision.transforms import v2

    return _limited(v2.TrivialAugmentWide(fill=list(fill)), colors)


def _limited(policy: Any, colors: bool) -> Any:
    """The policy, without `colors` with those of its operations that move pixels."""
    if not colors:
        space = policy._AUGMENTATION_SPACE.items()
        policy._AUGMENTATION_SPACE = {name: values for name, values in space if name in GEOMETRIC_OPERATIONS}
    return policy
