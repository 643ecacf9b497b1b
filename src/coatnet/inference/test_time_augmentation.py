"""Test-time augmentation: several views of one image, whose probabilities are averaged.

Shapes: V views, C channels, R resolution; H, W of the resized image, neither below R.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from coatnet.data.transforms import Preprocessing, center_crop, resize_with_margin
from coatnet.errors import UserError

NUM_VIEWS = {"one": 1, "flip": 2, "five-crop": 5, "ten-crop": 10, "ten-shift": 10}
SHIFTS_PER_SIDE = 28  # a shift is a pixel of 28, as it is in training by default


def check_views(views: str) -> None:
    """Raise UserError unless `views` is one of NUM_VIEWS."""
    if views not in NUM_VIEWS:
        raise UserError(f"views is {views!r}; it is one of {', '.join(NUM_VIEWS)}")


def augmented_views(image: Tensor, preprocessing: Preprocessing, views: str) -> Tensor:
    """Resize an image and take its views: uint8 (C, H', W') of any size to uint8 (V, C, R, R).

    "one" is the center crop; "flip" adds its mirror image; "five-crop" adds the corner crops of the resized image (all
    five are equal for `crop_fraction` 1 and a square image); "ten-crop" is these five and their mirror images.
    "ten-shift", for networks that learned from shifted images, is the center crop, the same moved by 1/28 of its side
    up, down, left and right over black, and the mirror images of these five.
    """
    resized = resize_with_margin(image[None], preprocessing)  # (1, C, H, W)
    height, width = preprocessing.size
    crops = center_crop(resized, height, width)  # (1, C, R, R)
    if views in ("five-crop", "ten-crop"):
        top, bottom = resized[..., :height, :], resized[..., -height:, :]
        corners = [edge[..., half] for edge in (top, bottom) for half in (slice(None, width), slice(-width, None))]
        crops = torch.cat([crops, *corners])  # (5, C, R, R)
    elif views == "ten-shift":
        crops = _shifted(crops)  # (5, C, R, R)
    return crops if views in ("one", "five-crop") else torch.cat([crops, crops.flip(-1)])


def _shifted(image: Tensor) -> Tensor:
    """(1, C, H, W) as it is, moved up, down, left and right: (5, C, H, W)."""
    height, width = image.shape[-2:]
    y, x = max(1, height // SHIFTS_PER_SIDE), max(1, width // SHIFTS_PER_SIDE)
    padded = F.pad(image, (x, x, y, y))
    corners = [(y, x), (2 * y, x), (0, x), (y, 2 * x), (y, 0)]
    return torch.cat([padded[..., top : top + height, left : left + width] for top, left in corners])
