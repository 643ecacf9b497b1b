"""The convolutional block: MBConv with squeeze-excitation (paper, equation 5 and appendix A.1).

Shapes: B batch, C width, H W feature map.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatnet.model.inference_cache import InferenceCache
from coatnet.model.layers import MapLayerNorm, Shortcut, StochasticDepth, batch_norm, fold_batch_norm, mean_over_cells

EXPANSION = 4  # paper: Table 3, "expansion of inverted bottleneck always 4"; of the output width, as the FLOPs show
NORMS = {"batch": batch_norm, "layer": MapLayerNorm}


class ConvNormGELU(nn.Sequential):
    """GELU(Norm(Conv(x))): `(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))`.

    In evaluation a BatchNorm is folded into the convolution in front of it, which spares a pass over the widest maps.
    """

    def __init__(
        self, in_width: int, width: int, kernel_size: int, *, norm: str, stride: int = 1, groups: int = 1
    ) -> None:
        # chosen: the exact GELU, on CPUs the faster one (24 ms against 29 ms for 19 M bf16 values).
        # chosen: symmetric padding, so that a map and its mirror image give mirrored maps.
        convolution = nn.Conv2d(
            in_width, width, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False
        )
        super().__init__(convolution, NORMS[norm](width), nn.GELU())
        self._kept: InferenceCache[tuple[Tensor, Tensor]] = InferenceCache()

    def train(self, mode: bool = True) -> Self:
        self._kept.forget()
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        convolution, norm, activation = self
        if not (isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and self._kept.serves(self)):
            return super().forward(input)
        weights = (convolution.weight, *norm.parameters(), *norm.buffers())
        weight, bias = self._kept.get((), weights, lambda: fold_batch_norm(convolution, norm))
        folded = F.conv2d(input, weight, bias, convolution.stride, convolution.padding, groups=convolution.groups)
        return activation(folded)


class SqueezeExcite(nn.Module):
    """x * sigmoid(Expand(SiLU(Squeeze(mean(x))))): one gate a channel, from the whole map.

    `(B, C, H, W) -> (B, C, H, W)`
    """

    def __init__(self, width: int, squeezed_width: int, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        # chosen: biases, SiLU and sigmoid, from the authors' later code; the paper gives only the ratio.
        self.squeeze = nn.Linear(width, squeezed_width)
        self.activation = activation()
        self.excite = nn.Linear(squeezed_width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(self.activation(self.squeeze(mean_over_cells(x))))
        return x * torch.sigmoid(gate)[:, :, None, None]


class MBConv(nn.Module):
    """x <- Proj(Pool(x)) + Project(SE(Depthwise(Expand(Norm(x), stride)))).

    `(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))`

    Args:
        downsample: where the stride sits: "expand", the first 1x1 (equation 5), or "depthwise" (Table 9).
        norm: "batch" (the paper's), or "layer" (Table 8).
    """

    def __init__(
        self, in_width: int, width: int, stride: int, *, downsample: str, norm: str, stochastic_depth: float
    ) -> None:
        super().__init__()
        hidden = EXPANSION * width
        expand_stride, depthwise_stride = (stride, 1) if downsample == "expand" else (1, stride)
        self.shortcut = Shortcut(in_width, width, stride)
        self.norm: nn.Module = NORMS[norm](in_width)
        self.expand = ConvNormGELU(in_width, hidden, 1, norm=norm, stride=expand_stride)
        self.depthwise = ConvNormGELU(hidden, hidden, 3, norm=norm, stride=depthwise_stride, groups=hidden)
        # paper: squeeze ratio 0.25; of the output width, as the published parameter counts show.
        self.squeeze_excite = SqueezeExcite(hidden, max(1, width // 4))
        # chosen: a bias and no norm behind it, no activation behind the first norm, from the authors' later code.
        self.project = nn.Conv2d(hidden, width, kernel_size=1)
        self.stochastic_depth = StochasticDepth(stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.squeeze_excite(self.depthwise(self.expand(self.norm(x))))
        return self.shortcut(x) + self.stochastic_depth(self.project(residual))
