"""Targets of training: one-hot labels, smoothed, and mixed between images by MixUp or CutMix.

MixUp: Zhang et al. 2017. CutMix: Yun et al. 2019. Shapes: B batch, K classes, C channels, H W the image.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coatnet.system.validated import FractionBelowOne, NonNegativeFloat, validated


@validated
class Mixing:
    """How strongly images are blended; with both MixUp and CutMix, a coin chooses for each batch."""

    mixup_alpha: NonNegativeFloat = 0.0
    """MixUp draws the weight of one of two blended images from Beta(alpha, alpha), 0 for none; by default
    0.2 for photographs without `init` in 25 epochs or more, else 0."""
    cutmix_alpha: NonNegativeFloat = 0.0
    """CutMix draws the area that stays of an image from Beta(alpha, alpha), 0 for none."""
    label_smoothing: FractionBelowOne = 0.0
    """Part of each target spread evenly over the classes; by default 0.1, and 0 for several labels per image."""


def mix(images: Tensor, labels: Tensor, *, num_classes: int, mixing: Mixing, seed: int) -> tuple[Tensor, Tensor]:
    """Mix each image and its target with its neighbor in the batch, by MixUp or CutMix.

    Args:
        images: (B, C, H, W).
        labels: class indices (B,), or 0 and 1 per class (B, K).
        seed: decides the kind, if both are on, and the share; other streams are not touched.

    Returns:
        Mixed images (B, C, H, W) and targets (B, K). Without mixing, the images are returned as they are.
    """
    targets = smooth(labels, num_classes=num_classes, label_smoothing=mixing.label_smoothing)
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(mixing, f"{kind}_alpha")]
    if not kinds:
        return images, targets

    random = np.random.default_rng(seed % 2**64)
    kind = kinds[random.integers(len(kinds))]
    share = float(random.beta(*2 * [getattr(mixing, f"{kind}_alpha")]))
    partners = torch.arange(len(images), device=images.device).roll(1)
    if kind == "mixup":
        images = images * share + images[partners] * (1 - share)
    else:
        images, share = _cut(images, partners, share, random)
    return images, targets * share + targets[partners] * (1 - share)


def smooth(labels: Tensor, *, num_classes: int, label_smoothing: float) -> Tensor:
    """Targets (B, K): class indices (B,) smoothed towards 1 / K, or 0 and 1 per class (B, K) towards 1 / 2."""
    if labels.ndim == 1:
        targets, middle = F.one_hot(labels.long(), num_classes).float(), 1 / num_classes
    else:
        targets, middle = labels.float(), 0.5
    return targets * (1 - label_smoothing) + label_smoothing * middle


def _cut(images: Tensor, partners: Tensor, share: float, random: np.random.Generator) -> tuple[Tensor, float]:
    """Paste a box of each partner, `1 - share` of the area unless clipped; returns images and the share left."""
    height, width = images.shape[-2:]
    side = math.sqrt(1 - share)
    middle_y, middle_x = random.integers(height), random.integers(width)
    half_height, half_width = int(height * side / 2), int(width * side / 2)
    rows = slice(max(0, middle_y - half_height), min(height, middle_y + half_height))
    columns = slice(max(0, middle_x - half_width), min(width, middle_x + half_width))
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[partners][:, :, rows, columns]
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
