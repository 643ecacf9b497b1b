"""Networks of equal cost: counts within 2 %, confirmed by the parameters of the built networks; impossible members."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from coatnet.errors import UserError
from coatnet.model.config import Variant
from coatnet.model.network import create_model
from coatnet.model.registry import find_variant
from coatnet.study.matching import TOLERANCE, Problem, build, match, variations_of
from coatnet.study.questions import QUESTIONS, base_row, find_question

DIGITS = Problem(8, 1, 10)


def spread(counts: Sequence[int]) -> float:
    return max(counts) / min(counts) - 1


MARKS = {"bias": (), "norms": (), "heads": (), "layouts": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, pytest.mark.nightly)) for name in QUESTIONS])
def test_the_networks_of_a_question_cost_the_same(name: str) -> None:
    row = base_row(DIGITS.resolution, None, 1.0)
    question = find_question(name, row)
    base = row.vary(**question.base)
    variants = {choice.name: build(choice.name, base, choice.variations, DIGITS) for choice in question.choices}

    networks = match(variants, DIGITS, fixed_depths=question.fixed_depths)

    assert spread([each.parameters for each in networks.values()]) <= TOLERANCE
    assert spread([each.macs for each in networks.values()]) <= TOLERANCE
    registered = find_variant(row.name)
    assert isinstance(registered, Variant)
    for network in networks.values():
        variations = variations_of(network.variant, registered)  # what the recipe of a run says
        model = create_model(row.name, num_classes=10, in_channels=1, resolution=8, **variations)
        assert sum(parameter.numel() for parameter in model.parameters()) == network.parameters
        assert model.variant.stages == network.variant.stages


def test_the_layout_of_a_network_of_three_stages_is_part_of_its_recipe() -> None:
    row = find_variant("coatnet-pico-64")
    assert isinstance(row, Variant)
    found = variations_of(row.vary(layout="C-C-C", widths=[8, 16, 24]), row)
    assert found == {"layout": "C-C-C", "depths": [1, 3, 2], "widths": [8, 16, 24], "strides": [2, 2, 1]}
    assert "layout" not in variations_of(row.vary(widths=[16, 32, 64]), row)


def test_members_differ_in_what_is_asked_and_not_in_depth_where_that_is_it() -> None:
    row = base_row(28, None, 1.0)
    depths = [
        [stage.depth for stage in row.vary(**choice.variations).stages]
        for choice in find_question("blocks", row).choices
    ]
    assert depths == [[1, 3, 3, 1], [1, 1, 5, 1], [1, 4, 2, 1]]
    assert [choice.name for choice in find_question("heads", row).choices] == ["16", "32", "8"]


def test_the_networks_of_the_layout_figure_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "coatnet.md").read_text()
    rows = re.findall(
        r"^\| `([CTViREL_-]+)` \| (\d+|patches) \| ([\d, ]+) \| ([\d, ]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.M
    )
    problem, row = Problem(28, 1, 10), base_row(28, None, 1.0)
    layouts = [str(choice.variations.get("layout", choice.name)) for choice in find_question("layouts", row).choices]
    assert sorted(layout for layout, *_ in rows) == sorted(layouts)
    counts = []
    for layout, stem, *lists in rows:
        depths, widths = ([int(each) for each in text.split(",")] for text in lists[:2])
        parameters, macs = (int(text.replace(",", "")) for text in lists[2:])
        start = build(layout, row, {"layout": layout}, problem)
        stem_width = widths[0] if stem == "patches" else int(stem)
        assert problem.count(start.vary(depths=depths, widths=widths, stem_width=stem_width)) == (parameters, macs)
        counts.append((parameters, macs))
    for each in zip(*counts, strict=True):
        assert spread(each) <= TOLERANCE
    assert row.grids(28) == (14, 7, 7, 4)


@pytest.mark.parametrize(
    ("variations", "side", "message"),
    [
        ({"head_dim": 7}, 8, "head_dim=7 does not divide the width"),
        ({"layout": "C-T-C-T"}, 8, "layout='C-T-C-T' is unknown"),
        ({"layout": "ViT_REL"}, 7, "7 pixels are not whole patches of 2"),
        ({}, 2, "at 2 pixels S3 has one cell"),
        ({"layout": "C-T-T-T", "head_dim": 0}, 8, "head_dim"),
        ({"layout": "C-T-T-T", "head_dim": "wide"}, 8, "head_dim"),
        ({"depths": [1, 2]}, 8, "depths=[1, 2]: 4 whole numbers"),
        ({"widths": [8, 16, 16, "x"]}, 8, "widths=[8, 16, 16, 'x']: 4 whole numbers"),
    ],
)
def test_an_impossible_member_is_one_line(variations: dict, side: int, message: str) -> None:
    with pytest.raises(UserError, match=f"member this is impossible: .*{re.escape(message)}"):
        build("this", base_row(8, None, 1.0), variations, Problem(side, 1, 10))
