"""Blocks that only timm's CoAtNets have, and functions that build the modules of a `TimmVariant`.

Order, biases and constants are those of the networks that timm 1.0.31 constructs.

Shapes: B batch, C width, H W feature map, K classes.
"""

from functools import partial

import torch
from torch import Tensor, nn

from coatnet.model.attention import RelativeAttention
from coatnet.model.config import Stage
from coatnet.model.layers import (
    GELU,
    DepthwiseConv2d,
    Head,
    MapLayerNorm,
    StochasticDepth,
    build_classifier,
    mean_over_cells,
)
from coatnet.model.mbconv import EXPANSION, SqueezeExcite
from coatnet.model.relative_bias import GlobalRelativeBias, RelativeBias
from coatnet.model.timm.config import TimmVariant
from coatnet.model.transformer import FeedForward

EPSILON = 1e-6  # of LayerNorm, and of BatchNorm in its place
CONVNEXT_SCALE = 1e-5
LOG_BIAS_DROPOUT = 0.125  # of the hidden units, in training

ACTIVATIONS = {"gelu": GELU, "silu": nn.SiLU, "relu": nn.ReLU}
POOLS = {
    # Rounded up for odd sizes, like the paper's Pool; for even sizes equal to timm's.
    "average": partial(nn.AvgPool2d, kernel_size=2, stride=2, ceil_mode=True),
    "max": partial(nn.MaxPool2d, kernel_size=3, stride=2, padding=1),
}
TRANSFORMER_NORMS = {
    "layer": partial(MapLayerNorm, epsilon=EPSILON),
    "batch": partial(nn.BatchNorm2d, eps=EPSILON),
}


