"""Which tensor of timm's is which of ours, both ways; nothing is lost, so a round trip is the identity.

Source: timm 1.0.31, the state of the constructed networks. A stage of ours without a stride goes on where the one
before it stops, and is one with it to timm.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from coatnet.model.config import Architecture
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
    """One tensor under both names, and the way from one to the other."""

    ours: str
    theirs: str
    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def counterparts(model: CoAtNet) -> list[Counterpart]:
    """Every tensor in the state of a network of timm's."""
    row = model.variant
    assert isinstance(row, TimmVariant)
    places, found = _timm_places(row), []
    for ours, tensor in model.state_dict().items():
        module, leaf = ours.rpartition(".")[::2]
        block = re.match(r"stages\.(\d+)\.(\d+)\.(.+)", module)
        if block:
            stage, index = int(block[1]), int(block[2])
            at_stage, first = places[stage]
            strided = index == 0 and row.stages[stage].stride == 2
            name = _block_names(row, row.stages[stage].kind, strided=strided)[block[3]]
            name = f"stages.{at_stage}.blocks.{first + index}.{name}"
        else:
            name = {**STEM, **HEADS[row.head]}[module]
        found.append(Counterpart(ours, f"{name}.{LEAVES.get(leaf, leaf)}", *_ways(ours, tensor, row.head_dim)))
    return found


def to_timm(model: CoAtNet) -> dict[str, Tensor]:
    """The state of a network as timm names and lays it out."""
    state = model.state_dict()
    return {each.theirs: each.to_theirs(state[each.ours]) for each in counterparts(model)}


def from_timm(model: CoAtNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of timm's network as ours names and lays it out."""
    return {each.ours: each.to_ours(state[each.theirs]) for each in counterparts(model)}


def _timm_places(row: Architecture) -> list[tuple[int, int]]:
    """For each stage of ours: the stage of timm's, and the place of its first block there."""
    places, at, used = [], -1, 0
    for stage in row.stages:
        if stage.stride == 2:
            at, used = at + 1, 0
        places.append((at, used))
        used += stage.depth
    return places


def _block_names(row: TimmVariant, kind: str, *, strided: bool) -> dict[str, str]:
    if kind == "transformer":
        return {**TRANSFORMER, **STRIDED} if strided else TRANSFORMER
    if row.convolution == "convnext":
        return CONVNEXT
    gate = "se_early" if row.squeeze_excite == "early" else "se"
    return {**MBCONV, **{ours: theirs.format(se=gate) for ours, theirs in SQUEEZE_EXCITE.items()}}


def _ways(name: str, tensor: Tensor, head_dim: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """There and back again: the layout of one tensor of ours."""
    if name.endswith("relative_bias.table"):
        shape = tensor.shape
        return (lambda theirs: theirs.T.reshape(shape)), (lambda ours: ours.flatten(1).T)
    if ".squeeze_excite." in name and name.endswith("weight"):  # their gate is made of convolutions
        return (lambda theirs: theirs[:, :, 0, 0]), (lambda ours: ours[:, :, None, None])
    if ".qkv." in name:  # theirs has q, k and v of the first head, then of the second
        rows = tensor.shape[0]
        heads = rows // (3 * head_dim)

        def to_ours(theirs: Tensor) -> Tensor:
            return theirs.unflatten(0, (heads, 3, head_dim)).transpose(0, 1).reshape(rows, *theirs.shape[1:])

        def to_theirs(ours: Tensor) -> Tensor:
            return ours.unflatten(0, (3, heads, head_dim)).transpose(0, 1).reshape(rows, *ours.shape[1:])

        return to_ours, to_theirs
    return (lambda theirs: theirs), (lambda ours: ours)
