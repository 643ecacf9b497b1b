"""The family: one row a member, and the variations of a row that the paper studies.

Rows 0 to 7 are Tables 3, 11 and 12 of the paper; the smaller ones are ours.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

from coatnet.errors import UserError, nearest
from coatnet.model.config import Row, Stage
from coatnet.model.timm.config import TIMM_VARIANTS, TimmVariant

CHOICES = {
    "stem": ("convolution", "patch"),
    "downsample": ("expand", "depthwise"),
    "mbconv_norm": ("batch", "layer"),
    "attention": ("pre", "post", "local", "linear"),
}
# What a variation is about: blocks of one kind, which a row may lack.
ABOUT = {
    "downsample": "mbconv",
    "mbconv_norm": "mbconv",
    "attention": "transformer",
    "relative_bias": "transformer",
    "head_dim": "transformer",
    "window": "transformer",
}
LAYOUTS = ("C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T", "ViT_REL")
# paper: Table 7 moves four blocks from S2 to S3 (V1) or two from S3 to S2 (V2).
MOVED_TO_S3 = {"V0": 0, "V1": 4, "V2": -2}
PATCH_STRIDE = 16  # paper: "16x16 stride" of the ViT stem
MAX_DEPTH, MAX_WIDTH = 128, 8192


@dataclass(frozen=True)
class Variant(Row):
    """A row of the family, complete: equal rows build equal networks.

    Args:
        stem: "convolution" (two 3x3), or "patch", the 16x16 patches of the ViT_REL study.
        downsample: where MBConv strides: its "expand" convolution (equation 5) or "depthwise" (Table 9).
        mbconv_norm: "batch" or "layer" (Table 8).
        attention: "pre" or "post" (equation 3), "local" or "linear" (section 2.2, B and C).
        window: side of the neighbourhood of local attention, cells, odd.
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
        if self.stem == "patch" and self.stem_stride != PATCH_STRIDE:
            raise UserError(
                f"stem='patch' has stem_stride={PATCH_STRIDE}, not {self.stem_stride}; layout='ViT_REL' sets both"
            )
        if not self.stages:
            raise UserError(f"{self.name} has no stages; a network has at least one")
        for stage in self.stages:
            self._check(stage)
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
            raise UserError(f"window={self.window!r}: a neighbourhood has a middle, so its side is odd, such as 7")

    def _check(self, stage: Stage) -> None:
        if stage.kind not in ("mbconv", "transformer") or stage.stride not in (1, 2):
            raise UserError(f"{stage}: a stage is 'mbconv' or 'transformer' with stride 1 or 2")
        if not (1 <= stage.depth <= MAX_DEPTH and 1 <= stage.width <= MAX_WIDTH):
            raise UserError(f"{stage}: depth is 1 to {MAX_DEPTH} and width 1 to {MAX_WIDTH}")
        if stage.kind == "transformer" and stage.width % self.head_dim:
            raise UserError(f"head_dim={self.head_dim} does not divide the width {stage.width} of a stage")

    def vary(self, *, layout: str | None = None, block_counts: str | None = None, **changes: Any) -> "Variant":
        """This row with the variations of the paper: a layout, block counts, or any field of a row.

        Raises:
            UserError: if a variation is unknown or does not make sense for this row.
        """
        known = [f.name for f in fields(self) if f.name not in ("name", "stages", "resolution")]
        for key in changes:
            if key not in known:
                raise UserError(
                    f"unknown variation {key!r}{nearest(key, ['layout', 'block_counts', *known])}; "
                    f"there are layout, block_counts, {', '.join(known)}"
                )
        varied = self
        if block_counts is not None:
            varied = varied._with_block_counts(block_counts)
        if layout is not None:
            varied = varied._with_layout(layout)
        kinds = {stage.kind for stage in varied.stages}
        for key in changes:
            if key in ABOUT and ABOUT[key] not in kinds:
                raise UserError(f"{key}={changes[key]!r} is about {ABOUT[key]} blocks, of which there are none here")
        varied = replace(varied, **changes)
        if "window" in changes and varied.attention != "local":
            raise UserError(f"window={varied.window} is about attention='local', not {varied.attention!r}; pass both")
        return varied

    def _with_block_counts(self, counts: str) -> "Variant":
        if counts not in MOVED_TO_S3:
            raise UserError(f"block_counts={counts!r} is unknown; it is one of {', '.join(MOVED_TO_S3)}")
        moved = MOVED_TO_S3[counts]
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
        if layout not in LAYOUTS:
            raise UserError(f"layout={layout!r} is unknown; it is one of {', '.join(LAYOUTS)}")
        if len(self.stages) != 4:
            raise UserError(f"layout={layout!r} names four stages; {self.name} has {len(self.stages)}")
        if layout == "ViT_REL":
            # chosen: all blocks of the row at the width of its S3, since the paper gives neither depth nor width.
            # That comes to the same size: 22, 44 and 77 M parameters for the 25, 42 and 75 M of coatnet-0 to -2.
            width, depth = self.stages[2].width, sum(stage.depth for stage in self.stages)
            blocks = Stage("transformer", depth, width, stride=1)
            return replace(self, stem="patch", stem_width=width, stem_stride=PATCH_STRIDE, stages=(blocks,))
        kinds = {"C": "mbconv", "T": "transformer"}
        stages = zip(self.stages, layout.split("-"), strict=True)
        return replace(self, stages=tuple(replace(stage, kind=kinds[letter]) for stage, letter in stages))

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Variant":
        """The row that `to_dict` wrote. Raises UserError if a key is unknown or missing, or a value is absurd."""
        try:
            values: dict[str, Any] = {**row, "stages": tuple(Stage(**stage) for stage in row["stages"])}
            return cls(**values)
        except (TypeError, KeyError) as error:
            raise UserError(f"not a row of the family: {error}") from None