class Residual(nn.Module):
    """x <- Shortcut(x) + Branch(x): `(B, C, H, W) -> (B, C', H', W')`. A block of timm's is one or two of these."""

    def __init__(self, shortcut: nn.Module, branch: nn.Module, stochastic_depth: float) -> None:
        super().__init__()
        self.shortcut, self.branch = shortcut, branch
        self.stochastic_depth = StochasticDepth(stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.stochastic_depth(self.branch(x))


class LayerScale(nn.Module):
    """gain * x with one trainable gain per channel (Touvron et al. 2021): `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, width: int, initial_gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), initial_gain))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain[:, None, None]


class NarrowRelativeAttention(RelativeAttention):
    """Relative attention at the input width; the output projection changes to the output width."""

    def __init__(self, in_width: int, width: int, head_dim: int, relative_bias: GlobalRelativeBias) -> None:
        super().__init__(in_width, in_width, head_dim, relative_bias)
        self.output = nn.Conv2d(in_width, width, kernel_size=1)


class LogOffsetBias(GlobalRelativeBias):
    """Relative bias as an MLP of the offset in log-coordinates (Swin V2), for any grid.

    The coordinates of offset d in cells are sign(d) ln(1 + |d|), rows before columns.
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
        table = self.output(self.dropout(self.hidden(coordinates).relu()))  # (2H-1, 2W-1, A)
        return table.permute(2, 0, 1)  # (A, 2H-1, 2W-1)


class MeanHead(nn.Module):
    """Classification head, W mean(Norm(x)): `(B, C, H, W) -> (B, K)`; with `pre_logits`, `(B, C)`."""

    def __init__(self, norm: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = norm
        self.classifier = build_classifier(width, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = mean_over_cells(self.norm(x))
        return features if pre_logits else self.classifier(features)


def build_stem(variant: TimmVariant, in_channels: int) -> nn.Module:
    """Build two 3x3 convolutions without biases, with norm and activation between them."""
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
    """Build one block of a stage, with an output of side x side cells."""
    if stage.kind == "transformer":
        return build_transformer(variant, in_width, stage.width, stride, side, stochastic_depth)
    build_branch = build_convnext if variant.convolution == "convnext" else build_mbconv
    shortcut = build_shortcut(variant, in_width, stage.width, stride, bias=variant.convolution_bias)
    return Residual(shortcut, build_branch(variant, in_width, stage.width, stride), stochastic_depth)


def build_shortcut(variant: TimmVariant, in_width: int, width: int, stride: int, *, bias: bool) -> nn.Sequential:
    """Build a shortcut that pools if the block has a stride and projects if it changes the width."""
    shortcut = nn.Sequential()
    if stride == 2:
        shortcut.add_module("pool", POOLS[variant.pool]())
    if in_width != width:
        shortcut.add_module("project", nn.Conv2d(in_width, width, 1, bias=bias))
    return shortcut


def build_mbconv(variant: TimmVariant, in_width: int, width: int, stride: int) -> nn.Sequential:
    """Build the branch norm, expand, depthwise, squeeze-excite, project."""
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
    branch.add_module("depthwise", DepthwiseConv2d(hidden, 3, depthwise_stride))
    if variant.squeeze_excite == "early":
        branch.add_module("squeeze_excite", gate)
    branch.add_module("depthwise_norm", nn.BatchNorm2d(hidden))
    branch.add_module("depthwise_activation", activation())
    if variant.squeeze_excite == "late":
        branch.add_module("squeeze_excite", gate)
    branch.add_module("project", nn.Conv2d(hidden, width, 1, bias=variant.convolution_bias))
    return branch


def build_convnext(variant: TimmVariant, in_width: int, width: int, stride: int) -> nn.Sequential:
    """Build the branch 7x7 depthwise convolution, norm, feed-forward (ConvNeXt, Liu et al. 2022)."""
    branch = nn.Sequential()
    branch.add_module("depthwise", nn.Conv2d(in_width, width, 7, stride=stride, padding=3, groups=in_width))
    branch.add_module("norm", MapLayerNorm(width, EPSILON))
    branch.add_module("feed_forward", FeedForward(width))
    branch.add_module("scale", LayerScale(width, CONVNEXT_SCALE))
    return branch


def build_transformer(
    variant: TimmVariant, in_width: int, width: int, stride: int, side: int, stochastic_depth: float
) -> nn.Sequential:
    """Build two residuals, attention and feed-forward, with norm before pooling if the block has a stride."""
    norm = TRANSFORMER_NORMS[variant.transformer_norm]
    attention = nn.Sequential()
    attention.add_module("norm", norm(in_width))
    if stride == 2:
        attention.add_module("pool", POOLS[variant.pool]())
    attention.add_module("attention", build_attention(variant, in_width, width, side))
    feed_forward = nn.Sequential()
    feed_forward.add_module("norm", norm(width))
    feed_forward.add_module("feed_forward", FeedForward(width))
    if variant.layer_scale:
        for branch in (attention, feed_forward):
            branch.add_module("scale", LayerScale(width, variant.layer_scale))
    shortcut = build_shortcut(variant, in_width, width, stride, bias=variant.shortcut_bias)
    block = nn.Sequential()
    block.add_module("attend", Residual(shortcut, attention, stochastic_depth))
    block.add_module("feed_forward", Residual(nn.Identity(), feed_forward, stochastic_depth))
    return block


def build_attention(variant: TimmVariant, in_width: int, width: int, side: int) -> nn.Module:
    """Build relative attention at the output or the input width, for a grid of side x side cells."""
    kind = NarrowRelativeAttention if variant.attention_width == "input" else RelativeAttention
    num_heads = (in_width if variant.attention_width == "input" else width) // variant.head_dim
    bias: GlobalRelativeBias = RelativeBias(num_heads, (side, side))
    if variant.relative_bias == "mlp":
        bias = LogOffsetBias(num_heads, variant.mlp_width)
    return kind(in_width, width, variant.head_dim, bias)


def build_head(variant: TimmVariant, num_classes: int) -> nn.Module:
    """Build the classification head."""
    width = variant.stages[-1].width
    if variant.head == "hidden":
        return Head(width, num_classes, EPSILON)
    return MeanHead(TRANSFORMER_NORMS[variant.transformer_norm](width), width, num_classes)
