"""What a network costs: parameters, multiply-accumulates and memory, counted on the meta device or estimated."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from coatnet.model.attention import MAX_DENSE_CELLS
from coatnet.model.config import Variant
from coatnet.model.network import create_model
from coatnet.model.registry import find_variant
from coatnet.model.timm.config import TimmVariant


@dataclass(frozen=True)
class Complexity:
    """Cost of one image.

    Attributes:
        parameters: number of trainable parameters.
        macs: multiply-accumulates of matrix products and convolutions in the forward pass; the paper calls them FLOPs.
        activation_bytes: memory that the forward pass stores for the backward pass, in float32.
    """

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
    in_channels: int = 3,
    **variations: Any,
) -> Complexity:
    """Count the cost of one image, without allocating the network.

    Args:
        variant: a name of `list_variants()`, or a variant.
        resolution: side of the square image in pixels.
        table_resolution: resolution in pixels that the relative bias tables belong to; the paper counts their
            parameters at 224.
        num_classes: number of outputs.
        in_channels: channels of the image.
        variations: as in `create_model`.

    Raises:
        UserError: the name or a variation is unknown.
    """
    variant = find_variant(variant) if isinstance(variant, str) else variant
    variant = variant.vary(**variations)
    parts = count_parts(
        variant, resolution, table_resolution=table_resolution, num_classes=num_classes, in_channels=in_channels
    )
    total = parts.stem + parts.head
    for stage, first, other in zip(variant.stages, parts.first, parts.other, strict=True):
        total += first + other * (stage.depth - 1)
    return total


@cache
def embedded_complexities() -> Mapping[str, Mapping[int, Complexity]]:
    """Costs of each of `list_variants()` by resolution: its own, and 224, 384 and 512 pixels for all but timm's.

    As `complexity` counts them, with relative bias tables for the variant's own resolution. They are a file of the
    package, written by `scripts/embed_complexities.py`, since counting all of them takes half a minute.
    """
    table = json.loads(files("coatnet.model").joinpath("complexities.json").read_text(encoding="utf-8"))
    return {
        name: {int(side): Complexity(*cost) for side, cost in by_resolution.items()}
        for name, by_resolution in table.items()
    }


@dataclass(frozen=True)
class PartCosts:
    """Cost of one image in each part of a network: stem, the first block of each stage, each other one, and head."""

    stem: Complexity
    first: tuple[Complexity, ...]
    other: tuple[Complexity, ...]
    head: Complexity


def count_parts(
    variant: Variant | TimmVariant, resolution: int, *, table_resolution: int, num_classes: int, in_channels: int
) -> PartCosts:
    """As `complexity`, part by part; where a stage has one block, the others cost nothing."""
    # All blocks of a stage after its first have equal costs, so only two of each stage are run.
    short = replace(variant, stages=tuple(replace(stage, depth=min(stage.depth, 2)) for stage in variant.stages))
    with torch.device("meta"):
        model = create_model(short, num_classes=num_classes, in_channels=in_channels, resolution=table_resolution)
        x = torch.empty(1, in_channels, resolution, resolution)
    x, stem = _count(model.stem, x)
    blocks: list[list[Complexity]] = []
    for stage in model.stages:
        blocks.append([])
        for block in stage.children():
            x, cost = _count(block, x)
            blocks[-1].append(cost)
    nothing = Complexity(0, 0, 0)
    first, other = (tuple(([*costs, nothing])[n] for costs in blocks) for n in (0, 1))
    return PartCosts(stem, first, other, _count(model.head, x)[1])


def inference_bytes(variant: Variant | TimmVariant, resolution: int) -> int:
    """About the memory that one square image takes in evaluation, float32: the largest block, and all cached biases.

    Computed from the configuration alone, so that a network that would not fit is refused before it is created.
    """
    depthwise = isinstance(variant, TimmVariant) or variant.downsample == "depthwise"
    attention = "pre" if isinstance(variant, TimmVariant) else variant.attention
    window = 0 if isinstance(variant, TimmVariant) else variant.window
    side = -(-resolution // variant.stem_stride)
    largest, cached = 2 * side**2 * variant.stem_width, 0
    for stage, grid in zip(variant.stages, variant.grids(resolution), strict=True):
        cells, heads = grid**2, -(-stage.width // variant.head_dim)
        if stage.kind == "mbconv":
            block = 2 * 4 * stage.width * (side**2 if depthwise else cells)  # the expanded map, before and after
        else:
            block = 2 * 4 * stage.width * cells  # the FFN's hidden layer
            is_global = attention in ("pre", "post")
            if is_global or (attention == "local" and cells <= MAX_DENSE_CELLS):
                block += 3 * heads * cells**2  # the scores, with the bias, and their softmax
            elif attention == "local":
                block += 2 * stage.width * cells * window**2 + stage.width * (grid + window) ** 2
            if is_global and variant.relative_bias:
                cached += stage.depth * heads * cells**2
        largest, side = max(largest, block), grid
    return 4 * (largest + cached)


def _count(module: nn.Module, x: Tensor) -> tuple[Tensor, Complexity]:
    """Run a module and return its output and its cost."""
    from torch.utils.flop_counter import FlopCounterMode  # imported here, since it takes 0.2 s

    saved = SavedTensors()
    with FlopCounterMode(display=False) as counter, saved:
        output = module(x)
    parameters = list(module.parameters())
    activation_bytes = saved.num_bytes(exclude=parameters)
    return output, Complexity(sum(p.numel() for p in parameters), counter.get_total_flops() // 2, activation_bytes)


class SavedTensors(saved_tensors_hooks):
    """Context manager that records the storages that autograd saves for the backward pass, each once."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}  # references, so that no address is reused
        super().__init__(self._record, lambda tensor: tensor)

    def _record(self, tensor: Tensor) -> Tensor:
        self._storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def num_bytes(self, *, exclude: Iterable[Tensor]) -> int:
        """Bytes of all recorded storages except those of the given tensors."""
        excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
        return sum(each.nbytes() for address, each in self._storages.items() if address not in excluded)
