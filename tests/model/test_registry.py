"""The variants have the sizes that the paper publishes; options build or are refused."""

from dataclasses import replace

import pytest
import torch

from coatnet.errors import UserError
from coatnet.model.complexity import complexity, embedded_complexities
from coatnet.model.config import Stage, Variant
from coatnet.model.network import create_model
from coatnet.model.registry import PUBLISHED, VARIANTS, default_variant, find_variant, list_variants

OURS = {name for name in VARIANTS if name not in PUBLISHED}
# The derived counts of parameters and, at 224, of multiply-accumulates in units of 10 M.
EXACT = {
    "coatnet-0": (25_036_884, 414),
    "coatnet-1": (42_225_840, 824),
    "coatnet-2": (74_684_872, 1550),
    "coatnet-3": (166_966_456, 3437),
    "coatnet-4": (275_425_480, 6024),
    "coatnet-5": (687_053_144, 14218),
    "coatnet-6": (1_471_125_424, 26520),
    "coatnet-6-printed": (1_348_435_232, 25948),
    "coatnet-7": (2_441_972_920, 45787),
}
COUNTED_QUICKLY = {"coatnet-2", "coatnet-femto-64", "coatnet_0_rw_224", "coatnet_nano_cc_224", "coatnet_rmlp_2_rw_384"}


def test_every_variant_of_the_paper_is_listed():
    assert list_variants()[:8] == [f"coatnet-{i}" for i in range(7)] + ["coatnet-6-printed"]
    assert {f"coatnet-{i}" for i in range(8)} == PUBLISHED.keys()
    assert OURS.isdisjoint(PUBLISHED) and EXACT.keys() == PUBLISHED.keys() | {"coatnet-6-printed"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_within_one_percent_of_the_published(name):
    parameters = complexity(name, 224).parameters
    assert parameters == pytest.approx(PUBLISHED[name].parameters, rel=0.01)


@pytest.mark.parametrize("name", EXACT)
def test_parameters_and_macs_are_the_derived_ones(name):
    counted = complexity(name, 224)
    assert (counted.parameters, round(counted.macs / 1e7)) == EXACT[name]


def test_the_embedded_costs_are_of_every_variant_and_have_its_parameters():
    assert list(embedded_complexities()) == list_variants(), "run scripts/embed_complexities.py"
    for name, costs in embedded_complexities().items():
        with torch.device("meta"):
            network = create_model(name)
        assert {cost.parameters for cost in costs.values()} == {sum(p.numel() for p in network.parameters())}, name


@pytest.mark.parametrize(
    "name",
    [
        name if name in COUNTED_QUICKLY else pytest.param(name, marks=pytest.mark.nightly)  # all take half a minute
        for name in list_variants()
    ],
)
def test_the_embedded_costs_are_the_counted_ones(name):
    resolution = find_variant(name).resolution
    for side, cost in embedded_complexities()[name].items():
        assert cost == complexity(name, side, table_resolution=resolution), "run scripts/embed_complexities.py"


def test_coatnet_6_as_printed_misses_its_published_size():
    assert complexity("coatnet-6-printed", 224).parameters < 0.93 * PUBLISHED["coatnet-6"].parameters


@pytest.mark.parametrize("downsample", ["expand", "depthwise"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_are_at_most_four_percent_below_the_published_flops(name, downsample):
    published = PUBLISHED[name]
    for resolution, macs in (published.macs if downsample == "expand" else published.macs_depthwise).items():
        counted = complexity(name, resolution, downsample=downsample).macs
        assert 1.0 <= macs / counted <= 1.04, resolution


def test_both_strides_have_equal_parameters_and_differ_by_the_published_macs():
    for name, difference in (("coatnet-0", 0.41), ("coatnet-1", 0.40), ("coatnet-2", 0.93)):
        expand, depthwise = (complexity(name, 224, downsample=d) for d in ("expand", "depthwise"))
        assert expand.parameters == depthwise.parameters
        assert (depthwise.macs - expand.macs) / 1e9 == pytest.approx(difference, abs=0.01)


def test_counts_of_a_tiny_network_equal_the_arithmetic():
    variant = Variant("tiny", 8, VARIANTS["coatnet-0"].stages[:1])
    width, hidden, squeezed = 96, 384, 24
    blocks = 0
    macs = 112 * 112 * (27 * 8 + 72 * 8)
    for in_width, side in ((8, 56), (width, 56)):
        blocks += 2 * in_width + in_width * hidden + 9 * hidden + 4 * hidden
        blocks += 2 * hidden * squeezed + squeezed + hidden + hidden * width + width
        macs += side * side * (in_width * hidden + 9 * hidden + hidden * width)
        macs += 2 * hidden * squeezed
    shortcut = 8 * width + width
    head = 2 * width + width * width + width + width * 10 + 10
    macs += 56 * 56 * 8 * width + width * width + width * 10
    counted = complexity(variant, 224, num_classes=10)
    assert counted.parameters == 27 * 8 + 16 + 72 * 8 + 8 + blocks + shortcut + head
    assert counted.macs == macs


def test_activation_bytes_are_what_an_mbconv_keeps():
    """Of one block in a stage of its own, on a 56 x 56 grid behind a stem on 112 x 112, in units of 4 bytes."""
    variant = Variant("tiny", 8, (Stage("mbconv", 1, 16),))
    stem, grid, hidden = 112 * 112, 56 * 56, 64
    kept = 3 * 224 * 224 + 8 * stem + 8 * stem + 8 * stem  # image; before and behind BatchNorm; behind GELU
    kept += 8 * stem + 8 * stem  # the map behind the stem, behind the first norm
    kept += hidden * grid * 3 * 2  # before BatchNorm, behind it, behind GELU: twice
    kept += hidden * grid  # gated
    kept += 8 * grid + 2 * 8 * grid  # pooled, and where each maximum stood (8 bytes)
    counted = complexity(variant, 224, num_classes=10).activation_bytes
    assert counted == pytest.approx(4 * kept, rel=0.01)  # vectors of a few hundred bytes are left out here


def test_vit_rel_has_the_size_of_its_variant():
    for name in ("coatnet-0", "coatnet-1", "coatnet-2"):
        plain, vit = complexity(name, 224), complexity(name, 224, layout="ViT_REL")
        assert vit.parameters == pytest.approx(plain.parameters, rel=0.15)


@pytest.mark.parametrize(("counts", "depths"), [("V0", (2, 6, 14, 2)), ("V1", (2, 2, 18, 2)), ("V2", (2, 8, 12, 2))])
def test_block_counts_are_those_of_table_7(counts, depths):
    variant = VARIANTS["coatnet-2"].vary(block_counts=counts)
    assert tuple(stage.depth for stage in variant.stages) == depths


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("coatnet-0", layout) for layout in ("C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T")),
        *(("coatnet-pico-64", layout) for layout in ("C-C-C", "C-C-T", "C-T-T")),
        ("coatnet-7", "C-C-C-C-T"),
    ],
)
def test_a_layout_names_the_kind_of_each_stage(name, layout):
    before, after = VARIANTS[name].stages, VARIANTS[name].vary(layout=layout).stages
    assert "-".join(stage.kind[0].upper() for stage in after).replace("M", "C") == layout
    assert [replace(stage, kind="mbconv") for stage in after] == [replace(stage, kind="mbconv") for stage in before]


