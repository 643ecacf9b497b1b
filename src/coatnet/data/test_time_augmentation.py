"""Test-time augmentation: several views of each image, whose probabilities are averaged.

Shapes: B images, V views of each, C channels, R resolution; H, W of the resized images, neither below R.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from coatnet.data.transforms import EvaluationTransform, Preprocessing, center_crop, match_channels, resize_with_margin
from coatnet.errors import UserError

NUM_VIEWS = {"one": 1, "flip": 2, "five-crop": 5, "ten-crop": 10, "ten-shift": 10}
CROPS = ("five-crop", "ten-crop")
SHIFTS_PER_SIDE = 28  # a shift is a pixel of 28, as it is in training by default


class MultiViewTransform(EvaluationTransform):
    """Resizes images, takes `num_views` views of each, which are neighbors in a batch, and normalizes them.

    Raises:
        UserError: as `check_views` and `check_crops`.
    """

    def __init__(self, preprocessing: Preprocessing, views: str) -> None:
        super().__init__(preprocessing)
        check_views(views)
        check_crops(views, preprocessing)
        self.views, self.num_views = views, NUM_VIEWS[views]

    def resize(self, images: Tensor) -> Tensor:
        """Everything but normalizing: uint8 (B, 1 or 3, H, W) to uint8 (B * V, 1 or C, R, R)."""
        return augmented_views(match_channels(images, self.preprocessing), self.preprocessing, self.views)


def check_views(views: str) -> None:
    """Raise UserError unless `views` is one of NUM_VIEWS."""
    if views not in NUM_VIEWS:
        raise UserError(f"views is {views!r}; it is one of {', '.join(NUM_VIEWS)}")


def check_crops(views: str, preprocessing: Preprocessing) -> None:
    """Raise UserError if `views` are crops, and all of them equal whatever the image."""
    if views in CROPS and preprocessing.crop == "squash" and preprocessing.resized_size == preprocessing.size:
        raise UserError(
            f"views {views} crop images, and this model sees all of each (crop squash, crop_fraction 1): the crops "
            "would be equal; take flip"
        )


def augmented_views(images: Tensor, preprocessing: Preprocessing, views: str) -> Tensor:
    """Resize images and take their views: uint8 (B, C, H', W') of any size to uint8 (B * V, C, R, R).

    The views of an image are neighbors, the center crop first.

    "one" is the center crop; "flip" adds its mirror image; "five-crop" adds the corner crops of the resized image (all
    five are equal for `crop_fraction` 1 and a square image); "ten-crop" is these five and their mirror images.
    "ten-shift", for networks that learned from shifted images, is the center crop, the same moved by 1/28 of its side
    up, down, left and right over black, and the mirror images of these five.
    """
    resized = resize_with_margin(images, preprocessing)  # (B, C, H, W)
    height, width = preprocessing.size
    center = center_crop(resized, height, width)  # (B, C, R, R)
    crops = [center]
    if views in CROPS:
        top, bottom = resized[..., :height, :], resized[..., -height:, :]
        crops += [edge[..., half] for edge in (top, bottom) for half in (slice(None, width), slice(-width, None))]
    elif views == "ten-shift":
        crops += _shifted(center)
    if views not in ("one", "five-crop"):
        crops += [crop.flip(-1) for crop in crops]
    return center if len(crops) == 1 else torch.stack(crops, dim=1).flatten(0, 1)


def _shifted(images: Tensor) -> list[Tensor]:
    """Images (B, C, H, W) moved up, down, left and right, (B, C, H, W) each."""
    height, width = images.shape[-2:]
    y, x = max(1, height // SHIFTS_PER_SIDE), max(1, width // SHIFTS_PER_SIDE)
    padded = F.pad(images, (x, x, y, y))
    corners = [(2 * y, x), (0, x), (y, 2 * x), (y, 0)]
    return [padded[..., top : top + height, left : left + width] for top, left in corners]
