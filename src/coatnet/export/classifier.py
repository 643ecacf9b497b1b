"""The modules of an exported graph: preprocessing, the folded network, probabilities.

Shapes: B batch, H W pixels, N cells, R resolution, C channels, A heads, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.export.resizing import Fit, match_colour
from coatnet.inference.graph import NormalizedNetwork, fold, replace_modules, to_probabilities
from coatnet.model.layers import Pool
from coatnet.model.network import CoAtNet
from coatnet.model.relative_bias import GlobalRelativeBias, RelativeBias


class Classifier(nn.Module):
    """Colour images uint8 `(B, H, W, 3)` of any size to probabilities `(B, K)`.

    Args:
        bundle: the model.
        any_size: run the network at the size of the image, its biases resampled; otherwise the image is resized and
            cropped as the preprocessing says.
    """

    def __init__(self, bundle: Bundle, *, any_size: bool = False) -> None:
        super().__init__()
        self.fit = MatchChannels(bundle.preprocessing) if any_size else Fit(bundle.preprocessing)
        self.network = ImageProbabilities(bundle, any_size=any_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.fit(images))


class ImageProbabilities(nn.Module):
    """Images uint8 `(B, R, R, C)` to probabilities `(B, K)`: a softmax, or K sigmoids for several labels."""

    def __init__(self, bundle: Bundle, *, any_size: bool = False) -> None:
        super().__init__()
        self.network = NormalizedNetwork(bundle, any_size=any_size)
        if any_size:
            allow_dynamic_sizes(self.network.network)
        self.multilabel = bundle.multilabel

    def forward(self, images: Tensor) -> Tensor:
        return to_probabilities(self.network(images), multilabel=self.multilabel)


class MatchChannels(nn.Module):
    """Images uint8 `(B, H, W, 3)` to `(B, H, W, C)`."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> Tensor:
        return match_colour(images, self.preprocessing)


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
    """The network alone: normalised images float32 `(B, C, R, R)` to logits `(B, K)`."""
    network = fold(bundle.model, any_size=any_size)
    if any_size:
        allow_dynamic_sizes(network)
    return network


def allow_dynamic_sizes(network: CoAtNet) -> None:
    """Replace, in place, the biases and poolings by those that follow a dynamic image size."""
    replace_modules(network, GlobalRelativeBias, DynamicBias)
    replace_modules(network, Pool, lambda _: DynamicPool())
