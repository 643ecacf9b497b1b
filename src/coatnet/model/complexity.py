"""What a network costs, counted on the meta device: no memory, no arithmetic, any size in seconds."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from coatnet.model.config import Variant
from coatnet.model.network import create_model
from coatnet.model.registry import find_variant
from coatnet.model.timm.config import TimmVariant


@dataclass(frozen=True)
class Complexity:
    """Of one image: multiply-accumulates of its matrix products and convolutions (the paper calls them FLOPs), and
    bytes of activations kept for the backward pass in float32."""

    parameters: int
    macs: int
    activation_bytes: int

    def __add__(self, other: "Complexity") -> "Complexity":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Complexity(*(one + another for one, another in pairs))

    def __mul__(self, times: int) -> "Complexity":
        return Complexity(*(times * each for each in astuple(self)))


def complexity(
    variant: str | Variant | TimmVariant,
    resolution: int,
    *,
    table_resolution: int = 224,
    num_classes: int = 1000,
    **variations: Any,
) -> Complexity:
    """The cost of one square image of `resolution` pixels.

    Args:
        table_resolution: resolution that the relative bias tables are made for; the paper counts them at 224.
        variations: as in `create_model`.
    """
    row = find_variant(variant) if isinstance(variant, str) else variant
    row = row.vary(**variations)
    # All blocks of a stage behind its first are the same, so one of them speaks for the rest.
    short = replace(row, stages=tuple(replace(stage, depth=min(stage.depth, 2)) for stage in row.stages))
    with torch.device("meta"):
        model = create_model(short, num_classes=num_classes, resolution=table_resolution)
        x = torch.empty(1, 3, resolution, resolution)
    total = Complexity(0, 0, 0)
    x, cost = _run(model.stem, x)
    total += cost
    for stage, blocks in zip(row.stages, model.stages, strict=True):
        for block, times in zip(blocks.children(), (1, stage.depth - 1), strict=False):
            x, cost = _run(block, x)
            total += cost * times
    return total + _run(model.head, x)[1]


def _run(part: nn.Module, x: Tensor) -> tuple[Tensor, Complexity]:
    """What a part of a network makes of a map, and what that costs."""
    kept = KeptStorages()
    with FlopCounterMode(display=False) as counter, kept:
        result = part(x)
    parameters = list(part.parameters())
    activation_bytes = kept.nbytes(but=parameters)
    return result, Complexity(sum(p.numel() for p in parameters), counter.get_total_flops() // 2, activation_bytes)


class KeptStorages(saved_tensors_hooks):
    """Collects the memory that a forward pass keeps for the backward pass; views of one storage count once."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def nbytes(self, *, but: Iterable[torch.Tensor]) -> int:
        """Bytes of all of it, except of these tensors."""
        excepted = {tensor.untyped_storage()._cdata for tensor in but}
        return sum(each.nbytes() for address, each in self._storages.items() if address not in excepted)
