"""What a network costs, counted on the meta device: no memory, no arithmetic, any size in seconds."""

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
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        storages.append(tensor.untyped_storage())  # or another storage could take the same id
        return tensor

    storages: list[torch.UntypedStorage] = [p.untyped_storage() for p in model.parameters()]
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    weights = {id(p.untyped_storage()) for p in model.parameters()}
    activation_bytes = sum(size for storage, size in kept.items() if storage not in weights)
    parameters = sum(p.numel() for p in model.parameters())
    return Complexity(parameters, counter.get_total_flops() // 2, activation_bytes)
