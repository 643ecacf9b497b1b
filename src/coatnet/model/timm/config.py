"""timm's CoAtNet architectures, with their differences from the paper as fields of a `TimmVariant`.

Source: timm 1.0.31, the networks that `maxxvit.py` constructs. The names are timm's.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from coatnet.errors import UserError
from coatnet.model.config import Architecture, Stage


@dataclass(frozen=True)
class TimmVariant(Architecture):
    """A network of timm. The defaults are those of `coatnet_0_224` to `coatnet_5_224`.

    Args:
        stem_first_width: channels between the two convolutions of the stem.
        convolution: kind of the convolutional blocks, "mbconv" or "convnext".
        activation: in the stem and in MBConv, "gelu" or "silu".
        pre_activation: whether MBConv has an activation after its first norm.
        expansion_of: the width that MBConv expands four times, "output" or "input".
        stride_in: where MBConv has its stride: an average "pool" before the convolutions, or the "depthwise" one.
        squeeze_excite: "late", after the second norm and activation, or "early", before them.
        gate_activation: activation in squeeze-excitation, "silu" or "relu".
        convolution_bias: whether the last convolution of MBConv and its shortcut have biases.
        pool: of the shortcuts and before a strided attention, "average" (2x2) or "max" (3x3).
        shortcut_bias: whether the shortcut around a strided attention has a bias.
        attention_width: width of queries, keys and values where the width grows, "output" or "input".
        relative_bias: "table", or "mlp" of log-coordinates with `mlp_width` hidden units.
        mlp_width: hidden units of the "mlp".
        transformer_norm: "layer" or "batch"; also the norm of a "mean" head.
        layer_scale: initial gain of the residual branches of Transformer blocks; 0 for no gain.
        head: "hidden" (mean, norm, tanh layer) or "mean" (norm, mean).
    """

    stem_first_width: int = 64
    convolution: str = "mbconv"
    activation: str = "gelu"
    pre_activation: bool = False
    expansion_of: str = "output"
    stride_in: str = "depthwise"
    squeeze_excite: str = "late"
    gate_activation: str = "silu"
    convolution_bias: bool = True
    pool: str = "average"
    shortcut_bias: bool = True
    attention_width: str = "output"
    relative_bias: str = "table"
    mlp_width: int = 512
    transformer_norm: str = "layer"
    layer_scale: float = 0.0
    head: str = "hidden"

    def vary(self, **changes: Any) -> "TimmVariant":
        """Return this variant. Raises UserError if changes are given, which timm's networks do not have."""
        if changes:
            raise UserError(
                f"{self.name} is an architecture of timm without the option {', '.join(sorted(changes))}; "
                "options are for the paper's variants, such as coatnet-0"
            )
        return self

    def to_dict(self) -> dict[str, str]:
        """The name, for a file."""
        return {"name": self.name}


def _variant(
    name: str,
    stem: tuple[int, int],
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    kinds: str = "CCTT",
    **values: Any,
) -> TimmVariant:
    """A variant of four stages of kinds "C", "T" or "X": one MBConv block, then Transformer blocks."""
    stages: list[Stage] = []
    for kind, depth, width in zip(kinds, depths, widths, strict=True):
        if kind == "X":
            stages += [Stage("mbconv", 1, width), Stage("transformer", depth - 1, width, stride=1)]
        else:
            stages.append(Stage({"C": "mbconv", "T": "transformer"}[kind], depth, width))
    return TimmVariant(name, stem[1], tuple(stages), stem_first_width=stem[0], **values)


# timm's own variants ("rw") predate the authors' later code, which the others follow.
_rw = partial(_variant, activation="silu", expansion_of="input", attention_width="input", head="mean")
_rw_preactivated = partial(_rw, pre_activation=True, gate_activation="relu", convolution_bias=False)
_rw_early_gate = partial(_rw_preactivated, squeeze_excite="early", shortcut_bias=False)

_STEM, _WIDE_STEM, _WIDEST_STEM = (32, 64), (64, 128), (96, 192)
_NANO, _BASE, _WIDE, _WIDEST = (tuple(first * factor for factor in (1, 2, 4, 8)) for first in (64, 96, 128, 192))
_SHORT, _LONG = (2, 3, 7, 2), (2, 6, 14, 2)
_LARGE: dict[str, Any] = {"gate_activation": "silu", "layer_scale": 1e-6}
_MLP = {"relative_bias": "mlp"}

_VARIANTS = (
    _rw("coatnet_pico_rw_224", _STEM, (2, 3, 5, 2), _NANO),
    _rw("coatnet_nano_rw_224", _STEM, (3, 4, 6, 3), _NANO, stride_in="pool"),
    _rw_early_gate("coatnet_0_rw_224", _STEM, _SHORT, _BASE, stride_in="pool"),
    _rw_early_gate("coatnet_1_rw_224", _STEM, _LONG, _BASE),
    _rw_preactivated("coatnet_2_rw_224", _WIDE_STEM, _LONG, _WIDE, gate_activation="silu"),
    _rw_preactivated("coatnet_3_rw_224", _WIDEST_STEM, _LONG, _WIDEST, **_LARGE),
    _rw_early_gate("coatnet_bn_0_rw_224", _STEM, _SHORT, _BASE, transformer_norm="batch"),
    _rw("coatnet_rmlp_nano_rw_224", _STEM, (3, 4, 6, 3), _NANO, relative_bias="mlp", mlp_width=384),
    _rw_preactivated("coatnet_rmlp_0_rw_224", _STEM, _SHORT, _BASE, **_MLP),
    _rw_early_gate(
        "coatnet_rmlp_1_rw_224", _STEM, _LONG, _BASE, stride_in="pool", pool="max", relative_bias="mlp", mlp_width=384
    ),
    _rw_preactivated("coatnet_rmlp_1_rw2_224", _STEM, _LONG, _BASE, **_MLP),
    _rw_preactivated("coatnet_rmlp_2_rw_224", _WIDE_STEM, _LONG, _WIDE, **_LARGE, **_MLP),
    _rw_preactivated("coatnet_rmlp_2_rw_384", _WIDE_STEM, _LONG, _WIDE, **_LARGE, **_MLP, resolution=384),
    _rw_preactivated("coatnet_rmlp_3_rw_224", _WIDEST_STEM, _LONG, _WIDEST, **_LARGE, **_MLP),
    _rw_preactivated("coatnet_nano_cc_224", _STEM, (3, 4, 6, 3), _NANO, kinds="CCXX", stride_in="pool"),
    _rw("coatnext_nano_rw_224", _STEM, (3, 4, 6, 3), _NANO, convolution="convnext", activation="gelu"),
    _variant("coatnet_0_224", (64, 64), (2, 3, 5, 2), _BASE),
    _variant("coatnet_1_224", (64, 64), _LONG, _BASE),
    _variant("coatnet_2_224", (128, 128), _LONG, _WIDE),
    _variant("coatnet_3_224", (192, 192), _LONG, _WIDEST),
    _variant("coatnet_4_224", (192, 192), (2, 12, 28, 2), _WIDEST),
    _variant("coatnet_5_224", (192, 192), (2, 12, 28, 2), (256, 512, 1280, 2048)),
    _rw("test_coatnet", (16, 32), (1, 1, 2, 1), (32, 64, 96, 128), stride_in="pool", resolution=160),
)
TIMM_VARIANTS = {row.name: row for row in _VARIANTS}
