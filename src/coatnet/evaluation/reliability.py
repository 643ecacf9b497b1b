"""How far a calibrated model's answers can be relied on: probabilities, refusals and sets of classes, measured.

An image that the calibration was fitted to is measured with temperatures and thresholds fitted without its fold, so
no figure here is one of the fit. Shapes: B batch, V views of each image, N images, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.bundle.calibration import is_refused, set_scores, threshold_index
from coatnet.evaluation.metrics import (
    CalibrationBin,
    Interval,
    Metrics,
    calibration_bins,
    calibration_error,
    wilson_interval,
)
from coatnet.inference.graph import to_probabilities
from coatnet.inference.logits import average_views

ANSWERED = (1.0, 0.95, 0.9, 0.8)
REFUSED = (0.01, 0.05, 0.1, 0.2)
COVERAGE = 0.9
CURVE_POINTS = 100
PROBABILITY_FIGURES = ("nll", "brier", "calibration_error")  # what temperatures change


@dataclass(frozen=True)
class SelectiveAccuracy:
    """Accuracy on the share `answered` of the images that are least novel, with its interval."""

    answered: float
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Refusals:
    """The share of images that `--reject asked` refuses, with its interval."""

    asked: float
    refused: float
    interval: Interval


@dataclass(frozen=True)
class ClassSets:
    """Sets of classes that are to hold the truth in the share `asked` of images.

    Attributes:
        method: lac, aps or raps.
        asked: the coverage that the thresholds are for.
        coverage: the share of sets that hold the truth.
        interval: of the coverage.
        mean_size: mean number of classes in a set.
        class_coverage: coverage among the images of each class, K; None for a class without images.
    """

    method: str
    asked: float
    coverage: float
    interval: Interval
    mean_size: float
    class_coverage: tuple[float | None, ...]


@dataclass(frozen=True)
class Reliability:
    """What a report says about a calibrated model beside its figures.

    Attributes:
        temperature: by which logits are divided; the median over classes for several labels.
        num_shared: number of the images that the calibration was fitted to, measured by thresholds without them.
        network: `PROBABILITY_FIGURES` of the network's own probabilities.
        error_before: expected calibration error of the network's own probabilities.
        error_after: of the calibrated ones.
        bins_before: the reliability diagram of the network's own probabilities.
        selective: accuracy where the most novel images are refused. With several labels, an image is right if all of
            its labels are.
        risk_coverage: (share answered, share of these that is wrong), from few to all.
        refusals: the share refused at some rates.
        sets: by method; none for several labels.
    """

    temperature: float
    num_shared: int
    network: Mapping[str, float]
    error_before: float
    error_after: float
    bins_before: tuple[CalibrationBin, ...]
    selective: tuple[SelectiveAccuracy, ...]
    risk_coverage: tuple[tuple[float, float], ...]
    refusals: tuple[Refusals, ...]
    sets: tuple[ClassSets, ...]


class ReliabilityCounts:
    """Some numbers for each image, collected batch by batch. The bundle must be calibrated."""

    def __init__(self, bundle: Bundle) -> None:
        assert bundle.calibration is not None
        self._bundle, self._calibration = bundle, bundle.calibration
        self._network = Metrics(len(bundle.classes), bundle.multilabel)
        self._batches: list[tuple[np.ndarray, ...]] = []

    def update(self, answered: Tensor, means: Tensor, labels: Tensor, digests: Tensor) -> Tensor:
        """Add a batch: logits of the bundle (B * V, K), means of all feature maps (B * V, D), labels, digests (B,).

        Returns:
            The logits (B, K) at temperatures that were not fitted to these images; of several views, those of the mean
            of their probabilities.
        """
        fitted, several = self._calibration, self._bundle.multilabel
        folds = fitted.folds(digests)
        of_views = folds.repeat_interleave(len(answered) // len(folds))  # (B * V,)
        own = average_views(answered * fitted.temperature[0], len(folds), multilabel=several)
        self._network.update(own, labels)
        views = fitted.without_own(answered, of_views)
        scores = fitted.novelty.score(to_probabilities(views, multilabel=several), means)
        novelty = fitted.novelty.rank(scores, of_views)
        scores, novelty = (each.unflatten(0, (len(folds), -1)).mean(1) for each in (scores, novelty))  # (B,)
        logits = average_views(views, len(folds), multilabel=several)
        probabilities = to_probabilities(logits, multilabel=several)
        confidence, correct = _decisions(probabilities, labels, several)
        # Means over views at two temperatures may differ in their likeliest class.
        before, before_correct = _decisions(to_probabilities(own, multilabel=several), labels, several)
        held, sizes = [], []
        for method in fitted.thresholds:
            each = set_scores(probabilities, method)
            limits = fitted.thresholds[method][folds, threshold_index(COVERAGE)]
            inside = each <= limits[:, None]
            held.append(inside.gather(1, labels[:, None])[:, 0])
            sizes.append(inside.sum(1))
        right = ((probabilities >= 0.5) == labels.bool()).all(1) if several else correct[:, 0]
        columns = (confidence, correct, before, before_correct, right, scores, novelty, folds, labels)
        sets = (torch.stack(held, 1), torch.stack(sizes, 1)) if held else (folds[:, None], folds[:, None])
        self._batches.append(tuple(column.numpy() for column in (*columns, *sets)))
        return logits

    def compute(self) -> Reliability:
        """The figures of all images so far."""
        columns = (np.concatenate(column) for column in zip(*self._batches, strict=True))
        confidence, correct, before, before_correct, right, scores, novelty, folds, labels, held, sizes = columns
        size, order = len(right), np.argsort(scores, kind="stable")
        wrong = np.cumsum(~right[order])
        counts = np.unique(np.linspace(size / CURVE_POINTS, size, CURVE_POINTS).round().clip(1).astype(int))
        answered = [(share, max(1, round(share * size))) for share in ANSWERED]
        refused = [(rate, int(is_refused(novelty, rate).sum())) for rate in REFUSED]
        return Reliability(
            temperature=float(self._calibration.temperature[0].median()),
            num_shared=int((folds > 0).sum()),
            network={name: value for name, value in self._network.compute().items() if name in PROBABILITY_FIGURES},
            error_before=calibration_error(before.ravel(), before_correct.ravel()),
            error_after=calibration_error(confidence.ravel(), correct.ravel()),
            bins_before=calibration_bins(before.ravel(), before_correct.ravel()),
            selective=tuple(
                SelectiveAccuracy(share, float(1 - wrong[n - 1] / n), wilson_interval(n - int(wrong[n - 1]), n))
                for share, n in answered
            ),
            risk_coverage=tuple((float(n / size), float(wrong[n - 1] / n)) for n in counts),
            refusals=tuple(Refusals(rate, n / size, wilson_interval(n, size)) for rate, n in refused),
            sets=tuple(
                self._sets(method, held[:, column], sizes[:, column], labels)
                for column, method in enumerate(self._calibration.thresholds)
            ),
        )

    def _sets(self, method: str, held: np.ndarray, sizes: np.ndarray, labels: np.ndarray) -> ClassSets:
        support = np.bincount(labels, minlength=len(self._bundle.classes))
        covered = np.bincount(labels, held, len(self._bundle.classes))
        return ClassSets(
            method=method,
            asked=COVERAGE,
            coverage=float(held.mean()),
            interval=wilson_interval(int(held.sum()), len(held)),
            mean_size=float(sizes.mean()),
            class_coverage=tuple(float(c / n) if n else None for c, n in zip(covered, support, strict=True)),
        )


def _decisions(probabilities: Tensor, labels: Tensor, several: bool) -> tuple[Tensor, Tensor]:
    """Probabilities whose calibration is measured, and whether they came true, as in `Metrics`.

    Both are (B, 1), of the likeliest class; or (B, K), of each label.
    """
    if several:
        return probabilities, labels.bool()
    confidence, predicted = probabilities.max(1)
    return confidence[:, None], (predicted == labels)[:, None]
