"""Several looks at one image, whose answers are averaged: the image itself, its mirror image, its corners.

Shapes: V views, C channels, R resolution; H W the resized image, neither below R.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from coatnet.data.transforms import Preprocessing, center, scale
from coatnet.errors import UserError

Views = Literal["one", "flip", "five-crop", "ten-crop"]


def check_views(views: str) -> None:
    """Raises UserError if there are no such views."""
    if views not in get_args(Views):
        raise UserError(f"views is {views!r}; it is one of {', '.join(get_args(Views))}")


def num_views(views: str) -> int:
    """V."""
    return {"one": 1, "flip": 2, "five-crop": 5, "ten-crop": 10}[views]


def look(image: Tensor, preprocessing: Preprocessing, views: str) -> Tensor:
    """uint8 (C, H, W), of any size, to uint8 (V, C, R, R).

    "flip" is the middle and its mirror image, "five-crop" the middle and the corners of the resized image (with
    `crop_fraction` 1 and a square image five times the same), "ten-crop" these and their mirror images.
    """
    resized, side = scale(image[None], preprocessing), preprocessing.resolution
    seen = center(resized, side, side)
    if views in ("five-crop", "ten-crop"):
        top, bottom = resized[..., :side, :], resized[..., -side:, :]
        corners = [edge[..., half] for edge in (top, bottom) for half in (slice(None, side), slice(-side, None))]
        seen = torch.cat([seen, *corners])
    return torch.cat([seen, seen.flip(-1)]) if views in ("flip", "ten-crop") else seen
