"""The blocks of timm's CoAtNets, and which of them a `TimmVariant` builds.

Order, biases and constants: timm 1.0.31, as the constructed networks show them.

Shapes: B batch, C width, H W feature map, K classes.
"""

from functools import partial

import torch
from torch import Tensor, nn

from coatnet.model.attention import RelativeAttention
from coatnet.model.config import Stage
from coatnet.model.layers import Head, MapLayerNorm, StochasticDepth, build_classifier, mean_over_cells
from coatnet.model.mbconv import EXPANSION, SqueezeExcite
from coatnet.model.relative_bias import GlobalBias, RelativeBias
from coatnet.model.timm.config import TimmVariant
from coatnet.model.transformer import FeedForward

EPSILON = 1e-6  # of LayerNorm, and of BatchNorm where it takes its place
CONVNEXT_SCALE = 1e-5
LOG_BIAS_DROPOUT = 0.125  # of the hidden units, in training

ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}
POOLS = {
    # An odd last row or column is a window of its own, as for the paper's Pool; even maps are timm's exactly.
    "average": partial(nn.AvgPool2d, kernel_size=2, stride=2, ceil_mode=True),
    "max": partial(nn.MaxPool2d, kernel_size=3, stride=2, padding=1),
}
TRANSFORMER_NORMS = {
    "layer": partial(MapLayerNorm, epsilon=EPSILON),
    "batch": partial(nn.BatchNorm2d, eps=EPSILON),
}


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


def build_stem(variant: TimmVariant, in_channels: int) -> nn.Module:
    """Two 3x3 convolutions without biases, norm and activation between them."""
    first, width = variant.stem_first_width, variant.stem_width
    norm = TRANSFORMER_NORMS["layer"] if variant.convolution == "convnext" else nn.BatchNorm2d
    stem = nn.Sequential()
    stem.add_module("first", nn.Conv2d(in_channels, first, 3, stride=2, padding=1, bias=False))
    stem.add_module("norm", norm(first))
    stem.add_module("activation", ACTIVATIONS[variant.activation]())
    stem.add_module("second", nn.Conv2d(first, width, 3, padding=1, bias=False))
    return stem


def build_block(
    variant: TimmVariant, stage: Stage, in_width: int, stride: int, side: int, stochastic_depth: float
) -> nn.Module:
    """One block of a stage, with a grid of side x side cells behind it."""
    if stage.kind == "transformer":
        return build_transformer(variant, in_width, stage.width, stride, side, stochastic_depth)
    build_branch = build_convnext if variant.convolution == "convnext" else build_mbconv
    shortcut = build_shortcut(variant, in_width, stage.width, stride, bias=variant.convolution_bias)
    return Residual(shortcut, build_branch(variant, in_width, stage.width, stride), stochastic_depth)


def build_shortcut(variant: TimmVariant, in_width: int, width: int, stride: int, *, bias: bool) -> nn.Sequential:
    """Pool where the block strides, project where it widens."""
    shortcut = nn.Sequential()
    if stride == 2:
        shortcut.add_module("pool", POOLS[variant.pool]())
    if in_width != width:
        shortcut.add_module("project", nn.Conv2d(in_width, width, 1, bias=bias))
    return shortcut


def build_mbconv(variant: TimmVariant, in_width: int, width: int, stride: int) -> nn.Sequential:
    """Norm, expand, depthwise, squeeze-excite, project; no norm behind the last."""
    activation = ACTIVATIONS[variant.activation]
    hidden, squeezed = EXPANSION * width, width // 4
    if variant.expansion_of == "input":
        hidden, squeezed = EXPANSION * in_width, in_width
    gate = SqueezeExcite(hidden, squeezed, ACTIVATIONS[variant.gate_activation])
    branch = nn.Sequential()
    branch.add_module("norm", nn.BatchNorm2d(in_width))
    if variant.pre_activation:
        branch.add_module("activation", activation())
    if stride == 2 and variant.stride_in == "pool":
        branch.add_module("pool", POOLS["average"]())
    branch.add_module("expand", nn.Conv2d(in_width, hidden, 1, bias=False))
    branch.add_module("expand_norm", nn.BatchNorm2d(hidden))
    branch.add_module("expand_activation", activation())
    depthwise_stride = stride if variant.stride_in == "depthwise" else 1
    branch.add_module(
        "depthwise", nn.Conv2d(hidden, hidden, 3, stride=depthwise_stride, padding=1, groups=hidden, bias=False)
    )
    if variant.squeeze_excite == "early":
        branch.add_module("squeeze_excite", gate)
    branch.add_module("depthwise_norm", nn.BatchNorm2d(hidden))
    branch.add_module("depthwise_activation", activation())
    if variant.squeeze_excite == "late":
        branch.add_module("squeeze_excite", gate)
    branch.add_module("project", nn.Conv2d(hidden, width, 1, bias=variant.convolution_bias))
    return branch


def build_convnext(variant: TimmVariant, in_width: int, width: int, stride: int) -> nn.Sequential:
    """A 7x7 depthwise convolution, norm, feed-forward (Liu et al. 2022)."""
    branch = nn.Sequential()
    branch.add_module("depthwise", nn.Conv2d(in_width, width, 7, stride=stride, padding=3, groups=in_width))
    branch.add_module("norm", MapLayerNorm(width, EPSILON))
    branch.add_module("feed_forward", FeedForward(width))
    branch.add_module("scale", LayerScale(width, CONVNEXT_SCALE))
    return branch


def build_transformer(
    variant: TimmVariant, in_width: int, width: int, stride: int, side: int, stochastic_depth: float
) -> nn.Sequential:
    """Attention and feed-forward, each a residual; norm before pool where the block strides."""
    norm = TRANSFORMER_NORMS[variant.transformer_norm]
    attend = nn.Sequential()
    attend.add_module("norm", norm(in_width))
    if stride == 2:
        attend.add_module("pool", POOLS[variant.pool]())
    attend.add_module("attention", build_attention(variant, in_width, width, side))
    feed_forward = nn.Sequential()
    feed_forward.add_module("norm", norm(width))
    feed_forward.add_module("feed_forward", FeedForward(width))
    if variant.layer_scale:
        for branch in (attend, feed_forward):
            branch.add_module("scale", LayerScale(width, variant.layer_scale))
    shortcut = build_shortcut(variant, in_width, width, stride, bias=variant.shortcut_bias)
    block = nn.Sequential()
    block.add_module("attend", Residual(shortcut, attend, stochastic_depth))
    block.add_module("feed_forward", Residual(nn.Identity(), feed_forward, stochastic_depth))
    return block


def build_attention(variant: TimmVariant, in_width: int, width: int, side: int) -> nn.Module:
    """Relative attention in the wider or the narrower of its two widths, for a grid of side x side cells."""
    kind = NarrowRelativeAttention if variant.attention_width == "input" else RelativeAttention
    num_heads = (in_width if variant.attention_width == "input" else width) // variant.head_dim
    bias: GlobalBias = RelativeBias(num_heads, (side, side))
    if variant.relative_bias == "mlp":
        bias = LogOffsetBias(num_heads, variant.mlp_width)
    return kind(in_width, width, variant.head_dim, bias)


def build_head(variant: TimmVariant, num_classes: int) -> nn.Module:
    """What makes logits of the last map."""
    width = variant.stages[-1].width
    if variant.head == "hidden":
        return Head(width, num_classes, EPSILON)
    return MeanHead(TRANSFORMER_NORMS[variant.transformer_norm](width), width, num_classes)
