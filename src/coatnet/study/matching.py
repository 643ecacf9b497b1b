"""Networks of equal cost: the widths and depths of each member of a study, found by counting.

Parameters and multiply-accumulates of each part of a network are polynomials of the widths of its input and its output.
A few counts on the meta device determine them exactly, and all combinations of widths and depths are then compared.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatnet.errors import UserError
from coatnet.model.complexity import Complexity, PartCosts, complexity, count_parts
from coatnet.model.config import BLOCK_KIND_OF_OPTION, Stage, Variant

TOLERANCE = 0.02  # between the smallest and the largest of a study, of parameters and of multiply-accumulates
WIDTH_STEP = 4  # channels; squeeze-and-excitation has a quarter of them
MAX_WIDTH_FACTOR = 1.7  # chosen: beyond, a stage is another one
CANDIDATES = 10  # widths of a stage that are tried
SAMPLES = 8  # networks that are counted: six terms are to be found, and some of the samples may be alike
MAX_DEPTH_CHANGE = 3  # blocks in all


@dataclass(frozen=True)
class Problem:
    """What the networks of a study are made for: square images of a side in pixels, their channels and classes."""

    resolution: int
    channels: int
    classes: int

    def count(self, variant: Variant) -> tuple[int, int]:
        """Parameters and multiply-accumulates of a variant."""
        cost = complexity(variant, self.resolution, **self._shapes)
        return cost.parameters, cost.macs

    def count_parts(self, variant: Variant) -> PartCosts:
        """The same of each part of a variant."""
        return count_parts(variant, self.resolution, **self._shapes)

    @property
    def _shapes(self) -> dict[str, int]:
        return {
            "table_resolution": self.resolution,
            "num_classes": self.classes,
            "in_channels": self.channels,
        }


@dataclass(frozen=True)
class Network:
    """A member's network with its counts."""

    variant: Variant
    parameters: int
    macs: int

    def distance(self, target: tuple[int, int]) -> float:
        """The larger relative difference of the two counts from a target."""
        return max(abs(self.parameters / target[0] - 1), abs(self.macs / target[1] - 1))


def build(name: str, row: Variant, variations: Mapping[str, Any], problem: Problem) -> Variant:
    """The variant of a member. Raises UserError if there is none, or it has nothing to compute on so few pixels."""
    side = problem.resolution
    try:
        letters = str(variations.get("layout")).split("-")
        head = variations.get("head_dim", row.head_dim)
        whole_heads = "widths" not in variations and "T" in letters and isinstance(head, int) and head > 0
        if whole_heads and len(letters) == len(row.stages):
            # A stage that becomes attention has whole heads; what that changes is matched afterwards.
            widths = [
                max(1, round(stage.width / head)) * head if letter == "T" else stage.width
                for stage, letter in zip(row.stages, letters, strict=True)
            ]
            row = row.vary(widths=widths)
        variant = row.vary(**variations)
    except UserError as error:
        raise UserError(f"member {name} is impossible: {error}") from None
    if variant.stem == "patch" and side % variant.stem_stride:
        near = variant.stem_stride * max(1, round(side / variant.stem_stride))
        raise UserError(
            f"member {name} is impossible: {side} pixels are not whole patches of {variant.stem_stride}; give a "
            f"resolution such as {near}"
        )
    for number, (stage, grid) in enumerate(zip(variant.stages, variant.grids(side), strict=True), start=1):
        if stage.kind == "transformer" and grid < 2:
            raise UserError(
                f"member {name} is impossible: at {side} pixels S{number} has one cell, over which there is nothing to "
                "attend; give a larger resolution or smaller strides"
            )
    return replace(variant, resolution=side)


