"""Layers that the blocks share: norms, pooling, shortcuts, stochastic depth, the head, maps as tokens.

Shapes: B batch, C width, H W feature map, N = H * W cells, K classes. Feature maps `(B, C, H, W)` are channels-last in
memory, so that their tokens `(B, N, C)` are a view, not a copy.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# chosen: 1e-3, from the authors' later code; the paper gives no epsilon.
BATCH_NORM_EPSILON = 1e-3
# chosen: 0.1. The authors' later code uses 0.01, an average over about 100 steps, too slow for small data sets.
BATCH_NORM_MOMENTUM = 0.1
# chosen: 1e-5, from the authors' later code.
LAYER_NORM_EPSILON = 1e-5


def batch_norm(width: int) -> nn.BatchNorm2d:
    """BatchNorm for feature maps `(B, C, H, W)`, the paper's choice in MBConv (appendix A.1)."""
    return nn.BatchNorm2d(width, eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM)


def fold_batch_norm(
    product: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d, *, norm_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the single product that equals Norm(Product(x)) in evaluation.

    Args:
        product: a linear layer or a convolution with weight `(C', C, ...)`.
        norm_first: fold Product(Norm(x)) instead; the product must not pad its input, since zeros of a border are
            not normalized.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    weight, bias = product.weight, 0 if product.bias is None else product.bias
    inverse_std = (norm.running_var + norm.eps).rsqrt()
    scale = norm.weight * inverse_std  # (C,) or (C',): BatchNorm is x * scale + shift
    ones = [1] * (weight.ndim - 2)
    if norm_first:
        shift = norm.bias - norm.running_mean * scale
        return weight * scale.view(1, -1, *ones), bias + weight.flatten(1) @ shift
    # In the order of torch's fuse_conv_bn_weights, so that figures are equal to the last bit.
    return weight * scale.view(-1, 1, *ones), (bias - norm.running_mean) * inverse_std * norm.weight + norm.bias


class DepthwiseConv2d(nn.Conv2d):
    """Convolution of each channel with its own kernel: `(B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))`."""

    def __init__(self, width: int, kernel_size: int, stride: int) -> None:
        # chosen: symmetric padding, so that a mirrored input gives a mirrored output.
        super().__init__(width, width, kernel_size, stride, kernel_size // 2, groups=width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        if input.device.type != "cpu" or dtype != torch.bfloat16 or self.stride == (1, 1) or not input.requires_grad:
            return super().forward(input)
        return StridedDepthwise.apply(input.to(dtype), self.weight.to(dtype), self.stride, self.padding)


class StridedDepthwise(torch.autograd.Function):
    """A depthwise convolution with a stride, whose input gradient is a convolution without one.

    oneDNN has no fast kernel for the input gradient of a strided depthwise convolution in bf16. The same gradient is
    that of a stride of 1 for the output gradients with zeros between them. For (16, 384, 112, 112) and a stride of 2,
    the backward pass takes 270 instead of 845 ms on one core.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(input, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (input, weight) = gradients, ctx.saved_tensors
        needs_input, needs_weight, *_ = ctx.needs_input_grad

        def convolution_backward(output: Tensor, stride: Sequence[int], mask: list[bool]) -> list[Tensor]:
            fixed = (ctx.padding, [1, 1], False, [0, 0], len(weight))  # dilation 1, not transposed
            return torch.ops.aten.convolution_backward(output, input, weight, None, stride, *fixed, mask)

        of_input = of_weight = None
        if needs_input:
            rows, columns = ctx.stride
            spread = torch.zeros_like(input)
            spread[:, :, ::rows, ::columns] = gradient
            of_input = convolution_backward(spread, [1, 1], [True, False, False])[0]
        if needs_weight:
            of_weight = convolution_backward(gradient, ctx.stride, [False, True, False])[1]
        return of_input, of_weight, None, None


class GELU(nn.GELU):
    """The exact GELU, x * Phi(x), of a feature map: `(B, C, H, W) -> (B, C, H, W)`.

    torch computes it by oneDNN, faster than by itself, if its input is contiguous. A channels-last map is not, but its
    view `(B, H, W, C)` is: for (16, 384, 56, 56) in bf16 on two cores, 4.6 instead of 8.6 ms forward and 8.2 instead of
    12.7 ms backward.
    """

    # chosen: not the tanh approximation of the authors, which is slower on CPUs (19 ms forward and backward each).

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or torch.compiler.is_compiling() or input.ndim != 4:
            return super().forward(input)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MapLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell: before attention and FFN, and in MBConv for Table 8.

    `(B, C, H, W) -> (B, C, H, W)`
    """

    def __init__(self, width: int, epsilon: float = LAYER_NORM_EPSILON) -> None:
        super().__init__(width, eps=epsilon)

    def forward(self, input: Tensor) -> Tensor:
        x = super().forward(input.permute(0, 2, 3, 1))  # (B, H, W, C)
        return x.permute(0, 3, 1, 2)  # (B, C, H, W)


class Pool(nn.MaxPool2d):
    """Pool(x) of equations (4) and (5): "the standard max pooling of stride 2".

    `(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))`
    """

    def __init__(self) -> None:
        # chosen: 2x2 windows (the paper gives only the stride), rounding up, so that odd sizes give the same grid as a
        # strided convolution.
        super().__init__(kernel_size=2, stride=2, ceil_mode=True)


class Shortcut(nn.Sequential):
    """Proj(Pool(x)) of equations (4) and (5); the identity if neither grid nor width changes.

    `(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))`
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        parts: list[nn.Module] = [Pool()] if stride == 2 else []
        if in_width != width:
            parts.append(nn.Conv2d(in_width, width, kernel_size=1))
        super().__init__(*parts)


class StochasticDepth(nn.Module):
    """Drop the residual branch of random samples in training ("drop path" in timm) and rescale the others.

    `(B, ...) -> (B, ...)`; the identity in evaluation and at rate 0.

    Args:
        rate: probability of dropping a sample's residual.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, residual: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return residual
        keep_rate = 1.0 - self.rate
        shape = (residual.shape[0],) + (1,) * (residual.ndim - 1)
        mask = torch.rand(shape, device=residual.device) < keep_rate  # (B, 1, ...)
        return residual * (mask / keep_rate).to(residual.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def mean_over_cells(x: Tensor) -> Tensor:
    """Global average pooling, `(B, C, H, W) -> (B, C)`.

    In eager mode a sum of tokens that is divided afterwards: its gradient is a view, where that of a mean is a map of
    quotients (squeeze-excitation of (16, 768, 28, 28) in float32, backward, two cores: 16 instead of 21 ms), and torch
    sums bf16 values in half the time of their mean (5.5 instead of 12 ms for (16, 384, 56, 56)). In a graph it is one
    reduction, which compilers fuse better than a view. For bf16 on CPUs it is a matrix product in a graph: the product
    stores its input, so that the GELU before squeeze-excitation is not computed twice (740 instead of 760 ms for
    coatnet-0, batches of 16).
    """
    tokens = to_tokens(x)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and compiled_for_inference():
        return (tokens.new_ones(1, tokens.shape[1]) @ tokens).squeeze(1) / tokens.shape[1]
    return x.mean((2, 3)) if torch.compiler.is_compiling() else tokens.sum(1) / tokens.shape[1]


def compiled_for_inference() -> bool:
    """Return whether this call is traced by `torch.compile` without gradients."""
    return torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled()


def grid_of(x: Tensor) -> tuple[int, int]:
    """Height and width of a feature map `(B, C, H, W)`, in cells."""
    return x.shape[2], x.shape[3]


def to_tokens(x: Tensor) -> Tensor:
    """`(B, C, H, W) -> (B, N, C)`, row by row; a view if the map is channels-last in memory."""
    x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
    return x.flatten(1, 2)  # (B, N, C)


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """`(B, N, C) -> (B, C, H, W)`, channels-last in memory: the inverse of `to_tokens`."""
    x = tokens.unflatten(1, grid)  # (B, H, W, C)
    return x.permute(0, 3, 1, 2)  # (B, C, H, W)


class Head(nn.Module):
    """Classification head, W tanh(V Norm(mean(x))): `(B, C, H, W) -> (B, K)`.

    With `pre_logits`, the features `(B, C)` before the last layer.
    """

    # chosen: LayerNorm and a hidden tanh layer; without them CoAtNet-0, -5 and -7 do not have their published sizes.

    def __init__(self, width: int, num_classes: int, epsilon: float = LAYER_NORM_EPSILON) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.hidden = nn.Linear(width, width)
        self.classifier = build_classifier(width, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = torch.tanh(self.hidden(self.norm(mean_over_cells(x))))
        return features if pre_logits else self.classifier(features)


def build_classifier(width: int, num_classes: int) -> nn.Module:
    """The last linear layer, features to logits; the identity for 0 classes."""
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()
