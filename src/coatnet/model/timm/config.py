"""timm's CoAtNet architectures: one row a network, its differences from the paper as values.

Source: timm 1.0.31, the constructed networks of `maxxvit.py`. The names are timm's own.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from coatnet.errors import UserError
from coatnet.model.config import Architecture, Stage


@dataclass(frozen=True)
class TimmVariant(Architecture):
    """A network of timm, complete. The values of `coatnet_0_224` to `coatnet_5_224` are the defaults.

    Args:
        stem_first_width: width between the two convolutions of the stem.
        convolution: kind of the convolutional blocks, "mbconv" or "convnext".
        activation: in the stem and in MBConv, "gelu" or "silu".
        pre_activation: whether MBConv activates behind its first norm.
        expansion_of: the width that MBConv makes four times as wide in its middle, "output" or "input".
        stride_in: where MBConv strides: an average "pool" in front of its convolutions, or its "depthwise" one.
        squeeze_excite: "late", behind the second norm and activation, or "early", in front of them.
        gate_activation: inside squeeze-excitation, "silu" or "relu".
        convolution_bias: biases on the last convolution of MBConv and on its shortcut.
        pool: of the shortcuts and in front of a strided attention, "average" (2x2) or "max" (3x3).
        shortcut_bias: a bias on the shortcut around a strided attention.
        attention_width: the width that a widening attention attends in, "output" or "input".
        relative_bias: "table", or "mlp" of log-coordinates with `mlp_width` hidden units.
        transformer_norm: "layer" or "batch"; also that of a "mean" head.
        layer_scale: initial gain of the residuals of a Transformer, none for 0.
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
        """This row: the paper's variations are not for timm's networks. Raises UserError if one is asked for."""
        if changes:
            raise UserError(
                f"{self.name} is timm's and knows no {', '.join(sorted(changes))}; "
                "variations are for the paper's rows, such as coatnet-0"
            )
        return self

    def to_dict(self) -> dict[str, str]:
        """The name, which says everything, for a file."""
        return {"name": self.name}


def _row(
    name: str,
    stem: tuple[int, int],
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    kinds: str = "CCTT",
    **values: Any,
) -> TimmVariant:
    """The row of four stages; one of kind "X" begins with an MBConv and goes on with Transformers."""
    stages: list[Stage] = []
    for kind, depth, width in zip(kinds, depths, widths, strict=True):
        if kind == "X":
            stages += [Stage("mbconv", 1, width), Stage("transformer", depth - 1, width, stride=1)]
        else:
            stages.append(Stage({"C": "mbconv", "T": "transformer"}[kind], depth, width))
    return TimmVariant(name, stem[1], tuple(stages), stem_first_width=stem[0], **values)


# Wightman's rows were made before Google's code appeared (the first kind) or after a look at it (the second).
_own = partial(_row, activation="silu", expansion_of="input", attention_width="input", head="mean")
_first = partial(_own, pre_activation=True, gate_activation="relu", convolution_bias=False)
_early = partial(_first, squeeze_excite="early", shortcut_bias=False)

_STEM, _WIDE_STEM, _WIDEST_STEM = (32, 64), (64, 128), (96, 192)
_NANO, _BASE, _WIDE, _WIDEST = (tuple(first * factor for factor in (1, 2, 4, 8)) for first in (64, 96, 128, 192))
_SHORT, _LONG = (2, 3, 7, 2), (2, 6, 14, 2)
_LARGE: dict[str, Any] = {"gate_activation": "silu", "layer_scale": 1e-6}
_MLP = {"relative_bias": "mlp"}

_ROWS = (
    _own("coatnet_pico_rw_224", _STEM, (2, 3, 5, 2), _NANO),
    _own("coatnet_nano_rw_224", _STEM, (3, 4, 6, 3), _NANO, stride_in="pool"),
    _early("coatnet_0_rw_224", _STEM, _SHORT, _BASE, stride_in="pool"),
    _early("coatnet_1_rw_224", _STEM, _LONG, _BASE),
    _first("coatnet_2_rw_224", _WIDE_STEM, _LONG, _WIDE, gate_activation="silu"),
    _first("coatnet_3_rw_224", _WIDEST_STEM, _LONG, _WIDEST, **_LARGE),
    _early("coatnet_bn_0_rw_224", _STEM, _SHORT, _BASE, transformer_norm="batch"),
    _own("coatnet_rmlp_nano_rw_224", _STEM, (3, 4, 6, 3), _NANO, relative_bias="mlp", mlp_width=384),
    _first("coatnet_rmlp_0_rw_224", _STEM, _SHORT, _BASE, **_MLP),
    _early(
        "coatnet_rmlp_1_rw_224", _STEM, _LONG, _BASE, stride_in="pool", pool="max", relative_bias="mlp", mlp_width=384
    ),
    _first("coatnet_rmlp_1_rw2_224", _STEM, _LONG, _BASE, **_MLP),
    _first("coatnet_rmlp_2_rw_224", _WIDE_STEM, _LONG, _WIDE, **_LARGE, **_MLP),
    _first("coatnet_rmlp_2_rw_384", _WIDE_STEM, _LONG, _WIDE, **_LARGE, **_MLP, resolution=384),
    _first("coatnet_rmlp_3_rw_224", _WIDEST_STEM, _LONG, _WIDEST, **_LARGE, **_MLP),
    _first("coatnet_nano_cc_224", _STEM, (3, 4, 6, 3), _NANO, kinds="CCXX", stride_in="pool"),
    _own("coatnext_nano_rw_224", _STEM, (3, 4, 6, 3), _NANO, convolution="convnext", activation="gelu"),
    _row("coatnet_0_224", (64, 64), (2, 3, 5, 2), _BASE),
    _row("coatnet_1_224", (64, 64), _LONG, _BASE),
    _row("coatnet_2_224", (128, 128), _LONG, _WIDE),
    _row("coatnet_3_224", (192, 192), _LONG, _WIDEST),
    _row("coatnet_4_224", (192, 192), (2, 12, 28, 2), _WIDEST),
    _row("coatnet_5_224", (192, 192), (2, 12, 28, 2), (256, 512, 1280, 2048)),
    _own("test_coatnet", (16, 32), (1, 1, 2, 1), (32, 64, 96, 128), stride_in="pool", resolution=160),
)
TIMM_VARIANTS = {row.name: row for row in _ROWS}
