"""What the runs of a study show: figures over seeds, paired differences, and the networks' order beside the paper's.

A difference is called resolved only if its interval and its p value after Holm's correction both exclude chance.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from coatnet.errors import counted
from coatnet.study.record import Figures, Run, Study
from coatnet.study.statistics import Estimate, RankCorrelation, estimate, holm, kendall, paired_estimate

LEVEL = 0.05  # of a p value; intervals are those of 95 %


@dataclass(frozen=True)
class Measure:
    """A figure in which networks are compared: how it is computed, shown and called."""

    title: str
    value: Callable[[Figures], float]
    digits: int
    unit: str
    """Of a difference, such as `` points``."""
    higher_is_better: bool
    words: tuple[str, str]
    """For a difference in favor of a network, and against it."""
    claim: str
    """`is {}` or the like, for one of the words."""
    rank: str
    """The field of `Paper` with the order to expect."""
    bounds: tuple[float, float] = (0.0, math.inf)

    def show(self, found: Estimate) -> str:
        """`86.10 (85.80 to 86.40)`, without an interval if there is none."""
        shown = f"{found.mean:.{self.digits}f}"
        if found.interval is None:
            return shown
        low, high = (min(max(bound, self.bounds[0]), self.bounds[1]) for bound in found.interval)
        return f"{shown} ({low:.{self.digits}f} to {high:.{self.digits}f})"

    def word(self, difference: float) -> str:
        """What a network is whose value differs by this from that of another."""
        return self.words[(difference > 0) != self.higher_is_better]


ACCURACY = Measure("Held-out accuracy", lambda figures: 100 * figures.top1, 2, " points", True,
                   ("better", "worse"), "is {}", "generalization_rank", (0.0, 100.0))  # fmt: skip
GAP = Measure("Generalization gap", lambda figures: 100 * (figures.train_top1 - figures.top1), 2, " points", False,
              ("smaller", "larger"), "has a {} gap", "generalization_rank", (-100.0, 100.0))  # fmt: skip
TRAINING_LOSS = Measure("Training loss", lambda figures: figures.train_loss, 4, "", False,
                        ("lower", "higher"), "has a {} training loss", "capacity_rank")  # fmt: skip
COMPARED = (ACCURACY, GAP, TRAINING_LOSS)


@dataclass(frozen=True)
class Difference:
    """A network less another one at a number of images, paired by seed.

    Attributes:
        member, reference: their names.
        size: number of training images.
        measure: what is compared.
        found: the mean difference; None if no seed was finished by both.
        p: after Holm's correction.
        comparisons: how many that correction is for.
        paper: what the paper says: 1 in favor of the network, -1 against it, 0 neither, None nothing.
    """

    member: str
    reference: str
    size: int
    measure: Measure
    found: Estimate | None
    p: float
    comparisons: int
    paper: int | None

    @property
    def is_resolved(self) -> bool:
        return self.found is not None and self.found.interval is not None and self.p < LEVEL

    @property
    def result(self) -> str:
        """Such as `better`, or why nothing can be said."""
        if self.found is None:
            return "no common seed"
        if self.found.interval is None:
            return "one seed" if self.found.n == 1 else "no spread"
        return self.measure.word(self.found.mean) if self.is_resolved else "not resolved"

    @property
    def expected(self) -> str:
        """What the paper says, in the words of `result`."""
        if self.paper is None:
            return ""
        return self.measure.words[self.paper < 0] if self.paper else "equal"

    @property
    def shown(self) -> str:
        """The mean difference, such as `+1.20 points`."""
        return "" if self.found is None else f"{_signed(self.found.mean, self.measure.digits)}{self.measure.unit}"

    def row(self) -> tuple[str, ...]:
        """Cells of a table of differences."""
        found, digits = self.found, self.measure.digits
        shown = "" if found is None else _signed(found.mean, digits)
        interval = " to ".join(_signed(bound, digits) for bound in (found.interval if found else None) or ())
        p = _shown_p(self.p) if interval else ""
        pairs = str(found.n if found else 0)
        return (f"{self.size:,}", self.member, self.reference, shown, interval, pairs, p, self.result, self.expected)

    def sentence(self) -> str:
        """What the interval and Holm's correction allow to say."""
        found, measure = self.found, self.measure
        names, where = f"{self.member} and {self.reference}", f"at {self.size:,} images"
        if found is None:
            return f"{names} share no finished seed {where}."
        if found.interval is None:
            return f"{measure.title} of {self.member} less that of {self.reference} {where}: {self.shown}, no interval."
        pairs = counted(found.n, "paired seed")
        if self.is_resolved:
            low, high = sorted(math.copysign(1, found.mean) * bound for bound in found.interval)
            by = f"{abs(found.mean):.{measure.digits}f}{measure.unit}"
            paper = f" (in the paper's order: {self.expected})" if self.expected else ""
            if self.expected == self.result:
                paper = ", as in the paper's order"
            return (
                f"{self.member} {measure.claim.format(self.result)} than {self.reference} {where} by {by} "
                f"({low:.{measure.digits}f} to {high:.{measure.digits}f}, {pairs}){paper}."
            )
        interval = " to ".join(_signed(bound, measure.digits) for bound in found.interval)
        alone = "" if found.p >= LEVEL else (
            f"; the interval excludes 0, but p is {_shown_p(self.p)} after Holm's correction for {self.comparisons} "
            "comparisons"
        )  # fmt: skip
        return (
            f"No difference in {measure.title.lower()} could be resolved between {names} {where}: {self.shown} "
            f"({interval}, {pairs}{alone})."
        )


