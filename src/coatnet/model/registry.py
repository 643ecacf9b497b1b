"""All variants by name: the paper's, smaller ones for small data sets, and timm's; and the figures of the paper."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from coatnet.errors import UserError, nearest
from coatnet.model.config import Stage, Variant
from coatnet.model.timm.config import TIMM_VARIANTS, TimmVariant


@dataclass(frozen=True)
class Published:
    """Figures that the paper reports.

    Attributes:
        parameters: number of parameters.
        macs: multiply-accumulates by resolution, with the stride in the expand convolution (equation 5).
        macs_depthwise: the same with the stride in the depthwise convolution (Table 9).
    """

    parameters: float
    macs: Mapping[int, float] = field(default_factory=dict)
    macs_depthwise: Mapping[int, float] = field(default_factory=dict)


C = partial(Stage, "mbconv")  # the paper's letters
T = partial(Stage, "transformer")

_VARIANTS = (
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
VARIANTS = {row.name: row for row in _VARIANTS}

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
    """Names that `create_model` accepts: the paper's variants, smaller ones, and timm's architectures."""
    return [*VARIANTS, *TIMM_VARIANTS]


def default_variant(resolution: int) -> str:
    """Name of the variant to start with on a machine without a GPU.

    Args:
        resolution: side of the images in pixels.
    """
    # chosen: the largest variant that trains on some 10,000 images within an hour on two CPU cores.
    if resolution <= 16:
        return "coatnet-femto-16"
    if resolution <= 64:
        return "coatnet-pico-64"
    return "coatnet-femto" if resolution <= 160 else "coatnet-pico"


def find_variant(name: str) -> Variant | TimmVariant:
    """Return the variant with this name, one of `list_variants()`.

    Raises:
        UserError: there is no such variant; the message suggests the nearest name.
    """
    known = {**VARIANTS, **TIMM_VARIANTS}
    if name not in known:
        raise UserError(f"unknown model {name!r}{nearest(name, list(known))}; `coatnet models` lists all {len(known)}")
    return known[name]


def variant_from_dict(values: Mapping[str, Any]) -> Variant | TimmVariant:
    """Return the variant that `to_dict` described: all its fields, or only the name of one of timm's.

    Raises:
        UserError: a key is unknown or missing, or a value is out of bounds.
    """
    return find_variant(values["name"]) if values.keys() == {"name"} else Variant.from_dict(values)
