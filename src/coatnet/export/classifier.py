"""The modules of an exported graph: preprocessing, the folded network, probabilities.

Shapes: B batch, H W pixels, N cells, R resolution, C channels, A heads, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.inference.graph import NormalizedNetwork, fold, replace_modules, to_probabilities
from coatnet.model.layers import Pool
from coatnet.model.network import CoAtNet
from coatnet.model.relative_bias import GlobalRelativeBias, RelativeBias


class Fit(nn.Module):
    """Images uint8 `(B, H, W, 3)` of any size to uint8 `(B, R, R, C)`: resized, then center-cropped.

    Where the preprocessing has a scale, float32 values `(B, H, W, C)` to levels in single precision.

    This is `data.transforms.resize_and_crop` as two products with matrices that follow from height and width by
    arithmetic alone, so one graph takes images of any size in every format, also where the format has no antialiasing.
    As in torch's kernel on uint8, weights are rounded to 16 bits and each of the two passes to whole gray levels.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = self.matrices(images)
        planes = match_color(images, self.preprocessing).permute(0, 3, 1, 2).float()
        if self.preprocessing.scale is not None:
            return (rows @ (planes @ columns.mT)).permute(0, 2, 3, 1)
        planes = to_levels(planes @ columns.mT)  # (B, C, H, R): rows first, as the kernel does
        planes = to_levels(rows @ planes)  # (B, C, R, R)
        return planes.permute(0, 2, 3, 1).to(torch.uint8)

    def matrices(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices that resize H rows and W columns to R: `(R, H)` and `(R, W)`."""
        seen = self.preprocessing
        height, width = (length_of(images, axis) for axis in (1, 2))
        tall, wide = (torch.full_like(height, side) for side in seen.resized_size)
        if seen.crop == "squash":
            return self.matrix(images, 1, height, tall), self.matrix(images, 2, width, wide)
        # As `data.transforms._resized_size` has it, in whole numbers.
        height = torch.minimum(height, quotient(4 * width * tall, wide).clamp(min=1))
        width = torch.minimum(width, quotient(4 * height * wide, tall).clamp(min=1))
        rows = torch.maximum(tall, quotient(wide * height, width))
        columns = torch.maximum(wide, quotient(tall * width, height))
        return self.matrix(images, 1, height, rows), self.matrix(images, 2, width, columns)

    def matrix(self, images: Tensor, axis: int, length: Tensor, size: Tensor) -> Tensor:
        """Resampling weights of one axis `(R, side)`: crop to `length`, resize to `size`, crop to R."""
        index = torch.arange(images.shape[axis]) - half(length_of(images, axis) - length)
        shown = self.preprocessing.size[axis - 1]
        place = torch.arange(shown)[:, None]
        weights = self.weights(index, place + half(size - shown), length, size)
        if self.preprocessing.scale is not None:
            return weights
        # The kernel rounds by the largest weight of all places, which is often one at the border.
        border = self.weights(index, place, length, size)
        return to_16_bits(weights, torch.maximum(weights.amax((0, 1)), border.amax((0, 1))))

    def weights(self, index: Tensor, place: Tensor, length: Tensor, size: Tensor) -> Tensor:
        """Weights of the pixels `index (side,)` at the places `(R, 1)`."""
        # Distance between the centers of pixel and place, in units of the filter: whole numbers, so without rounding.
        distance = (2 * index + 1) * size - (2 * place + 1) * length
        weights = FILTERS[self.preprocessing.interpolation](distance.float() / (2 * torch.maximum(size, length)))
        weights = torch.where((index >= 0) & (index < length), weights, 0.0)
        return weights / weights.sum(1, keepdim=True)


def linear(distance: Tensor) -> Tensor:
    """The triangle filter of width 2."""
    return (1 - distance.abs()).clamp(min=0)


def cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2, as in Pillow and torch where they antialias."""
    x = distance.abs().clamp(max=2)
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


FILTERS = {"bilinear": linear, "bicubic": cubic}


def match_color(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 `(B, H, W, 3)` to `(B, H, W, C)`: for a gray model the mean over colors; or values to levels of a scale."""
    if (scale := preprocessing.scale) is not None:
        values = torch.where(images.isnan() | images.isinf(), scale.low, images)
        return (values - scale.low) * (255 / (scale.high - scale.low))
    if preprocessing.channels == 3:
        return images
    return images.float().mean(-1, keepdim=True).round().to(torch.uint8)


def to_16_bits(weights: Tensor, largest: Tensor) -> Tensor:
    """Round to multiples of 2^-p, with the largest p up to 22 for which `largest` is below 2^15 of them."""
    one = 2.0 ** (32767.5 / largest).log2().floor().clamp(max=22)  # OpenVINO has pow, not exp2
    return (weights * one).round() / one


def to_levels(values: Tensor) -> Tensor:
    """Round to whole gray levels, as the kernel does after each of its two passes."""
    return (values + 0.5).floor().clamp(0, 255)


def length_of(images: Tensor, axis: int) -> Tensor:
    """A dynamic size as a tensor (1,): every format has arithmetic on tensors, few have it on sizes."""
    return torch.full((1,), images.shape[axis], dtype=torch.int64)


def half(margin: Tensor) -> Tensor:
    """The offset of a center crop: half of `margin`, rounded half to even as Python does."""
    return (margin / 2).round().to(torch.int64)


def quotient(number: Tensor, divisor: Tensor) -> Tensor:
    """number // divisor. ONNX divides integers as float32, which can round up to the next integer."""
    found = torch.div(number, divisor, rounding_mode="floor")
    return found - (found * divisor > number).to(torch.int64)


class Classifier(nn.Module):
    """Color images uint8 `(B, H, W, 3)` of any size to probabilities `(B, K)`, and novelty `(B,)` if calibrated.

    Args:
        bundle: the model.
        any_size: run the network at the size of the image, its biases resampled; otherwise the image is resized and
            cropped as the preprocessing says.
    """

    def __init__(self, bundle: Bundle, *, any_size: bool = False) -> None:
        super().__init__()
        self.fit = MatchChannels(bundle.preprocessing) if any_size else Fit(bundle.preprocessing)
        self.network = ImageProbabilities(bundle, any_size=any_size)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.network(self.fit(images))


class ImageProbabilities(nn.Module):
    """Images uint8 `(B, R, R, C)` to probabilities `(B, K)`: a softmax, or K sigmoids for several labels.

    With a calibrated bundle, a tuple with the novelty `(B,)`.
    """

    def __init__(self, bundle: Bundle, *, any_size: bool = False) -> None:
        super().__init__()
        self.network = NormalizedNetwork(bundle, any_size=any_size)
        if any_size:
            allow_dynamic_sizes(self.network.network)
        self.multilabel, self.num_classes = bundle.multilabel, len(bundle.classes)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        found = self.network(images)  # (B, K), or (B, K + 1)
        probabilities = to_probabilities(found[:, : self.num_classes], multilabel=self.multilabel)
        return probabilities if self.network.novelty is None else (probabilities, found[:, self.num_classes])


class MatchChannels(nn.Module):
    """Images uint8 `(B, H, W, 3)` to `(B, H, W, C)`."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> Tensor:
        return match_color(images, self.preprocessing)


class DynamicBias(nn.Module):
    """The relative bias of any grid, for a graph with dynamic height and width: no branch depends on them."""

    def __init__(self, bias: GlobalRelativeBias) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """`(A, N, N)`: the table, resampled, read at the offset of each query from each key."""
        height, width = grid
        size = (2 * height - 1, 2 * width - 1)
        if isinstance(self.bias, RelativeBias):  # at its own size, resampling is the identity
            table = F.interpolate(self.bias.table[None], size=size, mode="bilinear", align_corners=False)[0]
        else:
            table = self.bias.table_for(grid)
        rows, columns = (torch.arange(side)[:, None] - torch.arange(side) + side - 1 for side in grid)
        place = rows[:, None, :, None] * size[1] + columns[None, :, None, :]  # (H, W, H, W)
        places = place.flatten(2, 3).flatten(0, 1)
        return table.flatten(1)[:, places].to(dtype)


class DynamicPool(nn.Module):
    """`Pool` for a graph with dynamic height and width.

    There torch's compiler (2.14) drops the window of an odd last row or column. Padded by one, the rounding is
    downwards and the result the same: for even sizes the padding lies in no window.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 2)


def bare_network(bundle: Bundle, *, any_size: bool = False) -> CoAtNet:
    """The network alone: normalized images float32 `(B, C, R, R)` to logits `(B, K)`."""
    network = fold(bundle.model, any_size=any_size, resolution=bundle.preprocessing.size)
    if any_size:
        allow_dynamic_sizes(network)
    return network


def allow_dynamic_sizes(network: CoAtNet) -> None:
    """Replace, in place, the biases and poolings by those that follow a dynamic image size."""
    replace_modules(network, GlobalRelativeBias, DynamicBias)
    replace_modules(network, Pool, lambda _: DynamicPool())
