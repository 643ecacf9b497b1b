"""Small parts that several blocks share.

Shapes: B batch, C width, H W feature map, N = H * W cells. A map `(B, C, H, W)` lies channels-last in memory, so
its tokens `(B, N, C)` are a view of it and never a copy.
"""

import torch
from torch import Tensor, nn

# chosen: 1e-3, from the authors' later code; the paper gives no epsilon.
BATCH_NORM_EPSILON = 1e-3
# chosen: 0.1. The authors' later code averages over ~100 steps (0.01), which small data sets never reach.
BATCH_NORM_MOMENTUM = 0.1
# chosen: 1e-5, from the authors' later code.
LAYER_NORM_EPSILON = 1e-5


def batch_norm(width: int) -> nn.BatchNorm2d:
    """BatchNorm over a map `(B, C, H, W)`: the paper's choice inside MBConv (appendix A.1)."""
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
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # (C,) or (C',): BatchNorm is x * scale + shift
    shift = norm.bias - norm.running_mean * scale
    ones = [1] * (weight.ndim - 2)
    if norm_first:
        return weight * scale.view(1, -1, *ones), bias + weight.flatten(1) @ shift
    return weight * scale.view(-1, 1, *ones), bias * scale + shift


class MapLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell: around attention and FFN, and in MBConv for Table 8.

    `(B, C, H, W) -> (B, C, H, W)`
    """

    def __init__(self, width: int, epsilon: float = LAYER_NORM_EPSILON) -> None:
        super().__init__(width, eps=epsilon)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pool(nn.MaxPool2d):
    """Pool(x) of equations (4) and (5): "the standard max pooling of stride 2".

    `(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))`
    """

    def __init__(self) -> None:
        # chosen: 2x2 windows (the paper gives only the stride); an odd last row is a window of its own, so that
        # the grid is the one a strided convolution gives.
        super().__init__(kernel_size=2, stride=2, ceil_mode=True)


class Shortcut(nn.Sequential):
    """Proj(Pool(x)) of equations (4) and (5); the identity where neither grid nor width changes.

    `(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))`
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        parts: list[nn.Module] = [Pool()] if stride == 2 else []
        if in_width != width:
            parts.append(nn.Conv2d(in_width, width, kernel_size=1))
        super().__init__(*parts)


class StochasticDepth(nn.Module):
    """Drops whole residuals of samples at random in training ("drop path" in timm), keeping the expectation.

    `(B, ...) -> (B, ...)`; the identity in evaluation and at rate 0.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, residual: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return residual
        keep_rate = 1.0 - self.rate
        shape = (residual.shape[0],) + (1,) * (residual.ndim - 1)
        kept = torch.rand(shape, device=residual.device) < keep_rate
        return residual * (kept / keep_rate).to(residual.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def mean_over_cells(x: Tensor) -> Tensor:
    """Global average pooling, `(B, C, H, W) -> (B, C)`.

    Over tokens, since torch's own reduction of channels-last bf16 maps is slow on CPUs: 12 ms against 40 ms for
    (16, 384, 56, 56) on one core. In a graph it is one operation, of which compilers know more than of a view; save
    that bf16 on CPUs is bound by computing, and a product keeps what it reads, so that the GELU of squeeze-excitation
    is not computed twice (740 for 760 ms of coatnet-0, batches of 16).
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and compiled_for_inference():
        tokens = to_tokens(x)
        return (tokens.new_ones(1, tokens.shape[1]) @ tokens).squeeze(1) / tokens.shape[1]
    return x.mean((2, 3)) if torch.compiler.is_compiling() else to_tokens(x).mean(1)


def compiled_for_inference() -> bool:
    """Whether this call is traced for `torch.compile`, for answers alone."""
    return torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled()


def grid_of(x: Tensor) -> tuple[int, int]:
    """Height and width of a map `(B, C, H, W)`, in cells."""
    return x.shape[2], x.shape[3]


def to_tokens(x: Tensor) -> Tensor:
    """`(B, C, H, W) -> (B, N, C)`, row by row; a view where the map lies channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """`(B, N, C) -> (B, C, H, W)`, channels-last in memory: the inverse of `to_tokens`."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


class Head(nn.Module):
    """W tanh(V Norm(mean(x))): `(B, C, H, W) -> (B, K)`.

    chosen: LayerNorm and a hidden tanh layer; without them the published sizes of CoAtNet-0, -5 and -7 are missed.
    """

    def __init__(self, width: int, num_classes: int, epsilon: float = LAYER_NORM_EPSILON) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.hidden = nn.Linear(width, width)
        self.classifier = build_classifier(width, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = torch.tanh(self.hidden(self.norm(mean_over_cells(x))))
        return features if pre_logits else self.classifier(features)


def build_classifier(width: int, num_classes: int) -> nn.Module:
    """Features to logits; nothing at all for 0 classes."""
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()
