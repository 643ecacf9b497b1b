"""Convert the state of a network between our tensor names and layouts and timm's, without loss.

Source: timm 1.0.31, the state of the networks that it constructs. A stage of ours without a stride is, for timm, the
rest of the stage before it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from coatnet.model.network import CoAtNet
from coatnet.model.timm.config import TimmVariant

STEM = {"stem.first": "stem.conv1", "stem.norm": "stem.norm1", "stem.second": "stem.conv2"}
HEADS = {
    "hidden": {"head.norm": "head.norm", "head.hidden": "head.pre_logits.fc", "head.classifier": "head.fc"},
    "mean": {"head.norm": "norm", "head.classifier": "head.fc"},
}
MBCONV = {
    "shortcut.project": "shortcut.expand",
    "branch.norm": "pre_norm",
    "branch.expand": "conv1_1x1",
    "branch.expand_norm": "norm1",
    "branch.depthwise": "conv2_kxk",
    "branch.depthwise_norm": "norm2",
    "branch.project": "conv3_1x1",
}
SQUEEZE_EXCITE = {"branch.squeeze_excite.squeeze": "{se}.fc1", "branch.squeeze_excite.excite": "{se}.fc2"}
CONVNEXT = {
    "shortcut.project": "shortcut.expand",
    "branch.depthwise": "conv_dw",
    "branch.norm": "norm",
    "branch.feed_forward.0": "mlp.fc1",
    "branch.feed_forward.2": "mlp.fc2",
    "branch.scale": "ls",
}
TRANSFORMER = {
    "attend.shortcut.project": "shortcut.expand",
    "attend.branch.norm": "norm1",
    "attend.branch.attention.qkv": "attn.qkv",
    "attend.branch.attention.output": "attn.proj",
    "attend.branch.attention.relative_bias": "attn.rel_pos",
    "attend.branch.attention.relative_bias.hidden": "attn.rel_pos.mlp.fc1",
    "attend.branch.attention.relative_bias.output": "attn.rel_pos.mlp.fc2",
    "attend.branch.scale": "ls1",
    "feed_forward.branch.norm": "norm2",
    "feed_forward.branch.feed_forward.0": "mlp.fc1",
    "feed_forward.branch.feed_forward.2": "mlp.fc2",
    "feed_forward.branch.scale": "ls2",
}
STRIDED = {"attend.branch.norm": "norm1.norm"}
LEAVES = {"table": "relative_position_bias_table", "gain": "gamma"}


@dataclass(frozen=True)
class Counterpart:
    """The names of a tensor in both states, and the conversions of its layout."""

    ours: str
    theirs: str
    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def counterparts(model: CoAtNet) -> list[Counterpart]:
    """The counterparts of all tensors of a network with a `TimmVariant`."""
    variant = model.variant
    assert isinstance(variant, TimmVariant)
    positions, found = _timm_positions(variant), []
    for ours, tensor in model.state_dict().items():
        module, leaf = ours.rpartition(".")[::2]
        block = re.match(r"stages\.(\d+)\.(\d+)\.(.+)", module)
        if block:
            stage, index = int(block[1]), int(block[2])
            timm_stage, first_block = positions[stage]
            strided = index == 0 and variant.stages[stage].stride == 2
            name = _block_names(variant, variant.stages[stage].kind, strided=strided)[block[3]]
            name = f"stages.{timm_stage}.blocks.{first_block + index}.{name}"
        else:
            name = {**STEM, **HEADS[variant.head]}[module]
        conversions = _layout_conversions(ours, tensor, variant.head_dim)
        found.append(Counterpart(ours, f"{name}.{LEAVES.get(leaf, leaf)}", *conversions))
    return found


def to_timm(model: CoAtNet) -> dict[str, Tensor]:
    """The state of a network with timm's names and layouts."""
    state = model.state_dict()
    return {each.theirs: each.to_theirs(state[each.ours]) for each in counterparts(model)}


def from_timm(model: CoAtNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a network of timm with our names and layouts."""
    return {each.ours: each.to_ours(state[each.theirs]) for each in counterparts(model)}


def _timm_positions(variant: TimmVariant) -> list[tuple[int, int]]:
    """For each of our stages, the index of timm's stage and of the stage's first block in it."""
    positions, timm_stage, num_blocks = [], -1, 0
    for stage in variant.stages:
        if stage.stride == 2:
            timm_stage, num_blocks = timm_stage + 1, 0
        positions.append((timm_stage, num_blocks))
        num_blocks += stage.depth
    return positions


def _block_names(variant: TimmVariant, kind: str, *, strided: bool) -> dict[str, str]:
    if kind == "transformer":
        return {**TRANSFORMER, **STRIDED} if strided else TRANSFORMER
    if variant.convolution == "convnext":
        return CONVNEXT
    gate = "se_early" if variant.squeeze_excite == "early" else "se"
    return {**MBCONV, **{ours: theirs.format(se=gate) for ours, theirs in SQUEEZE_EXCITE.items()}}


def _layout_conversions(
    name: str, tensor: Tensor, head_dim: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Functions that convert the layout of a tensor from timm's to ours, and back."""
    if name.endswith("relative_bias.table"):
        shape = tensor.shape
        return (lambda theirs: theirs.T.reshape(shape)), (lambda ours: ours.flatten(1).T)
    if ".squeeze_excite." in name and name.endswith("weight"):  # convolutions in timm
        return (lambda theirs: theirs[:, :, 0, 0]), (lambda ours: ours[:, :, None, None])
    if ".qkv." in name:  # timm's rows are q, k and v of the first head, then of the second
        heads = tensor.shape[0] // (3 * head_dim)

        def to_ours(theirs: Tensor) -> Tensor:
            by_head = theirs.unflatten(0, (heads, 3, head_dim))  # (A, 3, D, ...)
            return by_head.transpose(0, 1).flatten(0, 2)  # (3 * A * D, ...)

        def to_theirs(ours: Tensor) -> Tensor:
            by_kind = ours.unflatten(0, (3, heads, head_dim))  # (3, A, D, ...)
            return by_kind.transpose(0, 1).flatten(0, 2)  # (A * 3 * D, ...)

        return to_ours, to_theirs
    return (lambda theirs: theirs), (lambda ours: ours)