def test_variants_survive_a_round_trip_through_plain_values():
    for variant in VARIANTS.values():
        assert Variant.from_dict(variant.to_dict()) == variant


def test_default_variants_leave_cells_for_attention_on_small_images():
    assert default_variant(8) == "coatnet-femto-16" and default_variant(28) == "coatnet-pico-64"
    assert VARIANTS[default_variant(28)].grids(28) == (14, 7, 7)
    assert VARIANTS["coatnet-0"].grids(97) == (25, 13, 7, 4)


@pytest.mark.parametrize(
    ("variations", "message"),
    [
        ({"layout": "T-T-C-C"}, "every C before any T"),
        ({"layout": "C-C-C-X"}, "C-C-T-T"),
        ({"layout": 3}, "C-C-T-T"),
        ({"layout": "C-C-T"}, "is about 3 stages; coatnet-0 has 4"),
        ({"block_counts": "V1"}, "moves 4 blocks"),
        ({"block_counts": "V9"}, "V0, V1, V2"),
        ({"head_dim": 40}, "head_dim=40 does not divide the width 384"),
        ({"mbconv_norm": "instance"}, "batch, layer"),
        ({"downsample": "pool"}, "expand, depthwise"),
        ({"attention": "axial"}, "pre, post, local, linear"),
        ({"attention": "linear"}, "relative_bias=False"),
        ({"attention": "post", "relative_bias": False}, "attention='pre'"),
        ({"attention": "local", "window": 4}, "odd"),
        ({"attention": "local", "window": True}, "window=True"),
        ({"window": 5}, "window=5 is about attention='local', not 'pre'"),
        ({"layout": "C-C-C-C", "attention": "post"}, "attention='post' is about transformer blocks"),
        ({"layout": "C-C-C-C", "relative_bias": False}, "relative_bias=False is about transformer blocks"),
        ({"layout": "C-C-C-C", "head_dim": 64}, "head_dim=64 is about transformer blocks"),
        ({"layout": "ViT_REL", "downsample": "depthwise"}, "downsample='depthwise' is about mbconv blocks"),
        ({"layout": "ViT_REL", "mbconv_norm": "layer"}, "mbconv_norm='layer' is about mbconv blocks"),
        ({"head_dims": 32}, "did you mean 'head_dim'"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"resolution": 0}, "resolution=0"),
        ({"in_channels": 2.5}, "in_channels=2.5"),
        ({"stochastic_depth": 1.0}, "stochastic_depth=1.0"),
        ({"stochastic_depth": "0.1"}, "stochastic_depth='0.1'"),
    ],
)
def test_invalid_arguments_are_refused_with_a_reason(variations, message):
    with pytest.raises(UserError) as caught:
        create_model("coatnet-0", **variations)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'coatnet-0'"):
        create_model("coatnet_0")
    with pytest.raises(UserError, match="4 stages; coatnet-7 has 5"):
        create_model("coatnet-7", layout="ViT_REL")


def test_out_of_bounds_variants_are_refused_before_anything_is_allocated():
    variant = VARIANTS["coatnet-0"].to_dict()
    for changes in ({"depth": 10**6}, {"width": 10**9}, {"kind": "_target_"}, {"stride": 3}):
        with pytest.raises(UserError):
            create_model({**variant, "stages": [{**variant["stages"][0], **changes}]})
    with pytest.raises(UserError, match="not a variant"):
        create_model({**variant, "_target_": "os.system"})