def variations_of(variant: Variant, row: Variant) -> dict[str, Any]:
    """The variations by which a row of the registry becomes a variant, as a recipe has them."""
    kinds, start = [stage.kind for stage in variant.stages], row
    found: dict[str, Any] = {}
    if variant.stem == "patch":
        found["layout"], start = "ViT_REL", row.vary(layout="ViT_REL")
    elif kinds != [stage.kind for stage in row.stages]:
        found["layout"] = "-".join("C" if kind == "mbconv" else "T" for kind in kinds)
    for each in fields(Variant):
        value = getattr(variant, each.name)
        applies = BLOCK_KIND_OF_OPTION.get(each.name) in (None, *kinds)
        if each.name not in ("name", "stages", "resolution") and applies and value != getattr(start, each.name):
            found[each.name] = value
    for name, shorthand in (("depth", "depths"), ("width", "widths"), ("stride", "strides")):
        found[shorthand] = [getattr(stage, name) for stage in variant.stages]
    return found


def match(variants: Mapping[str, Variant], problem: Problem, *, fixed_depths: bool = False) -> dict[str, Network]:
    """The networks of a study, with widths, and depths unless these are fixed, so that all cost the same.

    What the first one costs is the target, unless another has too few widths to come near it: then what that one can
    reach is. A network that is within the tolerance as it is stays so. The caller compares the counts.

    Args:
        variants: by the name of the member.
        problem: what they are for.
        fixed_depths: the depths are what is studied.

    Raises:
        UserError: a network is so narrow that there are no other widths near its own.
    """
    networks = {name: Network(variant, *problem.count(variant)) for name, variant in variants.items()}
    target = _counts(next(iter(networks.values())))
    searches = {name: _Search(name, network, problem, fixed_depths) for name, network in networks.items()}
    for last in (False, True):
        found = {name: search.nearest(target) for name, search in searches.items()}
        worst = max(found.values(), key=lambda network: network.distance(target))
        if last or worst.distance(target) <= TOLERANCE / 2:
            break
        target = _counts(worst)
    return found


def _counts(network: Network) -> tuple[int, int]:
    return network.parameters, network.macs


