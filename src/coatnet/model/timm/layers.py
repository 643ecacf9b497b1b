"""The parts of timm's CoAtNets that the paper's do not have.

Shapes: B batch, C width, H W feature map, K classes.
"""

import torch
from torch import Tensor, nn

from coatnet.model.attention import RelativeAttention
from coatnet.model.head import build_classifier
from coatnet.model.layers import StochasticDepth, mean_over_cells
from coatnet.model.relative_bias import GlobalBias

LOG_BIAS_DROPOUT = 0.125  # timm's, on the hidden units while training


class Residual(nn.Module):
    """x <- Shortcut(x) + Branch(x): every block of timm's is one of these or two.

    `(B, C, H, W) -> (B, C', H', W')`
    """

    def __init__(self, shortcut: nn.Module, branch: nn.Module, stochastic_depth: float) -> None:
        super().__init__()
        self.shortcut, self.branch = shortcut, branch
        self.stochastic_depth = StochasticDepth(stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.stochastic_depth(self.branch(x))


class LayerScale(nn.Module):
    """gain * x, one gain a channel, that begin small (Touvron et al. 2021): `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, width: int, initial_gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), initial_gain))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain[:, None, None]


class NarrowRelativeAttention(RelativeAttention):
    """Relative attention in the width that comes in; the output projection changes to the width that goes out."""

    def __init__(self, in_width: int, width: int, head_dim: int, relative_bias: GlobalBias) -> None:
        super().__init__(in_width, in_width, head_dim, relative_bias)
        self.output = nn.Conv2d(in_width, width, kernel_size=1)


class LogOffsetBias(GlobalBias):
    """A small network from the offset in log-coordinates to a scalar for each head (Swin V2): any grid natively.

    The coordinates of offset d are sign(d) ln(1 + |d|), in cells, rows before columns.
    """

    def __init__(self, num_heads: int, hidden_width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, hidden_width)
        self.dropout = nn.Dropout(LOG_BIAS_DROPOUT)
        self.output = nn.Linear(hidden_width, num_heads)

    def table_for(self, grid: tuple[int, int]) -> Tensor:
        device = self.hidden.weight.device
        axes = [torch.arange(1 - side, side, device=device, dtype=torch.float32) for side in grid]
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (2H-1, 2W-1, 2)
        coordinates = offsets.sign() * offsets.abs().log1p()
        return self.output(self.dropout(self.hidden(coordinates).relu())).permute(2, 0, 1)


class MeanHead(nn.Module):
    """W mean(Norm(x)): `(B, C, H, W) -> (B, K)`."""

    def __init__(self, norm: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = norm
        self.classifier = build_classifier(width, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = mean_over_cells(self.norm(x))
        return features if pre_logits else self.classifier(features)
