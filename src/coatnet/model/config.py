"""Configuration of a network: its stages, and as fields of a `Variant` the design choices that the paper studies."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from coatnet.errors import UserError, nearest

CHOICES = {
    "stem": ("convolution", "patch"),
    "downsample": ("expand", "depthwise"),
    "mbconv_norm": ("batch", "layer"),
    "attention": ("pre", "post", "local", "linear"),
}
# The kind of blocks that an option changes; an option for blocks that a variant lacks is refused.
BLOCK_KIND_OF_OPTION = {
    "downsample": "mbconv",
    "mbconv_norm": "mbconv",
    "attention": "transformer",
    "relative_bias": "transformer",
    "head_dim": "transformer",
    "window": "transformer",
}
LAYOUTS = ("C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T", "ViT_REL")
# paper: Table 7 moves four blocks from S2 to S3 (V1) or two from S3 to S2 (V2).
BLOCKS_MOVED_TO_S3 = {"V0": 0, "V1": 4, "V2": -2}
# Variations beside the fields of `Variant`.
SHORTHANDS = ("layout", "block_counts", "depths", "widths", "strides")
MAX_STAGE_DEPTH, MAX_STAGE_WIDTH = 128, 8192


@dataclass(frozen=True)
class Stage:
    """One stage: `depth` blocks of one kind.

    Args:
        kind: "mbconv" or "transformer".
        depth: number of blocks.
        width: channels of the blocks' outputs.
        stride: of the first block, 1 or 2.
    """

    kind: str
    depth: int
    width: int
    stride: int = 2


@dataclass(frozen=True)
class Architecture:
    """Stem and stages of a network; what the paper's and timm's variants have in common.

    Args:
        name: name in `list_variants()`.
        stem_width: channels of the stem's output.
        stages: stages from the first to the last.
        head_dim: width of an attention head.
        resolution: default side of the square images that the relative biases belong to, in pixels.
        stem_stride: stride of the stem.
    """

    name: str
    stem_width: int
    stages: tuple[Stage, ...]
    head_dim: int = 32
    resolution: int = 224
    stem_stride: int = 2

    @property
    def total_stride(self) -> int:
        """Side of the part of an image that becomes one cell of the last feature map, in pixels."""
        return self.stem_stride * math.prod(stage.stride for stage in self.stages)

    def grids(self, resolution: int) -> tuple[int, ...]:
        """Side of the feature map after each stage, in cells, for square images of `resolution` pixels."""
        sides, side = [], -(-resolution // self.stem_stride)
        for stage in self.stages:
            side = -(-side // stage.stride)
            sides.append(side)
        return tuple(sides)


@dataclass(frozen=True)
class Variant(Architecture):
    """A network of the paper's family: everything that `create_model` needs except classes, channels and resolution.

    Args:
        stem: "convolution" (two 3x3), or "patch", the patches of ViT_REL (section 2.2), with a side of `stem_stride`.
        downsample: the convolution of MBConv with the stride: "expand" (equation 5) or "depthwise" (Table 9).
        mbconv_norm: "batch" or "layer" (Table 8).
        attention: "pre" or "post" (equation 3), "local" or "linear" (section 2.2, options B and C).
        relative_bias: whether attention has a relative bias (Table 6).
        window: side of the window of local attention in cells, odd.

    Raises:
        UserError: a value is unknown, out of bounds or does not fit the others.
    """

    stem: str = "convolution"
    downsample: str = "expand"
    mbconv_norm: str = "batch"
    attention: str = "pre"
    relative_bias: bool = True
    window: int = 7

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise UserError(f"{key}={getattr(self, key)!r} is unknown; it is one of {', '.join(choices)}")
        for key in ("stem_width", "head_dim", "resolution", "stem_stride"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)!r}: it is a whole number of at least 1")
        if not isinstance(self.relative_bias, bool):
            raise UserError(f"relative_bias={self.relative_bias!r}: it is true or false")
        if not self.stages:
            raise UserError(f"{self.name} has no stages; a network has at least one")
        for stage in self.stages:
            self._check_stage(stage)
        kinds = [stage.kind for stage in self.stages]
        if kinds != sorted(kinds):
            raise UserError(f"stages {kinds}: every mbconv stage stands before any transformer stage (section 2.2)")
        if self.attention == "linear" and self.relative_bias:
            raise UserError(
                "attention='linear' forms no matrix that a relative bias could be added to; pass relative_bias=False"
            )
        if self.attention == "post" and not self.relative_bias:
            raise UserError("attention='post' without relative_bias is attention='pre' without it; pass that")
        if type(self.window) is not int or self.window < 1 or self.window % 2 == 0:
            raise UserError(f"window={self.window!r}: the side of a window must be odd, such as 7")

    def _check_stage(self, stage: Stage) -> None:
        if stage.kind not in ("mbconv", "transformer") or stage.stride not in (1, 2):
            raise UserError(f"{stage}: a stage is 'mbconv' or 'transformer' with stride 1 or 2")
        if not (1 <= stage.depth <= MAX_STAGE_DEPTH and 1 <= stage.width <= MAX_STAGE_WIDTH):
            raise UserError(f"{stage}: depth is 1 to {MAX_STAGE_DEPTH} and width 1 to {MAX_STAGE_WIDTH}")
        if stage.kind == "transformer" and stage.width % self.head_dim:
            raise UserError(f"head_dim={self.head_dim} does not divide the width {stage.width} of a stage")

    def vary(
        self,
        *,
        layout: str | None = None,
        block_counts: str | None = None,
        depths: Sequence[int] | None = None,
        widths: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        **changes: Any,
    ) -> "Variant":
        """Return a variant with changed options.

        Args:
            layout: kinds of the stages, C or T for each, such as "C-C-T-T", or "ViT_REL" (section 2.2).
            block_counts: "V0", "V1" or "V2": blocks moved between S2 and S3 (Table 7).
            depths: blocks of each stage; it and the next two are counted in the stages of the layout.
            widths: channels of each stage.
            strides: of the first block of each stage.
            changes: fields of `Variant`.

        Raises:
            UserError: an option is unknown or does not apply to this variant.
        """
        known = [f.name for f in fields(self) if f.name not in ("name", "stages", "resolution")]
        for key in changes:
            if key not in known:
                raise UserError(
                    f"unknown variation {key!r}{nearest(key, [*SHORTHANDS, *known])}; "
                    f"there are {', '.join((*SHORTHANDS, *known))}"
                )
        varied = self
        if block_counts is not None:
            varied = varied._with_block_counts(block_counts)
        if layout is not None:
            varied = varied._with_layout(layout)
        kinds = {stage.kind for stage in varied.stages}
        for key in changes:
            if (kind := BLOCK_KIND_OF_OPTION.get(key)) and kind not in kinds:
                raise UserError(f"{key}={changes[key]!r} is about {kind} blocks, of which there are none here")
        stages = varied._stages_with(depth=depths, width=widths, stride=strides)
        varied = replace(varied, stages=stages, **changes)
        if "window" in changes and varied.attention != "local":
            raise UserError(f"window={varied.window} is about attention='local', not {varied.attention!r}; pass both")
        return varied

    def _stages_with(self, **values: Any) -> tuple[Stage, ...]:
        """The stages with other depths, widths or strides, one value for each of them."""
        stages = self.stages
        for name, given in values.items():
            if given is None:
                continue
            whole = isinstance(given, list | tuple) and all(type(value) is int for value in given)
            if not whole or len(given) != len(stages):
                raise UserError(
                    f"{name}s={given!r}: {len(stages)} whole numbers, one for each stage, such as "
                    f"{[getattr(stage, name) for stage in stages]}"
                )
            changes: list[dict[str, Any]] = [{name: value} for value in given]
            stages = tuple(replace(stage, **change) for stage, change in zip(stages, changes, strict=True))
        return stages

    def _with_block_counts(self, counts: str) -> "Variant":
        if not isinstance(counts, str) or counts not in BLOCKS_MOVED_TO_S3:
            raise UserError(f"block_counts={counts!r} is unknown; it is one of {', '.join(BLOCKS_MOVED_TO_S3)}")
        moved = BLOCKS_MOVED_TO_S3[counts]
        if len(self.stages) != 4:
            raise UserError(f"block_counts={counts!r} is about four stages; {self.name} has {len(self.stages)}")
        if not (self.stages[1].depth > moved and self.stages[2].depth > -moved):
            raise UserError(
                f"block_counts={counts!r} moves {abs(moved)} blocks between S2 and S3: too many for {self.name}"
            )
        s1, s2, s3, s4 = self.stages
        s2, s3 = replace(s2, depth=s2.depth - moved), replace(s3, depth=s3.depth + moved)
        return replace(self, stages=(s1, s2, s3, s4))

    def _with_layout(self, layout: str) -> "Variant":
        if layout != "ViT_REL" and not re.fullmatch("C(-C)*(-T)*|T(-T)*", str(layout)):
            raise UserError(
                f"layout={layout!r} is unknown; it is a letter for each stage, every C before any T (section 2.2), "
                f"or ViT_REL; for four stages: {', '.join(LAYOUTS)}"
            )
        kinds, letters = {"C": "mbconv", "T": "transformer"}, str(layout).split("-")
        named = 4 if layout == "ViT_REL" else len(letters)
        if len(self.stages) != named:
            raise UserError(f"layout={layout!r} is about {named} stages; {self.name} has {len(self.stages)}")
        if layout == "ViT_REL":
            # chosen: all blocks at the width of S3, since the paper gives neither depth nor width. That gives similar
            # sizes: 22, 44 and 77 M parameters for the 25, 42 and 75 M of coatnet-0 to -2.
            width, depth = self.stages[2].width, sum(stage.depth for stage in self.stages)
            blocks = Stage("transformer", depth, width, stride=1)
            # paper: "16x16 stride" of the stem at 224 pixels, where S3 has the same stride.
            patch = self.stem_stride * math.prod(stage.stride for stage in self.stages[:3])
            return replace(self, stem="patch", stem_width=width, stem_stride=patch, stages=(blocks,))
        stages = zip(self.stages, letters, strict=True)
        return replace(self, stages=tuple(replace(stage, kind=kinds[letter]) for stage, letter in stages))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Variant":
        """Create a variant from the values of `to_dict`.

        Raises:
            UserError: a key is unknown or missing, or a value is out of bounds.
        """
        try:
            arguments: dict[str, Any] = {**values, "stages": tuple(Stage(**stage) for stage in values["stages"])}
            return cls(**arguments)
        except (TypeError, KeyError) as error:
            raise UserError(f"not a variant: {error}") from None
