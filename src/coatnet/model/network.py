"""The network: stem, stages, head; its initialisation, and the contract that users of timm know.

Shapes: B batch, C width, H W feature map, K classes.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coatnet.errors import UserError
from coatnet.model import build
from coatnet.model.config import Variant
from coatnet.model.layers import build_classifier
from coatnet.model.registry import find_variant, read_row
from coatnet.model.timm import blocks as timm_blocks
from coatnet.model.timm.config import TimmVariant


class CoAtNet(nn.Module):
    """Images `(B, in_channels, H, W)`, float and normalised, to logits `(B, K)`; any H and W.

    Args:
        variant: the row of the family.
        num_classes: K; 0 leaves the features in front of the classifier, `(B, num_features)`.
        resolution: side of the square images that the relative biases are made for, pixels.
        stochastic_depth: rate at the last block, rising linearly from 0 at the first.
    """

    def __init__(
        self,
        variant: Variant | TimmVariant,
        *,
        num_classes: int,
        in_channels: int,
        resolution: int,
        stochastic_depth: float,
    ) -> None:
        super().__init__()
        self.variant, self.in_channels, self.resolution = variant, in_channels, resolution
        self.num_classes, self.num_features = num_classes, variant.stages[-1].width
        self.grad_checkpointing = self._recompute_batch_norm = False
        parts: Any = timm_blocks if isinstance(variant, TimmVariant) else build
        self.stem = parts.build_stem(variant, in_channels)
        self.stages = build_stages(variant, parts.build_block, resolution, stochastic_depth)
        self.head = parts.build_head(variant, num_classes)
        self.apply(build.init_weights)
        # With channels-last weights every map is channels-last, so that maps become tokens without a copy.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` -> the last map `(B, num_features, H / 32, W / 32)`, rounded up."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for blocks in self.stages:
            x = self.forward_stage(blocks, x)
        return x

    def forward_stage(self, blocks: nn.Module, x: Tensor) -> Tensor:
        """One stage, `(B, C, H, W) -> (B, C', H', W')`."""
        if not (self.training and self.grad_checkpointing):
            return blocks(x)
        for block in blocks.children():
            recompute = self._recompute_batch_norm or not has_batch_norm(block)
            x = checkpoint_block(block, x) if recompute else block(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits `(B, K)`, or the features `(B, num_features)` that make them."""
        return self.head(x, pre_logits)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The last map, and the list of maps after the stem (index 0) and after each stage (1, 2, ...).

        Args:
            indices: which maps, from the end if negative; the last that many if it is a number; all if None.
            stop_early: go no further than the last map asked for, which is then the last one.
            intermediates_only: the list alone.

        Raises UserError for norm=True and other formats, which timm offers and maps here do not have.
        """
        if norm or output_fmt != "NCHW":
            raise UserError(
                f"norm={norm}, output_fmt={output_fmt!r}: maps come as stages make them, (B, C, H, W); leave both out"
            )
        num_maps = len(self.stages) + 1
        if indices is None:
            indices = num_maps
        wanted = range(num_maps - indices, num_maps) if isinstance(indices, int) else [i % num_maps for i in indices]
        maps = [self.stem(images.contiguous(memory_format=torch.channels_last))]
        for blocks in self.stages[: max(wanted) if stop_early else None]:
            maps.append(self.forward_stage(blocks, maps[-1]))
        chosen = [maps[index] for index in wanted]
        return chosen if intermediates_only else (maps[-1], chosen)

    def train(self, mode: bool = True) -> "CoAtNet":
        """As in torch, except that a BatchNorm with frozen weights keeps its statistics too."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def get_classifier(self) -> nn.Module:
        """The last linear layer, features to logits."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier for that many classes; none (features come out) for 0.

        Raises UserError for a `global_pool` of timm's other than "avg", the paper's.
        """
        if global_pool not in (None, "avg"):
            raise UserError(
                f"global_pool={global_pool!r}: maps are averaged over their cells; give 'avg' or leave it out"
            )
        self.num_classes = num_classes
        device = next(self.parameters()).device
        self.head.classifier = build_classifier(self.num_features, num_classes).apply(build.init_weights).to(device)

    def no_weight_decay(self) -> set[str]:
        """Names of what makes relative biases: not to be decayed, beside every one-dimensional parameter."""
        return {name for name, _ in self.named_parameters() if ".relative_bias." in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names from stem to head, as timm reads them: a group a block (a stage if coarse)."""
        # What no pattern names, the head, is to timm a group of its own behind all others.
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True, *, batch_norm: bool = False) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            batch_norm: blocks with BatchNorm too (MBConv); each batch still counts once in their statistics.
        """
        self.grad_checkpointing, self._recompute_batch_norm = enable, batch_norm

    def config(self) -> dict[str, Any]:
        """Plain values from which `create_model(**config)` builds this network again, untrained."""
        return {
            "variant": self.variant.to_dict(),
            "num_classes": self.num_classes,
            "in_channels": self.in_channels,
            "resolution": self.resolution,
        }


def create_model(
    variant: str | Variant | TimmVariant | Mapping[str, Any],
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    resolution: int | None = None,
    stochastic_depth: float = 0.0,
    **variations: Any,
) -> CoAtNet:
    """An untrained network of the family.

    Args:
        variant: a name of `list_variants()`, a row, or the row that `CoAtNet.config()` holds.
        resolution: side of the square images that the relative biases are made for, pixels; the row's if None.
            Images of any other size go through as well.
        stochastic_depth: rate at the last block, rising linearly from 0 at the first.
        variations: `layout`, `block_counts`, or fields of a row, as in `Variant.vary`.

    Raises:
        UserError: if a name, a number or a combination makes no sense; the message says what would.
    """
    if isinstance(variant, str):
        row = find_variant(variant)
    else:
        row = read_row(variant) if isinstance(variant, Mapping) else variant
    row = row.vary(**variations)
    resolution = row.resolution if resolution is None else resolution
    for name, value, smallest in (
        ("num_classes", num_classes, 0),
        ("in_channels", in_channels, 1),
        ("resolution", resolution, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise UserError(f"{name}={value!r}: it is a whole number of at least {smallest}")
    if not (isinstance(stochastic_depth, float | int) and 0.0 <= stochastic_depth < 1.0):
        raise UserError(f"stochastic_depth={stochastic_depth!r}: it is a rate of at least 0 and less than 1")
    return CoAtNet(
        row,
        num_classes=num_classes,
        in_channels=in_channels,
        resolution=resolution,
        stochastic_depth=stochastic_depth,
    )


def build_stages(
    variant: Variant | TimmVariant, build_block: Callable[..., nn.Module], resolution: int, stochastic_depth: float
) -> nn.ModuleList:
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


def has_batch_norm(block: nn.Module) -> bool:
    """Whether a block has a BatchNorm of either class."""
    return any(isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) for module in block.modules())


def checkpoint_block(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, keeping only x for the backward pass, in which the block is computed a second time."""

    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), UncountedStatistics(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


class UncountedStatistics:
    """While entered, the BatchNorms of a block write running statistics and counter to copies that are discarded."""

    def __init__(self, block: nn.Module) -> None:
        self._norms = [each for each in block.modules() if isinstance(each, nn.BatchNorm2d | nn.SyncBatchNorm)]
        self._buffers: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self._buffers = [norm._buffers for norm in self._norms]
        for norm in self._norms:
            norm._buffers = {name: each if each is None else each.clone() for name, each in norm._buffers.items()}

    def __exit__(self, *_: object) -> None:
        for norm, buffers in zip(self._norms, self._buffers, strict=True):
            norm._buffers = buffers
