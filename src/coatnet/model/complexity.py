"""What a network costs, counted on the meta device: no memory, no arithmetic, any size in seconds."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from coatnet.model.coatnet import create_model
from coatnet.model.variants import Variant


@dataclass(frozen=True)
class Complexity:
    """Of one image: multiply-accumulates of its matrix products and convolutions (the paper calls them FLOPs), and
    bytes of activations kept for the backward pass in float32."""

    parameters: int
    macs: int
    activation_bytes: int


def complexity(
    variant: str | Variant, resolution: int, *, table_resolution: int = 224, **variations: Any
) -> Complexity:
    """The cost of one square image of `resolution` pixels.

    Args:
        table_resolution: resolution that the relative bias tables are made for; the paper counts them at 224.
        variations: as in `create_model`.
    """
    with torch.device("meta"):
        model = create_model(variant, resolution=table_resolution, **variations)
        images = torch.empty(1, 3, resolution, resolution)
    kept = KeptStorages()
    with FlopCounterMode(display=False) as counter, kept:
        model(images)
    parameters = list(model.parameters())
    activation_bytes = kept.nbytes(but=parameters)
    return Complexity(sum(p.numel() for p in parameters), counter.get_total_flops() // 2, activation_bytes)


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
