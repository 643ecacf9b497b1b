"""The network: stem, stages and head, with the interface of timm's models.

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
from coatnet.model.registry import find_variant, variant_from_dict
from coatnet.model.timm import blocks as timm_blocks
from coatnet.model.timm.config import TimmVariant


class CoAtNet(nn.Module):
    """CoAtNet: normalized images `(B, in_channels, H, W)` of any size to logits `(B, K)`.

    `create_model` creates one by name and checks the arguments.

    Args:
        variant: stem and stages.
        num_classes: K; with 0 the outputs are features, `(B, num_features)`.
        in_channels: channels of the images.
        resolution: side of the square images that the relative bias tables belong to, in pixels.
        stochastic_depth: rate of the last block; rates rise linearly from 0 at the first.
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
        # With channels-last weights all feature maps are channels-last, and their tokens are views.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` -> the last feature map `(B, num_features, H / 32, W / 32)`, rounded up."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for blocks in self.stages:
            x = self.forward_stage(blocks, x)
        return x

    def forward_stage(self, blocks: nn.Module, x: Tensor) -> Tensor:
        """Run one stage, `(B, C, H, W) -> (B, C', H', W')`."""
        if not (self.training and self.grad_checkpointing):
            return blocks(x)
        for block in blocks.children():
            recompute = self._recompute_batch_norm or not has_batch_norm(block)
            x = checkpoint_block(block, x) if recompute else block(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map -> logits `(B, K)`; with `pre_logits`, features `(B, num_features)`."""
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
        """Return the last feature map and a list of feature maps.

        Args:
            indices: which maps to list: 0 is after the stem, 1, 2, ... after each stage; negative indices count from
                the end; a number n lists the last n; None lists all.
            norm: only False is supported.
            stop_early: stop after the last listed map and return it as the last one.
            output_fmt: only "NCHW" is supported.
            intermediates_only: return only the list.

        Raises:
            UserError: `norm` or `output_fmt` is not supported, or there is no such map.
        """
        if norm or output_fmt != "NCHW":
            raise UserError(
                f"norm={norm}, output_fmt={output_fmt!r}: only unnormalized NCHW feature maps are supported; "
                "leave both out"
            )
        num_maps = len(self.stages) + 1
        if indices is None:
            indices = num_maps
        chosen = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
        if not chosen or not all(-num_maps <= index < num_maps for index in chosen):
            raise UserError(f"indices={indices!r}: this network has {num_maps} feature maps, 0 to {num_maps - 1}")
        listed = [index % num_maps for index in chosen]
        maps = [self.stem(images.contiguous(memory_format=torch.channels_last))]
        for blocks in self.stages[: max(listed) if stop_early else None]:
            maps.append(self.forward_stage(blocks, maps[-1]))
        intermediates = [maps[index] for index in listed]
        return intermediates if intermediates_only else (maps[-1], intermediates)

    def train(self, mode: bool = True) -> "CoAtNet":
        """Set the mode as in torch, except that a BatchNorm with frozen weights stays in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def get_classifier(self) -> nn.Module:
        """The last linear layer, features to logits."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last linear layer by an untrained one.

        Args:
            num_classes: number of outputs; with 0 the outputs are features.
            global_pool: None or "avg", the paper's.

        Raises:
            UserError: another `global_pool`.
        """
        if global_pool not in (None, "avg"):
            raise UserError(
                f"global_pool={global_pool!r}: only average pooling is supported; give 'avg' or leave it out"
            )
        self.num_classes = num_classes
        device = next(self.parameters()).device
        self.head.classifier = build_classifier(self.num_features, num_classes).apply(build.init_weights).to(device)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of relative biases, which get no weight decay, as one-dimensional ones get none."""
        return {name for name, _ in self.named_parameters() if ".relative_bias." in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameter names by block, or by stage if `coarse`, for timm's `group_parameters`."""
        # timm puts parameters that match no pattern, those of the head, into a last group.
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True, *, batch_norm: bool = False) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            batch_norm: blocks with BatchNorm too (MBConv); each batch still counts once in their statistics.
        """
        self.grad_checkpointing, self._recompute_batch_norm = enable, batch_norm

    def config(self) -> dict[str, Any]:
        """Plain values from which `create_model(**config)` builds the same network, untrained."""
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
    """Create an untrained network.

    Args:
        variant: a name of `list_variants()`, a variant, or the mapping in `CoAtNet.config()["variant"]`.
        num_classes: number of outputs; with 0 the outputs are features, `(B, num_features)`.
        in_channels: channels of the images.
        resolution: side of the square images that the relative bias tables belong to, in pixels; the variant's default
            if None. Images of any other size go through as well.
        stochastic_depth: rate of the last block, 0 <= rate < 1; rates rise linearly from 0 at the first block.
        variations: `layout`, `block_counts`, or fields of `Variant`, as in `Variant.vary`; for the paper's variants.

    Returns:
        The network in training mode. It maps normalized float images `(B, in_channels, H, W)` to logits
        `(B, num_classes)`.

    Raises:
        UserError: a name or an option is unknown, a number is out of bounds, or options contradict each other.

    Example:
        >>> model = create_model("coatnet-0", num_classes=10, attention="post")
    """
    if isinstance(variant, str):
        variant = find_variant(variant)
    elif isinstance(variant, Mapping):
        variant = variant_from_dict(variant)
    variant = variant.vary(**variations)
    resolution = variant.resolution if resolution is None else resolution
    for name, value, smallest in (
        ("num_classes", num_classes, 0),
        ("in_channels", in_channels, 1),
        ("resolution", resolution, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise UserError(f"{name}={value!r}: it must be a whole number of at least {smallest}")
    if not (isinstance(stochastic_depth, float | int) and 0.0 <= stochastic_depth < 1.0):
        raise UserError(f"stochastic_depth={stochastic_depth!r}: it must be a rate of at least 0 and less than 1")
    return CoAtNet(
        variant,
        num_classes=num_classes,
        in_channels=in_channels,
        resolution=resolution,
        stochastic_depth=stochastic_depth,
    )


def build_stages(
    variant: Variant | TimmVariant, build_block: Callable[..., nn.Module], resolution: int, stochastic_depth: float
) -> nn.ModuleList:
    """Build the stages, each a sequence of blocks, with relative biases for images of `resolution` pixels."""
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
