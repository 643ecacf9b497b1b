"""The statistics of studies against closed forms, textbook tables and counts by hand."""

import itertools
import math

import numpy as np
import pytest

from coatnet.study.statistics import (
    Estimate,
    estimate,
    holm,
    kendall,
    paired_estimate,
    student_probability,
    student_quantile,
)


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.3027),
        (0.95, 4, 2.7764),
        (0.99, 4, 4.6041),
        (0.95, 9, 2.2622),
        (0.80, 10, 1.3722),
        (0.95, 30, 2.0423),
        (0.95, 120, 1.9799),
    ],
)
def test_quantiles_are_those_of_the_table(probability: float, degrees: int, quantile: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(quantile, abs=6e-5)
    assert student_probability(student_quantile(probability, degrees), degrees) == pytest.approx(probability, abs=1e-12)


def test_probabilities_are_the_closed_forms_of_one_and_two_degrees_and_the_integral_of_the_density() -> None:
    for t in (0.0, 0.3, 1.0, 4.0, 50.0):
        assert student_probability(t, 1) == pytest.approx(2 * math.atan(t) / math.pi, abs=1e-14)
        assert student_probability(t, 2) == pytest.approx(t / math.sqrt(2 + t * t), abs=1e-14)
    for degrees in (3, 4, 7, 12):
        x = np.linspace(0, 1.7, 20_001)
        density = (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        density *= math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
        assert student_probability(1.7, degrees) == pytest.approx(2 * np.trapezoid(density, x), abs=1e-8)


def test_mean_and_interval_by_hand() -> None:
    found = estimate([0.1, 0.3])
    assert (found.mean, found.n) == (pytest.approx(0.2), 2)
    assert found.spread == pytest.approx(math.sqrt(0.02))
    assert found.interval == pytest.approx((0.2 - 12.7062 * 0.1, 0.2 + 12.7062 * 0.1), abs=1e-5)
    assert found.p == pytest.approx(1 - 2 * math.atan(2) / math.pi)  # t = 2 with one degree of freedom


def test_one_seed_and_equal_seeds_have_no_interval_and_prove_nothing() -> None:
    for values in ([0.1 + 0.2], [0.3, 0.1 + 0.2, 0.3]):
        found = estimate(values)
        assert (found.interval, found.detectable, found.p) == (None, None, 1.0)
    # 0.7 - 0.6 and 0.4 - 0.3 differ in their last bits only.
    found = paired_estimate({0: 0.7, 1: 0.4, 2: 1e3 + 0.1}, {0: 0.6, 1: 0.3, 2: 1e3})
    assert found is not None and found.mean == pytest.approx(0.1) and found.interval is None


def test_only_common_seeds_are_paired() -> None:
    found = paired_estimate({0: 0.5, 1: 0.6, 2: 0.7}, {2: 0.4, 1: 0.5, 3: 0.9})
    assert found is not None and found.n == 2
    assert found.mean == pytest.approx(0.2) and found.interval == pytest.approx((-1.07062, 1.47062), abs=1e-5)
    assert paired_estimate({0: 0.5}, {1: 0.5}) is None


def test_intervals_cover_the_truth_in_95_of_100_studies() -> None:
    drawn = np.random.default_rng(0).normal(3.0, 2.0, (4_000, 5))
    found = [estimate(row).interval for row in drawn.tolist()]
    assert np.mean([low <= 3.0 <= high for low, high in filter(None, found)]) == pytest.approx(0.95, abs=0.01)


def test_the_detectable_difference_is_found_in_80_of_100_studies() -> None:
    # The noncentral t distribution gives 1.682 standard deviations for five pairs, and 0.996 for ten.
    assert Estimate(0.0, 1.0, 5).detectable == pytest.approx(1.682, rel=0.02)
    assert Estimate(0.0, 1.0, 10).detectable == pytest.approx(0.996, rel=0.005)
    effect = Estimate(0.0, 2.0, 5).detectable
    drawn = np.random.default_rng(0).normal(effect, 2.0, (4_000, 5))
    found = [estimate(row).interval for row in drawn.tolist()]
    assert np.mean([low > 0 for low, _ in filter(None, found)]) == pytest.approx(0.8, abs=0.02)


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.5}) == {"b": 1.0, "a": 1.0}
    assert holm({}) == {}


def test_kendall_by_hand() -> None:
    found = kendall([1.5, 2.5, 3.5, 4.5], [1, 3, 2, 4])  # five pairs in order, one reversed
    # 1, 3, 5, 6, 5, 3, 1 of the 24 orders have 0 to 6 reversed pairs: 8 of them at most one, or at least five.
    assert found is not None and (found.tau, found.p, found.n) == (pytest.approx(4 / 6), pytest.approx(8 / 24), 4)
    found = kendall([1, 2, 3], [1, 1, 2])  # two pairs in order, one tied in the ranks
    assert found is not None and found.tau == pytest.approx(2 / math.sqrt(3 * 2))
    found = kendall([3, 2, 1], [1, 2, 3])
    assert found is not None and (found.tau, found.p) == (-1.0, pytest.approx(2 / 6))


def test_kendall_counts_every_order_of_five_with_ties() -> None:
    values, ranks = [0.1, 0.3, 0.2, 0.3, 0.9], [1, 1, 2, 3, 4]

    def score(order: tuple[int, ...]) -> int:
        pairs = itertools.combinations(range(5), 2)
        return sum(int(np.sign(values[i] - values[j]) * np.sign(ranks[order[i]] - ranks[order[j]])) for i, j in pairs)

    scores = [score(order) for order in itertools.permutations(range(5))]
    found = kendall(values, ranks)
    assert found is not None
    assert found.tau == pytest.approx(scores[0] / math.sqrt(9 * 9))
    assert found.p == pytest.approx(sum(abs(each) >= abs(scores[0]) for each in scores) / 120)


def test_equal_values_have_no_order() -> None:
    assert kendall([1, 1, 1], [1, 2, 3]) is None
    assert kendall([1, 2, 3], [2, 2, 2]) is None