@dataclass(frozen=True)
class PaperOrder:
    """The order of networks in a measure against the paper's.

    Attributes:
        measure: by which they are in order.
        size: number of training images.
        names: the networks, best first, by means over the seeds that all of them finished.
        found: the correlation of the orders.
        by_seed: tau of each of those seeds.
    """

    measure: Measure
    size: int
    names: tuple[str, ...]
    found: RankCorrelation
    by_seed: tuple[float, ...]

    def row(self) -> tuple[str, ...]:
        """Cells of the table of orders."""
        seeds = ", ".join(f"{tau:.2f}" for tau in self.by_seed)
        tau, p = f"{self.found.tau:.2f}", _shown_p(self.found.p)
        return (self.measure.title, f"{self.size:,}", tau, p, seeds, ", ".join(self.names))


class Results:
    """The finished runs of a study, each member at its best learning rate, and what follows from them."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.members = [member.name for member in study.members]
        self.by_rate: dict[tuple[str, int], dict[float, dict[int, Run]]] = {}
        for run in study.finished():
            rates = self.by_rate.setdefault((run.member, run.size), {})
            rates.setdefault(run.learning_rate, {})[run.seed] = run
        self.rates = {key: max(found, key=lambda rate: _merit(found[rate])) for key, found in self.by_rate.items()}
        self.sizes = sorted({size for _, size in self.by_rate})
        self.reference = self.members[0]

    def runs(self, member: str, size: int) -> dict[int, Run]:
        """The runs by seed, at the best learning rate."""
        key = (member, size)
        return self.by_rate[key][self.rates[key]] if key in self.rates else {}

    def values(self, measure: Measure, member: str, size: int) -> dict[int, float]:
        """A figure by seed."""
        return figures_by_seed(measure, self.runs(member, size))

    def means(self, measure: Measure) -> dict[str, dict[int, Estimate]]:
        """A figure over seeds, by member and number of images."""
        return {
            member: {
                size: estimate(values.values()) for size in self.sizes if (values := self.values(measure, member, size))
            }
            for member in self.members
        }

    def present(self, size: int) -> list[str]:
        """The members with a finished run."""
        return [member for member in self.members if self.runs(member, size)]

    def common_seeds(self, members: Iterable[str], size: int) -> list[int]:
        """The seeds that all of some members finished."""
        seeds = [self.runs(member, size).keys() for member in members]
        return sorted(set.intersection(*map(set, seeds))) if seeds else []

    def in_order(self, measure: Measure, members: Sequence[str], size: int) -> list[str]:
        """Members by their means, best first, over the seeds that all finished, or over all if there is none."""
        seeds = self.common_seeds(members, size)

        def mean(member: str) -> float:
            values = self.values(measure, member, size)
            return estimate(values[seed] for seed in seeds or values).mean

        return sorted(members, key=mean, reverse=measure.higher_is_better)

    def differences(self, measure: Measure, size: int, base: str, *, all_pairs: bool = False) -> list[Difference]:
        """Each member less `base`, corrected for as many comparisons as members, or as pairs of them."""
        present = self.present(size)
        pairs = [(member, base) for member in present if member != base]
        tested = list(pairs)
        if all_pairs:
            tested += [pair for pair in itertools.combinations(present, 2) if base not in pair]
        found = {
            (first, second): paired_estimate(self.values(measure, first, size), self.values(measure, second, size))
            for first, second in tested
        }
        adjusted = holm({pair: each.p for pair, each in found.items() if each is not None and each.n > 1})
        return [
            Difference(
                *pair,
                size,
                measure,
                found[pair],
                adjusted.get(pair, 1.0),
                len(adjusted),
                self._paper(measure, pair, size),
            )
            for pair in pairs
        ]

    def _paper(self, measure: Measure, pair: tuple[str, str], size: int) -> int | None:
        """What the paper says of two members; of capacity, at the largest number of images only."""
        if measure is TRAINING_LOSS and size != max(self.study.sizes):
            return None
        member, reference = (self._rank(measure, name) for name in pair)
        return None if member is None or reference is None else (member < reference) - (member > reference)

    def _rank(self, measure: Measure, name: str) -> int | None:
        member = next(each for each in self.study.members if each.name == name)
        return getattr(member.paper, measure.rank)

    @cached_property
    def orders(self) -> list[PaperOrder]:
        """The orders that can be compared with the paper's: of three networks or more, with a seed that all have."""
        compared = [(measure, size) for measure in (GAP, ACCURACY) for size in self.sizes]
        compared += [(TRAINING_LOSS, max(self.study.sizes))] if self.sizes else []
        return [order for measure, size in compared if (order := self._order(measure, size)) is not None]

    def _order(self, measure: Measure, size: int) -> PaperOrder | None:
        members = [name for name in self.present(size) if self._rank(measure, name) is not None]
        seeds = self.common_seeds(members, size)
        if len(members) < 3 or not seeds:
            return None
        ranks = [self._rank(measure, name) or 0 for name in members]
        sign = -1 if measure.higher_is_better else 1
        values = [self.values(measure, name, size) for name in members]
        found = kendall([sign * estimate(each[seed] for seed in seeds).mean for each in values], ranks)
        if found is None:
            return None
        each_seed = (kendall([sign * each[seed] for each in values], ranks) for seed in seeds)
        by_seed = tuple(each.tau if each is not None else 0.0 for each in each_seed)
        return PaperOrder(measure, size, tuple(self.in_order(measure, members, size)), found, by_seed)


def figures_by_seed(measure: Measure, runs: Mapping[int, Run]) -> dict[int, float]:
    """A figure of some runs, by seed."""
    return {seed: measure.value(run.figures) for seed, run in runs.items() if run.figures is not None}


def _merit(runs: Mapping[int, Run]) -> tuple[int, float]:
    """What a learning rate is chosen by."""
    return len(runs), estimate(figures_by_seed(ACCURACY, runs).values()).mean


def _signed(value: float, digits: int) -> str:
    """`+1.20`; a value that rounds to 0 has no sign."""
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def _shown_p(p: float) -> str:
    """`0.012`, `0.43`, `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
