"""Statistics of few seeds: means, paired differences, Holm's correction, Kendall's tau, and what could be resolved.

Student's t distribution with a whole number of degrees of freedom has a closed form (Abramowitz and Stegun, 1964,
"Handbook of mathematical functions", 26.7.3 and 26.7.4), so that no library is needed for it.
"""

import functools
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)

MAX_RANKED = 8  # networks whose orders, 40,320, are counted in a moment


def student_probability(t: float, degrees: int) -> float:
    """The probability that Student's t lies within -t and t, for t >= 0."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for number in range(1, (degrees - odd) // 2 + 1):
        total += term
        term *= cosine**2 * ((2 * number) / (2 * number + 1) if odd else (2 * number - 1) / (2 * number))
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total


@functools.cache
def student_quantile(probability: float, degrees: int) -> float:
    """The t within which Student's t lies with this probability: 2.776 for 95 % and 4 degrees of freedom."""
    low, high = 0.0, 1.0
    while student_probability(high, degrees) < probability:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if student_probability(middle, degrees) < probability else (low, middle)
    return high


@dataclass(frozen=True)
class Estimate:
    """The mean of a value over seeds.

    Attributes:
        mean: of the values.
        spread: their standard deviation; 0 for a single one.
        n: number of seeds.
    """

    mean: float
    spread: float
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean (Student's t); None for one seed, or seeds that are all the same."""
        if not self.spread:
            return None
        half = student_quantile(0.95, self.n - 1) * self.spread / math.sqrt(self.n)
        return (self.mean - half, self.mean + half)

    @property
    def p(self) -> float:
        """How often chance alone makes the mean at least as far from 0 (two-sided t test); 1 without an interval."""
        if not self.spread:
            return 1.0
        return 1 - student_probability(abs(self.mean) * math.sqrt(self.n) / self.spread, self.n - 1)

    @property
    def detectable(self) -> float | None:
        """The true mean whose 95 % interval excludes 0 in 80 % of studies like this one; None without an interval.

        (t_0.975 + t_0.80) standard errors, as in H. S. Bloom, 1995, "Minimum detectable effects"; for five seeds it is
        1 % below what the noncentral t distribution gives.
        """
        if not self.spread:
            return None
        quantiles = student_quantile(0.95, self.n - 1) + student_quantile(0.6, self.n - 1)
        return quantiles * self.spread / math.sqrt(self.n)


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of one value or more."""
    values = list(values)
    n, mean = len(values), math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else 0.0
    # Equal values whose mean is rounded would have a spread of some 1e-17, and an interval without width.
    return Estimate(mean, spread if spread > 1e-12 * max(map(abs, values)) else 0.0, n)


def paired_estimate(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """The mean difference of the seeds that both have; None without such a seed."""
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    found = estimate(values[seed] - reference[seed] for seed in seeds)
    # Differences of equal size carry the rounding of the values, which are larger than they are.
    rounding = 1e-12 * max(abs(values[seed]) + abs(reference[seed]) for seed in seeds)
    return found if found.spread > rounding else Estimate(found.mean, 0.0, found.n)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Adjusted p values of several comparisons (S. Holm, 1979).

    Where nothing differs, one of them or more is below 0.05 in at most 5 % of studies.
    """
    adjusted, highest = {}, 0.0
    for number, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        highest = max(highest, min(1.0, (len(p_values) - number) * p_values[key]))
        adjusted[key] = highest
    return adjusted


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's tau-b of two orders.

    Attributes:
        tau: 1 for the same order, -1 for the reverse, ties as far as they allow.
        p: the fraction of all orders whose tau is at least as far from 0.
        n: number of things in order.
    """

    tau: float
    p: float
    n: int


def kendall(values: Sequence[float], ranks: Sequence[float]) -> RankCorrelation | None:
    """Kendall's tau-b with its exact p value; None if all values, or all ranks, are equal, or for more than
    8 values.

    All orders are counted: 120 of the five networks that a question of the paper has at most.
    """
    n = len(values)
    if n > MAX_RANKED:
        return None
    first, second = np.triu_indices(n, 1)
    of_values, of_ranks = (
        np.sign(np.subtract.outer(each, each)).astype(int) for each in map(np.array, (values, ranks))
    )
    untied = int(np.abs(of_values[first, second]).sum()) * int(np.abs(of_ranks[first, second]).sum())
    if not untied:
        return None
    orders = np.array(list(itertools.permutations(range(n))))
    scores = (of_values[first, second] * of_ranks[orders[:, first], orders[:, second]]).sum(axis=1)
    return RankCorrelation(float(scores[0]) / math.sqrt(untied), float((abs(scores) >= abs(scores[0])).mean()), n)
