"""The same network with less to do: BatchNorms inside the convolutions beside them, relative biases as constants.

What is computed stays the same up to rounding; what can be trained is gone.
"""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from coatnet.model.attention import MultiHeadProjection
from coatnet.model.layers import fold_batch_norm
from coatnet.model.mbconv import ConvNormGELU, MBConv
from coatnet.model.network import CoAtNet
from coatnet.model.relative_bias import GlobalBias
from coatnet.model.timm.blocks import MeanHead
from coatnet.model.transformer import FeedForward

Part = TypeVar("Part", bound=nn.Module)


class ConstantBias(nn.Module):
    """The relative bias of one grid: `(A, N, N)`, whatever it was made of."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        assert self.matrix.shape[-1] == grid[0] * grid[1]
        return self.matrix.to(dtype)


@torch.no_grad()
def fold(model: CoAtNet, *, any_size: bool = False) -> CoAtNet:
    """A copy in evaluation mode without the BatchNorms that can be folded.

    Its relative biases are those of the resolution of the model, unless it is to take `any_size`.
    """
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        if isinstance(module, nn.Sequential):
            fold_sequence(module)
    for module in folded.modules():
        if isinstance(module, MBConv) and isinstance(module.norm, nn.BatchNorm2d):
            fold_into(first_convolution(module.expand), module.norm, norm_first=True)
            module.norm = nn.Identity()
        if isinstance(module, MeanHead) and isinstance(module.norm, nn.BatchNorm2d):
            fold_into(module.classifier, module.norm, norm_first=True)
            module.norm = nn.Identity()
    if not any_size:
        hold_biases(folded)
    return folded


def fold_sequence(sequence: nn.Sequential) -> None:
    """Fold each BatchNorm of a sequence into the convolution in front of it, or else into the one behind it."""
    parts = list(sequence.children())
    for place, norm in enumerate(parts):
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        before = parts[place - 1] if place else None
        # The mean of what is scaled and shifted is the mean, scaled and shifted; of a maximum that is not true.
        behind = next((part for part in parts[place + 1 :] if not isinstance(part, nn.AvgPool2d)), None)
        if isinstance(before, nn.Conv2d):
            fold_into(before, norm)
        elif (convolution := first_convolution(behind)) is not None:
            fold_into(convolution, norm, norm_first=True)
        else:
            continue
        sequence[place] = nn.Identity()


def first_convolution(part: nn.Module | None) -> nn.Conv2d | None:
    """The pointwise convolution that a part begins with, if it does: only there no border of zeros is in the way."""
    match part:
        case MultiHeadProjection():
            part = part.qkv
        case FeedForward() | ConvNormGELU():
            part = part[0]
    return part if isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) else None


def fold_into(product: nn.Module | None, norm: nn.BatchNorm2d, *, norm_first: bool = False) -> None:
    """Give a convolution or linear layer the weights that include a BatchNorm behind it, or before it, in place."""
    assert isinstance(product, nn.Conv2d | nn.Linear)
    weight, bias = fold_batch_norm(product, norm, norm_first=norm_first)
    product.weight, product.bias = nn.Parameter(weight), nn.Parameter(bias)


def hold_biases(model: CoAtNet) -> None:
    """Replace what makes relative biases by the matrices it makes at the model's resolution."""
    grids: dict[nn.Module, tuple[int, int]] = {}

    def remember(module: nn.Module, given: tuple[tuple[int, int], torch.dtype]) -> None:
        grids[module] = given[0]

    makers = [module for module in model.modules() if isinstance(module, GlobalBias)]
    hooks = [module.register_forward_pre_hook(remember) for module in makers]
    parameter = next(model.parameters())
    model(parameter.new_zeros(1, model.in_channels, model.resolution, model.resolution))
    for hook in hooks:
        hook.remove()
    replace_modules(model, GlobalBias, lambda bias: ConstantBias(bias.matrix(grids[bias])))


def replace_modules(model: nn.Module, kind: type[Part], make: Callable[[Part], nn.Module]) -> None:
    """Put what `make` makes of each module of that kind in its place; what it makes is not looked into."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, kind):
                setattr(parent, name, make(module))
