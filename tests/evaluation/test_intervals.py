"""Intervals equal their formulas and cover the truth in about 95 % of cases."""

import numpy as np
import pytest

from coatnet.evaluation.metrics import bootstrap_interval, mean_interval, wilson_interval


def test_wilson_solves_its_equation() -> None:
    # The bounds are the shares p at which the observed one is 1.96 standard deviations away.
    for successes, total in ((94, 100), (1, 10), (5, 7)):
        for bound in wilson_interval(successes, total):
            distance = abs(successes / total - bound) / np.sqrt(bound * (1 - bound) / total)
            assert distance == pytest.approx(1.95996, abs=1e-4)


def test_wilson_interval_at_zero_and_one() -> None:
    assert wilson_interval(0, 20)[0] == 0.0 and 0 < wilson_interval(0, 20)[1] < 0.2
    assert wilson_interval(20, 20)[1] == 1.0 and 0.8 < wilson_interval(20, 20)[0] < 1
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_intervals_cover_the_truth_in_about_95_percent() -> None:
    generator = np.random.default_rng(0)
    hits = dict.fromkeys(("wilson", "mean", "bootstrap"), 0)
    for _ in range(400):
        right = generator.random(150) < 0.9
        times = generator.exponential(0.2, size=150)
        intervals = {
            "wilson": (0.9, wilson_interval(int(right.sum()), 150)),
            "mean": (0.2, mean_interval(times)),
            "bootstrap": (0.2, bootstrap_interval(lambda weights, x=times: float(weights @ x / 150), 150)),
        }
        for name, (truth, (low, high)) in intervals.items():
            hits[name] += low <= truth <= high
    assert all(0.91 <= number / 400 <= 0.98 for number in hits.values()), hits


def test_one_image_has_no_interval() -> None:
    assert mean_interval(np.array([1.0])) is None
    assert bootstrap_interval(lambda weights: 0.5, 1) is None
