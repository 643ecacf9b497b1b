"""The convolutional block: MBConv with squeeze-excitation (paper, equation 5 and appendix A.1).

Shapes: B batch, C width, H W feature map.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatnet.model.inference_cache import InferenceCache
from coatnet.model.layers import (
    GELU,
    DepthwiseConv2d,
    MapLayerNorm,
    Shortcut,
    StochasticDepth,
    batch_norm,
    fold_batch_norm,
    mean_over_cells,
)

EXPANSION = 4  # paper: Table 3, "always 4"; relative to the output width, as the published FLOPs show
NORMS = {"batch": batch_norm, "layer": MapLayerNorm}


class ConvNormGELU(nn.Sequential):
    """GELU(Norm(Conv(x))): `(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))`.

    In evaluation, BatchNorm is folded into the convolution, which saves a pass over the widest feature maps.
    """

    def __init__(self, convolution: nn.Conv2d, *, norm: str) -> None:
        super().__init__(convolution, NORMS[norm](convolution.out_channels), GELU())
        self._folded: InferenceCache[tuple[Tensor, Tensor]] = InferenceCache()

    def train(self, mode: bool = True) -> Self:
        self._folded.clear()
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        convolution, norm, activation = self
        if not (
            isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and self._folded.is_usable(self)
        ):
            return super().forward(input)
        weights = (convolution.weight, *norm.parameters(), *norm.buffers())
        weight, bias = self._folded.get((), weights, lambda: fold_batch_norm(convolution, norm))
        x = F.conv2d(input, weight, bias, convolution.stride, convolution.padding, groups=convolution.groups)
        return activation(x)


class SqueezeExcite(nn.Module):
    """x * sigmoid(Excite(SiLU(Squeeze(mean(x))))): one gate per channel, computed from the whole feature map.

    `(B, C, H, W) -> (B, C, H, W)`
    """

    def __init__(self, width: int, squeezed_width: int, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        # chosen: biases, SiLU and sigmoid, from the authors' later code; the paper gives only the ratio.
        self.squeeze = nn.Linear(width, squeezed_width)
        self.activation = activation()
        self.excite = nn.Linear(squeezed_width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(self.activation(self.squeeze(mean_over_cells(x))))  # (B, C)
        return x * torch.sigmoid(gate)[:, :, None, None]


class MBConv(nn.Module):
    """x <- Proj(Pool(x)) + Project(SE(Depthwise(Expand(Norm(x), stride)))).

    `(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))`

    Args:
        stride: 1 or 2.
        downsample: the convolution that has the stride: "expand", the first 1x1 (equation 5), or "depthwise" (Table 9).
        norm: "batch" (the paper's choice) or "layer" (Table 8).
        stochastic_depth: probability of dropping the residual branch of an image in training.
    """

    def __init__(
        self, in_width: int, width: int, stride: int, *, downsample: str, norm: str, stochastic_depth: float
    ) -> None:
        super().__init__()
        hidden = EXPANSION * width
        expand_stride, depthwise_stride = (stride, 1) if downsample == "expand" else (1, stride)
        self.shortcut = Shortcut(in_width, width, stride)
        self.norm: nn.Module = NORMS[norm](in_width)
        self.expand = ConvNormGELU(nn.Conv2d(in_width, hidden, 1, expand_stride, bias=False), norm=norm)
        self.depthwise = ConvNormGELU(DepthwiseConv2d(hidden, 3, depthwise_stride), norm=norm)
        # paper: squeeze ratio 0.25; relative to the output width, as the published parameter counts show.
        self.squeeze_excite = SqueezeExcite(hidden, max(1, width // 4))
        # chosen: a bias, no norm after the projection and no activation after the first norm, from the authors' later
        # code.
        self.project = nn.Conv2d(hidden, width, kernel_size=1)
        self.stochastic_depth = StochasticDepth(stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.squeeze_excite(self.depthwise(self.expand(self.norm(x))))
        return self.shortcut(x) + self.stochastic_depth(self.project(residual))
