"""Test-time augmentation: several views of one image, whose probabilities are averaged.

Shapes: V views, C channels, R resolution; H, W of the resized image, neither below R.
"""

import torch
from torch import Tensor

from coatnet.data.transforms import Preprocessing, center_crop, resize_with_margin
from coatnet.errors import UserError

NUM_VIEWS = {"one": 1, "flip": 2, "five-crop": 5, "ten-crop": 10}


def check_views(views: str) -> None:
    """Raise UserError unless `views` is one, flip, five-crop or ten-crop."""
    if views not in NUM_VIEWS:
        raise UserError(f"views is {views!r}; it is one of {', '.join(NUM_VIEWS)}")


def augmented_views(image: Tensor, preprocessing: Preprocessing, views: str) -> Tensor:
    """Resize an image and take its views: uint8 (C, H', W') of any size to uint8 (V, C, R, R).

    "one" is the center crop; "flip" adds its mirror image; "five-crop" adds the corner crops of the resized image (all
    five are equal for `crop_fraction` 1 and a square image); "ten-crop" is these five and their mirror images.
    """
    resized = resize_with_margin(image[None], preprocessing)  # (1, C, H, W)
    height, width = preprocessing.size
    crops = center_crop(resized, height, width)  # (1, C, R, R)
    if views in ("five-crop", "ten-crop"):
        top, bottom = resized[..., :height, :], resized[..., -height:, :]
        corners = [edge[..., half] for edge in (top, bottom) for half in (slice(None, width), slice(-width, None))]
        crops = torch.cat([crops, *corners])  # (5, C, R, R)
    return torch.cat([crops, crops.flip(-1)]) if views in ("flip", "ten-crop") else crops
