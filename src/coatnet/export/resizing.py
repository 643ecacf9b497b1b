"""Resizing and cutting inside a graph: `data.transforms.fit`, as two products with matrices.

The matrices follow from height and width by arithmetic alone, so one graph takes images of any size in every format,
also where the format knows no antialiasing. As in torch's kernel on uint8, weights are rounded to 16 bits and each of
the two passes to whole grey levels.

Shapes: B images, H W any size, R resolution, C channels (3, or 1 for grey models).
"""

import math

import torch
from torch import Tensor, nn

from coatnet.data.transforms import Preprocessing


class Fit(nn.Module):
    """Images uint8 `(B, H, W, 3)` of any size to uint8 `(B, R, R, C)`: resized, then the middle cut out."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = self.matrices(images)
        planes = match_colour(images, self.preprocessing).permute(0, 3, 1, 2).float()
        planes = to_levels(planes @ columns.mT)  # (B, C, H, R): rows first, as the kernel does
        planes = to_levels(rows @ planes)  # (B, C, R, R)
        return planes.permute(0, 2, 3, 1).to(torch.uint8)

    def matrices(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What makes R rows of H and R columns of W: `(R, H)` and `(R, W)`."""
        seen = self.preprocessing
        height, width = (length_of(images, axis) for axis in (1, 2))
        side = torch.full_like(height, math.floor(seen.resolution / seen.crop_fraction))
        if seen.crop == "squash":
            return self.matrix(images, 1, height, side), self.matrix(images, 2, width, side)
        # As `data.transforms.scale` has it, in whole numbers.
        short = torch.minimum(height, width)
        height, width = torch.minimum(height, 4 * short), torch.minimum(width, 4 * short)
        rows = torch.maximum(side, quotient(side * height, width))
        columns = torch.maximum(side, quotient(side * width, height))
        return self.matrix(images, 1, height, rows), self.matrix(images, 2, width, columns)

    def matrix(self, images: Tensor, axis: int, kept: Tensor, size: Tensor) -> Tensor:
        """Of an axis, its middle `kept` resized to `size`, the middle R of it: weights of its pixels, `(R, length)`."""
        index = torch.arange(images.shape[axis]) - half(length_of(images, axis) - kept)
        place = torch.arange(self.preprocessing.resolution)[:, None]
        weights = self.weights(index, place + half(size - self.preprocessing.resolution), kept, size)
        # The kernel rounds as the largest weight of all places has it, which is often one at the border.
        border = self.weights(index, place, kept, size)
        return to_16_bits(weights, torch.maximum(weights.amax((0, 1)), border.amax((0, 1))))

    def weights(self, index: Tensor, place: Tensor, kept: Tensor, size: Tensor) -> Tensor:
        """Of pixels `(length,)` in places `(R, 1)`."""
        # Between the middles of a pixel and of a place, in units of the filter: whole numbers, so without any rounding.
        distance = (2 * index + 1) * size - (2 * place + 1) * kept
        weights = FILTERS[self.preprocessing.interpolation](distance.float() / (2 * torch.maximum(size, kept)))
        weights = torch.where((index >= 0) & (index < kept), weights, 0.0)
        return weights / weights.sum(1, keepdim=True)


def linear(distance: Tensor) -> Tensor:
    """A triangle of width 2."""
    return (1 - distance.abs()).clamp(min=0)


def cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2, as in Pillow and torch where they antialias."""
    x = distance.abs().clamp(max=2)
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


FILTERS = {"bilinear": linear, "bicubic": cubic}


def match_colour(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 `(B, H, W, 3)` to `(B, H, W, C)`: colour is averaged for a grey model."""
    if preprocessing.channels == 3:
        return images
    return images.float().mean(-1, keepdim=True).round().to(torch.uint8)


def to_16_bits(weights: Tensor, largest: Tensor) -> Tensor:
    """Multiples of the smallest 2^-p of which the largest has less than 2^15, p at most 22."""
    one = 2.0 ** (32767.5 / largest).log2().floor().clamp(max=22)  # a power, which OpenVINO has; not exp2
    return (weights * one).round() / one


def to_levels(values: Tensor) -> Tensor:
    """To the nearest grey level; the kernel does so after each of its two passes."""
    return (values + 0.5).floor().clamp(0, 255)


def length_of(images: Tensor, axis: int) -> Tensor:
    """A free size as a number in the graph: every format has arithmetic on tensors, few have it on sizes."""
    return torch.full((1,), images.shape[axis], dtype=torch.int64)


def half(margin: Tensor) -> Tensor:
    """Where a middle begins: half of what is left over, halves to the even number, as Python rounds."""
    return (margin / 2).round().to(torch.int64)


def quotient(number: Tensor, divisor: Tensor) -> Tensor:
    """number // divisor; ONNX divides whole numbers as float32, which can round up to the next whole one."""
    found = torch.div(number, divisor, rounding_mode="floor")
    return found - (found * divisor > number).to(torch.int64)
