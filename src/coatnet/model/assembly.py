"""From a row of the family to the parts of a network: which class stands where, and how weights begin.

Shapes: B batch, C width, H W feature map, K classes.
"""

import torch
from torch import Tensor, nn

from coatnet.model.attention import (
    LinearAttention,
    LocalAttention,
    PlainAttention,
    PostRelativeAttention,
    RelativeAttention,
)
from coatnet.model.layers import LAYER_NORM_EPSILON, mean_over_cells
from coatnet.model.mbconv import MBConv, conv_norm_gelu
from coatnet.model.transformer import Transformer
from coatnet.model.variants import PATCH_STRIDE, Stage, Variant


def build_stem(variant: Variant, in_channels: int) -> nn.Module:
    """S0: two 3x3 convolutions, the first with the stride; or the 16x16 patches of ViT_REL."""
    width = variant.stem_width
    if variant.stem == "patch":
        return nn.Conv2d(in_channels, width, kernel_size=PATCH_STRIDE, stride=PATCH_STRIDE)
    # chosen: BatchNorm and GELU between the two and nothing after them, from the authors' later code.
    first = conv_norm_gelu(in_channels, width, 3, norm="batch", stride=variant.stem_stride)
    return nn.Sequential(first, nn.Conv2d(width, width, kernel_size=3, padding=1))


def build_stages(variant: Variant, resolution: int, stochastic_depth: float) -> nn.ModuleList:
    """The stages, each a sequence of blocks; their relative biases are made for images of that many pixels."""
    depth = sum(stage.depth for stage in variant.stages)
    # chosen: linear from 0 at the first block to the full rate at the last; the paper gives the rate only.
    rates = iter([stochastic_depth * index / max(1, depth - 1) for index in range(depth)])
    width, stages = variant.stem_width, nn.ModuleList()
    for stage, side in zip(variant.stages, variant.grids(resolution), strict=True):
        blocks = nn.Sequential()
        for index in range(stage.depth):
            stride = stage.stride if index == 0 else 1
            blocks.append(build_block(variant, stage, width, stride, side, next(rates)))
            width = stage.width
        stages.append(blocks)
    return stages


def build_block(
    variant: Variant, stage: Stage, in_width: int, stride: int, side: int, stochastic_depth: float
) -> nn.Module:
    """One block of a stage, with a grid of side x side cells behind it."""
    if stage.kind == "mbconv":
        return MBConv(
            in_width,
            stage.width,
            stride,
            downsample=variant.downsample,
            norm=variant.mbconv_norm,
            stochastic_depth=stochastic_depth,
        )
    attention = build_attention(variant, in_width, stage.width, side)
    return Transformer(in_width, stage.width, stride, attention=attention, stochastic_depth=stochastic_depth)


def build_attention(variant: Variant, in_width: int, width: int, side: int) -> nn.Module:
    """The attention that the row names, for a grid of side x side cells."""
    shape = (in_width, width, variant.head_dim)
    if variant.attention == "linear":
        return LinearAttention(*shape)
    if variant.attention == "local":
        return LocalAttention(*shape, variant.window, relative_bias=variant.relative_bias)
    if not variant.relative_bias:
        return PlainAttention(*shape)
    kind = PostRelativeAttention if variant.attention == "post" else RelativeAttention
    return kind(*shape, (side, side))


class Head(nn.Module):
    """W tanh(V Norm(mean(x))): `(B, C, H, W) -> (B, K)`.

    chosen: LayerNorm and a hidden tanh layer; without them the published sizes of CoAtNet-0, -5 and -7 are missed.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.hidden = nn.Linear(width, width)
        self.classifier = build_classifier(width, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = torch.tanh(self.hidden(self.norm(mean_over_cells(x))))
        return features if pre_logits else self.classifier(features)


def build_classifier(width: int, num_classes: int) -> nn.Module:
    """Features to logits; nothing at all for 0 classes."""
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()


def initialise(module: nn.Module) -> None:
    """Convolutions and linear layers: weights N(0, 1 / fan-in), biases 0. Norms and bias tables set themselves."""
    # chosen: 1 / fan-in, since the paper is silent. The authors' later code has N(0, 0.02) everywhere: the same at a
    # fan-in of 2,500, too little for narrow rows. coatnet-femto-64 on 10,000 garments had 0.73 top-1 after 220 steps of
    # 64 with it, and 0.83 with this.
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