class _Search:
    """All widths and depths near those of a network, with their counts."""

    def __init__(self, name: str, network: Network, problem: Problem, fixed_depths: bool) -> None:
        self.name, self.network, self.problem, self.fixed_depths = name, network, problem, fixed_depths
        self.variant = network.variant
        self.has_stem = self.variant.stem != "patch"  # else it is as wide as the first stage

    def nearest(self, target: tuple[int, int]) -> Network:
        """The most similar network within half the tolerance of the target, or else the nearest to the target."""
        if self.network.distance(target) <= TOLERANCE / 2:
            return self.network
        if not len(self._widths):
            raise UserError(
                f"member {self.name} cannot be given the cost of the others: widths near "
                f"{self._widths_of(self.variant)} leave no choice; give a larger width or a smaller head_dim"
            )
        change = np.square(np.log(self._widths / np.array(self._widths_of(self.variant)))).sum(axis=1)
        fixed, more = self._counts
        best: tuple[float, int, tuple[int, ...]] | None = None
        for depths in self._depths():
            counts = fixed + np.tensordot(np.array(depths) - 1.0, more, axes=1)
            distance = np.abs(counts / np.array(target) - 1).max(axis=1)
            close = distance <= TOLERANCE / 2
            row = int(np.where(close, change, np.inf).argmin() if close.any() else distance.argmin())
            if best is None or distance[row] < best[0]:
                best = float(distance[row]), row, depths
            if close.any():
                break
        assert best is not None
        variant = self._resized(self._widths[best[1]].tolist(), best[2])
        return Network(variant, *self.problem.count(variant))

    def _widths_of(self, variant: Variant) -> list[int]:
        """The free widths of a variant."""
        return [variant.stem_width] * self.has_stem + [stage.width for stage in variant.stages]

    def _steps(self) -> list[int]:
        """What each free width is a multiple of."""
        of_stages = [self.variant.head_dim if s.kind == "transformer" else WIDTH_STEP for s in self.variant.stages]
        return [WIDTH_STEP] * self.has_stem + of_stages

    @cached_property
    def _widths(self) -> NDArray[np.int64]:
        """All widths that are tried, (N, W); they grow from stage to stage, if those of the variant do."""
        choices = []
        for width, step in zip(self._widths_of(self.variant), self._steps(), strict=True):
            low, high = math.ceil(width / MAX_WIDTH_FACTOR / step), math.floor(width * MAX_WIDTH_FACTOR / step)
            numbers = np.unique(np.linspace(max(1, low), max(1, high), CANDIDATES).round().astype(int))
            choices.append(sorted({width, *(step * numbers).tolist()}))
        widths = _without_equal_neighbors(np.stack(np.meshgrid(*choices), axis=-1).reshape(-1, len(choices)))
        stages = slice(int(self.has_stem), None)
        if (np.diff(self._widths_of(self.variant)[stages]) > 0).all():
            widths = widths[(np.diff(widths[:, stages], axis=1) > 0).all(axis=1)]
        return widths

    def _depths(self) -> list[tuple[int, ...]]:
        """Depths of the stages, those of the variant first, then by their distance from them."""
        depths = [stage.depth for stage in self.variant.stages]
        if self.fixed_depths:
            return [tuple(depths)]
        reach = MAX_DEPTH_CHANGE if len(depths) > 1 else max(MAX_DEPTH_CHANGE, depths[0] - 1)
        changes = itertools.product(range(-reach, reach + 1), repeat=len(depths))
        near = sorted((c for c in changes if sum(map(abs, c)) <= reach), key=lambda c: (sum(map(abs, c)), c))
        moved = [tuple(np.add(depths, change).tolist()) for change in near]
        return [each for each in moved if min(each) >= 1]

    def _resized(self, widths: Sequence[int], depths: Sequence[int]) -> Variant:
        stem, of_stages = widths[0], widths[1:] if self.has_stem else widths
        stages = zip(self.variant.stages, of_stages, depths, strict=True)
        resized: tuple[Stage, ...] = tuple(replace(stage, width=w, depth=d) for stage, w, d in stages)
        return replace(self.variant, stem_width=stem, stages=resized)

    @cached_property
    def _counts(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Parameters and multiply-accumulates for all widths: of one block a stage, (N, 2), of each more, (S, N, 2).

        What a part costs is quadratic in the widths of its input and its output, and `SAMPLES` networks say how.
        """
        generator, steps = np.random.default_rng(0), np.array(self._steps())
        sampled = _without_equal_neighbors(steps * generator.integers(1, 9, (4 * SAMPLES, len(steps))))[:SAMPLES]
        twice = [2] * len(self.variant.stages)
        parts = [self.problem.count_parts(self._resized(row.tolist(), twice)) for row in sampled]

        def predict(costs: Sequence[Complexity], column: int) -> NDArray[Any]:
            """The counts (N, 2) of a part whose output has the width of a column."""
            terms = (_quadratic(widths[:, max(0, column - 1)], widths[:, column]) for widths in (sampled, self._widths))
            known = np.array([(cost.parameters, cost.macs) for cost in costs], float)
            samples, wanted = terms
            return wanted @ np.linalg.lstsq(samples, known, rcond=None)[0]

        first_stage = int(self.has_stem)
        fixed = predict([each.stem for each in parts], 0) + predict([each.head for each in parts], len(steps) - 1)
        more = []
        for number in range(len(self.variant.stages)):
            fixed += predict([each.first[number] for each in parts], first_stage + number)
            more.append(predict([each.other[number] for each in parts], first_stage + number))
        return fixed, np.stack(more)


def _quadratic(a: NDArray, b: NDArray) -> NDArray[np.float64]:
    """The terms of a polynomial of degree two in two variables, (N, 6)."""
    a, b = a.astype(float), b.astype(float)
    return np.stack([np.ones(len(a)), a, b, a * b, a**2, b**2], axis=1)


def _without_equal_neighbors(widths: NDArray) -> NDArray:
    """Those of the widths (N, W) where every stage projects its input: between equal widths there is no projection, and
    the counts are not those of the polynomial."""
    return widths[(widths[:, :-1] != widths[:, 1:]).all(axis=1)]