@dataclass(frozen=True)
class Published:
    """What the paper reports: parameters, and multiply-accumulates by resolution for both places of the stride."""

    parameters: float
    macs: Mapping[int, float] = field(default_factory=dict)
    macs_depthwise: Mapping[int, float] = field(default_factory=dict)


C = partial(Stage, "mbconv")  # the paper's letters
T = partial(Stage, "transformer")

_ROWS = (
    # paper: Table 3
    Variant("coatnet-0", 64, (C(2, 96), C(3, 192), T(5, 384), T(2, 768))),
    Variant("coatnet-1", 64, (C(2, 96), C(6, 192), T(14, 384), T(2, 768))),
    Variant("coatnet-2", 128, (C(2, 128), C(6, 256), T(14, 512), T(2, 1024))),
    Variant("coatnet-3", 192, (C(2, 192), C(6, 384), T(14, 768), T(2, 1536))),
    Variant("coatnet-4", 192, (C(2, 192), C(12, 384), T(28, 768), T(2, 1536))),
    # paper: Table 11; head size 64
    Variant("coatnet-5", 192, (C(2, 256), C(12, 512), T(28, 1280), T(2, 2048)), head_dim=64),
    # paper: Table 12; head size 128, S3 holds MBConv blocks and then Transformer blocks on one grid
    # chosen: S4 of width 3072, which gives the published 1.47 B; the printed 2048 gives 1.35 B.
    Variant("coatnet-6", 192, (C(2, 192), C(4, 384), C(8, 768), T(42, 1536, 1), T(2, 3072)), head_dim=128),
    Variant("coatnet-6-printed", 192, (C(2, 192), C(4, 384), C(8, 768), T(42, 1536, 1), T(2, 2048)), head_dim=128),
    Variant("coatnet-7", 192, (C(2, 256), C(4, 512), C(8, 1024), T(42, 2048, 1), T(2, 3072)), head_dim=128),
    # chosen: for small data, the stages of coatnet-0 at two thirds, half and a third of their width.
    Variant("coatnet-nano", 64, (C(2, 64), C(3, 128), T(5, 256), T(2, 512))),
    Variant("coatnet-pico", 48, (C(2, 48), C(3, 96), T(5, 192), T(2, 384))),
    Variant("coatnet-femto", 32, (C(2, 32), C(3, 64), T(4, 128), T(2, 256))),
    # chosen: for images of 64 pixels and less, where a total stride of 32 leaves nothing: a stem without stride,
    # and three stages that end at stride 4, so that 28 pixels give 7 x 7 cells to attend over.
    Variant("coatnet-nano-64", 32, (C(2, 64), C(3, 128), T(4, 256, 1)), resolution=32, stem_stride=1),
    Variant("coatnet-pico-64", 24, (C(1, 48), C(3, 96), T(2, 128, 1)), resolution=32, stem_stride=1),
    Variant("coatnet-femto-64", 16, (C(1, 32), C(2, 64), T(2, 128, 1)), resolution=32, stem_stride=1),
    # chosen: for 16 pixels and less, the same with one stride less.
    Variant("coatnet-femto-16", 16, (C(1, 32, 1), C(2, 64), T(2, 128, 1)), resolution=8, stem_stride=1),
)
VARIANTS = {row.name: row for row in _ROWS}

# paper: Tables 4, 5, 9, 11 and 12; its "FLOPs" are multiply-accumulates.
PUBLISHED = {
    "coatnet-0": Published(25e6, {224: 4.2e9, 384: 13.4e9}, {224: 4.6e9}),
    "coatnet-1": Published(42e6, {224: 8.4e9, 384: 27.4e9}, {224: 8.8e9}),
    "coatnet-2": Published(75e6, {224: 15.7e9, 384: 49.8e9, 512: 96.7e9}, {224: 16.6e9}),
    "coatnet-3": Published(168e6, {224: 34.7e9, 384: 107.4e9, 512: 203.1e9}, {384: 114e9, 512: 214e9}),
    "coatnet-4": Published(275e6, {384: 189.5e9, 512: 360.9e9}),
    "coatnet-5": Published(688e6, {512: 812e9}),
    "coatnet-6": Published(1.47e9, {512: 1521e9}),
    "coatnet-7": Published(2.44e9, {512: 2586e9}),
}


def list_variants() -> list[str]:
    """The names that `create_model` knows: the family of the paper, the small rows, and timm's architectures."""
    return [*VARIANTS, *TIMM_VARIANTS]


def default_variant(resolution: int) -> str:
    """The row to begin with for images of that many pixels, on a machine without an accelerator."""
    # chosen: the largest row that trains on some 10,000 images within the hour on two CPU cores.
    if resolution <= 16:
        return "coatnet-femto-16"
    if resolution <= 64:
        return "coatnet-pico-64"
    return "coatnet-femto" if resolution <= 160 else "coatnet-pico"


def find_variant(name: str) -> Variant | TimmVariant:
    """The row of that name. Raises UserError with the nearest names if there is none."""
    rows = {**VARIANTS, **TIMM_VARIANTS}
    if name not in rows:
        raise UserError(f"unknown model {name!r}{nearest(name, list(rows))}; `coatnet models` lists all {len(rows)}")
    return rows[name]


def read_row(values: Mapping[str, Any]) -> Variant | TimmVariant:
    """The row that `to_dict` wrote: in full, or only its name for a row that knows no variations.

    Raises:
        UserError: if a key is unknown or missing, or a value is absurd.
    """
    return find_variant(values["name"]) if values.keys() == {"name"} else Variant.from_dict(values)
