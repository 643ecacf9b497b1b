"""Exact figures of a classifier, their 95 % confidence intervals and calibration, collected batch by batch.

A few numbers are stored for every image, and the figures are computed from all of them at the end, so that not even
their last bit depends on the batch size. Shapes: B batch, N images, K classes.

Intervals: Wilson for fractions (E. B. Wilson, 1927, "Probable inference, the law of succession, and statistical
inference"), normal for means, bootstrap standard errors for all others. Calibration: reliability diagram and expected
error (Guo et al., 2017, arXiv:1706.04599).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from coatnet.errors import NotFinite

Interval = tuple[float, float]

_Z = 1.959963984540054  # the 97.5 % point of the standard normal distribution


def wilson_interval(successes: int, total: int, z: float = _Z) -> Interval:
    """The interval of a fraction; unlike the normal one it stays valid at 0, at 1 and for few images.

    `z` is the point of the standard normal distribution that belongs to the level: 1.96 for 95 %.
    """
    if total == 0:
        return (0.0, 1.0)
    fraction = successes / total
    spread = z**2 / total
    center = (fraction + spread / 2) / (1 + spread)
    half = z * math.sqrt(fraction * (1 - fraction) / total + spread / (4 * total)) / (1 + spread)
    # At 0 and 1, rounding could put a bound on the wrong side of the fraction.
    return (max(0.0, min(fraction, center - half)), min(1.0, max(fraction, center + half)))


def mean_interval(values: np.ndarray, *, least: float = 0.0) -> Interval | None:
    """The normal interval of the mean of independent values >= `least`, (N,); None for a single value."""
    if len(values) < 2:
        return None
    mean = float(values.mean())
    half = _Z * float(values.std(ddof=1)) / math.sqrt(len(values))
    return (max(least, mean - half), mean + half)


def paired_difference(first: np.ndarray, second: np.ndarray) -> Interval:
    """The normal interval of the difference of two fractions of the same images, from bool arrays (N,).

    Where no image differs, plus and minus the upper Wilson bound of 0 of N.
    """
    if (first == second).all():
        most = wilson_interval(0, len(first))[1]
        return (-most, most)
    (gained, lost), size = discordant(first, second), len(first)
    difference = (gained - lost) / size
    half = _Z * math.sqrt(max(0.0, (gained + lost) / size - difference**2) / size)
    return (difference - half, difference + half)


def discordant(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """How many images only the first of two models has right, and only the second, from bool arrays (N,)."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def may_be_chance(interval: Interval, p: float = 0.0) -> bool:
    """Whether a difference may be 0, by its interval or by the p of McNemar's test: the interval is approximate, and
    too narrow where few images differ."""
    return p >= 0.05 or not (interval[0] > 0 or interval[1] < 0)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p of McNemar's exact test: a binomial test of the images that only one of two models has right."""
    n, least = gained + lost, min(gained, lost)
    ways = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(least + 1)
    )
    return min(1.0, 2 * math.fsum(map(math.exp, ways)))


RESAMPLES = 100


def bootstrap_interval(statistic: Callable[[np.ndarray], float], size: int, *, least: float = 0.0) -> Interval | None:
    """The interval of a statistic in least..1: plus and minus 1.96 bootstrap standard errors.

    None for a single image, and where the statistic is equal in all resamples: its standard error is then 0, although
    the true value is uncertain.

    Standard errors rather than percentiles: the calibration error is biased under resampling, and its percentile
    interval may exclude the value itself.

    Args:
        statistic: computes it from how often each image was drawn, integers (size,).
        size: number of images.
        least: the smallest value that it can have.
    """
    if size < 2:
        return None
    generator = np.random.Generator(np.random.PCG64(0))
    value = statistic(np.ones(size, dtype=np.int64))
    drawn = [statistic(np.bincount(generator.integers(size, size=size), minlength=size)) for _ in range(RESAMPLES)]
    half = _Z * float(np.std(drawn, ddof=1))
    if half == 0:
        return None
    return (max(least, value - half), min(1.0, value + half))


NUM_BINS = 15


@dataclass(frozen=True)
class CalibrationBin:
    """Predictions whose probability lies in (low, high].

    Attributes:
        low: lower end of the bin.
        high: upper end of the bin.
        count: number of predictions.
        confidence: their mean probability; None in an empty bin.
        accuracy: the fraction of them that is right; None in an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def _bin_of(confidences: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(confidences * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)


def calibration_error(confidences: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Expected calibration error: sum over bins of fraction * |mean confidence - accuracy| (Guo et al., eq. 3).

    Args:
        confidences: probabilities of N predictions, (N,).
        correct: whether they are right, (N,).
        weights: how often each counts, (N,); by default once.
    """
    gaps = confidences - correct
    total = float(len(gaps)) if weights is None else float(weights.sum())
    if weights is not None:
        gaps = gaps * weights
    # fraction * |mean of the gaps| = |sum of the gaps| / N: no division by the size of a bin.
    return float(np.abs(np.bincount(_bin_of(confidences), weights=gaps, minlength=NUM_BINS)).sum() / total)


def calibration_bins(confidences: np.ndarray, correct: np.ndarray) -> tuple[CalibrationBin, ...]:
    """Bins of the reliability diagram of N predictions: confidences (N,), correct (N,)."""
    bins = _bin_of(confidences)
    counts = np.bincount(bins, minlength=NUM_BINS)
    confidence_sums = np.bincount(bins, weights=confidences, minlength=NUM_BINS)
    correct_sums = np.bincount(bins, weights=correct, minlength=NUM_BINS)
    return tuple(
        CalibrationBin(
            low=index / NUM_BINS,
            high=(index + 1) / NUM_BINS,
            count=int(count),
            confidence=float(confidence_sums[index] / count) if count else None,
            accuracy=float(correct_sums[index] / count) if count else None,
        )
        for index, count in enumerate(counts)
    )


# chosen: a dense matrix of 1,000 classes is 8 MB; of 21,841 classes it would be 3.8 GB.
MAX_CONFUSION_CLASSES = 1000


class FigureInfo(NamedTuple):
    """How a report presents a figure; fractions are shown in percent."""

    title: str
    meaning: str
    is_fraction: bool


FIGURES = {
    "top1": FigureInfo("top-1 accuracy", "the first guess is right", True),
    "top5": FigureInfo("top-5 accuracy", "the truth is among the first five guesses", True),
    "mean_average_precision": FigureInfo("mean average precision", "how well each class ranks the images", True),
    "macro_recall": FigureInfo("macro recall", "accuracy with every class counted alike", True),
    "micro_f1": FigureInfo("micro F1", "F1 of all decisions at a probability of 0.5", True),
    "macro_f1": FigureInfo("macro F1", "F1 with every class counted alike", True),
    "exact_match": FigureInfo("exact match", "all labels of an image are right", True),
    "calibration_error": FigureInfo("calibration error", "mean gap between probability and accuracy", True),
    "nll": FigureInfo("negative log-likelihood", "nats; 0 is best", False),
    "brier": FigureInfo("Brier score", "squared error of the probabilities; 0 is best", False),
}


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class, as fractions; None where undefined. `support` is the number of images with this label."""

    support: int
    precision: float | None
    recall: float | None
    f1: float | None
    average_precision: float | None = None


def main_figure(multilabel: bool) -> str:
    """The figure that headlines name and choices are made by: `top1`, or `mean_average_precision`."""
    return "mean_average_precision" if multilabel else "top1"


class Metrics:
    """Figures, intervals and tables of a classifier over any number of batches.

    Single-label figures: n, top1, top5 (where K > 5), macro_recall, macro_f1, nll, brier, calibration_error.
    Multi-label figures: n, mean_average_precision, micro_f1, macro_f1, exact_match, nll, brier,
    calibration_error; a label is predicted at a probability of 0.5 or more.

    Args:
        num_classes: K.
        multilabel: whether an image may have several labels, or none.
    """

    def __init__(self, num_classes: int, multilabel: bool = False) -> None:
        self.num_classes = num_classes
        self.multilabel = multilabel
        self._counts = _MultilabelCounts(num_classes) if multilabel else _SingleLabelCounts(num_classes)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch.

        Args:
            logits: (B, K).
            labels: class indices (B,); or 0 and 1 per class (B, K) for multi-label.

        Raises:
            NotFinite: a logit is NaN or infinite.
            ValueError: shapes or labels do not fit the classes.
        """
        scores = logits.detach().cpu().double().numpy()
        truth = labels.detach().cpu().numpy()
        expected = scores.shape if self.multilabel else scores.shape[:1]
        if scores.ndim != 2 or scores.shape[1] != self.num_classes or truth.shape != expected:
            raise ValueError(
                f"logits {scores.shape} and labels {truth.shape} do not fit {self.num_classes} classes, "
                f"multilabel={self.multilabel}"
            )
        if not np.isfinite(scores).all():
            raise NotFinite("the model's output is not finite (NaN or infinity): its weights are broken")
        self._counts.update(scores, truth)

    @property
    def batches(self) -> list[tuple[np.ndarray, ...]]:
        """The numbers stored for each batch, to be exchanged between processes; may be set to those of all of them."""
        return self._counts.batches

    @batches.setter
    def batches(self, batches: list[tuple[np.ndarray, ...]]) -> None:
        self._counts.batches = batches

    def compute(self) -> dict[str, float]:
        """Figures of all images so far, as fractions, and their number `n`."""
        return self._counts.figures()

    def correct(self) -> np.ndarray | None:
        """Whether each image was classified right, (N,) of bool in their order; None for multi-label."""
        return self._counts.correct()

    def per_image(self) -> tuple[np.ndarray, ...]:
        """Of each image in their order, N rows each: label, prediction, probability of the prediction, whether it is
        right, negative log-likelihood. For multi-label, label and prediction are (N, K) of bool, right means all of
        them, and the probability is that of the least certain decision.
        """
        return self._counts.per_image()

    def probabilities(self) -> np.ndarray | None:
        """Of each image in their order and each class, (N, K) of float32; None for single-label."""
        return self._counts.columns()[1].astype(np.float32) if self.multilabel else None

    def intervals(self) -> dict[str, Interval | None]:
        """95 % intervals of the figures of `compute`; None for one image, or if resampling leaves a figure as it is."""
        return self._counts.intervals()

    def per_class(self) -> list[ClassFigures]:
        """Figures of each class, K rows in the order of the classes."""
        return self._counts.per_class()

    def confusion(self) -> np.ndarray | None:
        """Number of images of class i predicted as class j, (K, K); None for multi-label and above 1,000 classes."""
        return self._counts.confusion()

    def confused_pairs(self, limit: int = 15) -> list[tuple[int, int, int]]:
        """The most frequent mistakes, in that order: (true class, predicted class, number of images)."""
        return self._counts.confused_pairs(limit)

    def calibration(self) -> tuple[CalibrationBin, ...]:
        """Bins of the reliability diagram, over top-1 probabilities, or over all labels' for multi-label."""
        return self._counts.calibration()


class _Counts:
    """The numbers stored for each image, batch by batch."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.batches: list[tuple[np.ndarray, ...]] = []

    def columns(self) -> tuple[np.ndarray, ...]:
        """Each of the numbers over all images, (N, ...)."""
        if not self.batches:
            raise ValueError("no images were counted")
        if len(self.batches) > 1:
            self.batches = [tuple(np.concatenate(column) for column in zip(*self.batches, strict=True))]
        return self.batches[0]


class _SingleLabelCounts(_Counts):
    """Stores per image: label, prediction, rank of the label, confidence, NLL and Brier score."""

    def update(self, logits: np.ndarray, labels: np.ndarray) -> None:
        labels = labels.astype(np.int64)
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise ValueError(f"labels must lie in 0..{self.num_classes - 1}, got {labels.min()}..{labels.max()}")
        rows = np.arange(len(labels))
        predicted = logits.argmax(axis=1)
        label_logits = logits[rows, labels][:, None]  # (B, 1)
        # Ties go to the lower class, as in argmax: a constant output must not count as right.
        lower_class = np.arange(self.num_classes) < labels[:, None]  # (B, K)
        rank = ((logits > label_logits) | ((logits == label_logits) & lower_class)).sum(axis=1)  # (B,)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        probabilities = np.exp(log_probabilities)
        nll = -log_probabilities[rows, labels]
        brier = (probabilities**2).sum(axis=1) - 2 * probabilities[rows, labels] + 1
        self.batches.append((labels, predicted, rank, probabilities[rows, predicted], nll, brier))

    def correct(self) -> np.ndarray | None:
        return self.columns()[2] == 0

    def per_image(self) -> tuple[np.ndarray, ...]:
        labels, predicted, rank, confidence, nll, _ = self.columns()
        return labels, predicted, confidence, rank == 0, nll

    def figures(self) -> dict[str, float]:
        labels, predicted, rank, confidence, nll, brier = self.columns()
        correct = rank == 0
        macro_recall, macro_f1 = _macro_averages(labels, predicted, self.num_classes)
        figures = {"n": len(labels), "top1": float(correct.mean())}
        if self.num_classes > 5:
            figures["top5"] = float((rank < 5).mean())
        return figures | {
            "macro_recall": macro_recall,
            "macro_f1": macro_f1,
            "nll": float(nll.mean()),
            "brier": float(brier.mean()),
            "calibration_error": calibration_error(confidence, correct),
        }

    def intervals(self) -> dict[str, Interval | None]:
        labels, predicted, rank, confidence, nll, brier = self.columns()
        size, correct = len(labels), rank == 0
        intervals: dict[str, Interval | None] = {"top1": wilson_interval(int(correct.sum()), size)}
        if self.num_classes > 5:
            intervals["top5"] = wilson_interval(int((rank < 5).sum()), size)
        averages = partial(_macro_averages, labels, predicted, self.num_classes)
        return intervals | {
            "macro_recall": bootstrap_interval(lambda weights: averages(weights)[0], size),
            "macro_f1": bootstrap_interval(lambda weights: averages(weights)[1], size),
            "nll": mean_interval(nll),
            "brier": mean_interval(brier),
            "calibration_error": bootstrap_interval(partial(calibration_error, confidence, correct), size),
        }

    def per_class(self) -> list[ClassFigures]:
        labels, predicted, *_ = self.columns()
        counts = _class_counts(labels, predicted, self.num_classes)
        return [_class_figures(*of_class) for of_class in zip(*counts, strict=True)]

    def confusion(self) -> np.ndarray | None:
        if self.num_classes > MAX_CONFUSION_CLASSES:
            return None
        labels, predicted, *_ = self.columns()
        pairs = np.bincount(labels * self.num_classes + predicted, minlength=self.num_classes**2)
        return pairs.reshape(self.num_classes, self.num_classes)

    def confused_pairs(self, limit: int) -> list[tuple[int, int, int]]:
        labels, predicted, *_ = self.columns()
        wrong = labels != predicted
        pairs, counts = np.unique(labels[wrong] * self.num_classes + predicted[wrong], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:limit]
        return [(int(pairs[i]) // self.num_classes, int(pairs[i]) % self.num_classes, int(counts[i])) for i in order]

    def calibration(self) -> tuple[CalibrationBin, ...]:
        _, _, rank, confidence, *_ = self.columns()
        return calibration_bins(confidence, rank == 0)


def _class_figures(
    support: int, num_predicted: int, num_correct: int, average_precision: float | None = None
) -> ClassFigures:
    return ClassFigures(
        support=int(support),
        precision=float(num_correct / num_predicted) if num_predicted else None,
        recall=float(num_correct / support) if support else None,
        f1=float(2 * num_correct / (num_predicted + support)) if num_predicted + support else None,
        average_precision=average_precision,
    )


def _class_counts(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per class, (K,) each: images with this label, images predicted as it, and images that are both."""
    correct = labels == predicted
    return (
        np.bincount(labels, weights, num_classes),
        np.bincount(predicted, weights, num_classes),
        np.bincount(labels[correct], None if weights is None else weights[correct], num_classes),
    )


def _macro_averages(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int, weights: np.ndarray | None = None
) -> tuple[float, float]:
    """Macro recall and macro F1 over the classes that occur."""
    support, num_predicted, num_correct = _class_counts(labels, predicted, num_classes, weights)
    occurs = support > 0
    recall = num_correct[occurs] / support[occurs]
    f1 = 2 * num_correct[occurs] / (support[occurs] + num_predicted[occurs])
    return float(recall.mean()), float(f1.mean())


class _MultilabelCounts(_Counts):
    """Stores per image: labels, probabilities and NLL; average precision needs the order of all probabilities."""

    def update(self, logits: np.ndarray, labels: np.ndarray) -> None:
        if not np.isin(labels, (0, 1)).all():
            raise ValueError("multi-label labels must be 0 or 1")
        labels = labels.astype(bool)
        # log(1 + exp(-z)) for present labels, log(1 + exp(z)) for absent ones: exact for large logits.
        losses = np.logaddexp(0, np.where(labels, -logits, logits)).mean(axis=1)
        probabilities = 0.5 * (1 + np.tanh(logits / 2))
        self.batches.append((labels, probabilities, losses))

    def correct(self) -> np.ndarray | None:
        return None

    def per_image(self) -> tuple[np.ndarray, ...]:
        labels, probabilities, losses = self.columns()
        predicted = probabilities >= 0.5
        certain = np.maximum(probabilities, 1 - probabilities).min(axis=1)
        return labels, predicted, certain, (labels == predicted).all(axis=1), losses

    def figures(self) -> dict[str, float]:
        labels, probabilities, losses = self.columns()
        all_once = np.ones(len(labels), dtype=np.int64)
        predicted = probabilities >= 0.5
        micro_f1, macro_f1 = _f1(labels, predicted, all_once)
        return {
            "n": len(labels),
            "mean_average_precision": _MeanAveragePrecision(labels, probabilities)(all_once),
            "micro_f1": micro_f1,
            "macro_f1": macro_f1,
            "exact_match": float((labels == predicted).all(axis=1).mean()),
            "nll": float(losses.mean()),
            "brier": float(((probabilities - labels) ** 2).mean()),
            "calibration_error": calibration_error(probabilities.ravel(), labels.ravel()),
        }

    def intervals(self) -> dict[str, Interval | None]:
        labels, probabilities, losses = self.columns()
        size, predicted = len(labels), probabilities >= 0.5

        def resampled_calibration_error(weights: np.ndarray) -> float:
            per_label = np.repeat(weights, self.num_classes)  # (N * K,): the labels of an image are drawn together
            return calibration_error(probabilities.ravel(), labels.ravel(), per_label)

        return {
            "mean_average_precision": bootstrap_interval(_MeanAveragePrecision(labels, probabilities), size),
            "micro_f1": bootstrap_interval(lambda weights: _f1(labels, predicted, weights)[0], size),
            "macro_f1": bootstrap_interval(lambda weights: _f1(labels, predicted, weights)[1], size),
            "exact_match": wilson_interval(int((labels == predicted).all(axis=1).sum()), size),
            "nll": mean_interval(losses),
            "brier": mean_interval(((probabilities - labels) ** 2).mean(axis=1)),
            "calibration_error": bootstrap_interval(resampled_calibration_error, size),
        }

    def per_class(self) -> list[ClassFigures]:
        labels, probabilities, _ = self.columns()
        predicted = probabilities >= 0.5
        counts = labels.sum(0), predicted.sum(0), (labels & predicted).sum(0)
        all_once = np.ones(len(labels), dtype=np.int64)
        precisions = (_AveragePrecision(labels[:, k], probabilities[:, k])(all_once) for k in range(self.num_classes))
        return [_class_figures(*of_class) for of_class in zip(*counts, precisions, strict=True)]

    def confusion(self) -> None:
        return None

    def confused_pairs(self, limit: int) -> list[tuple[int, int, int]]:
        return []

    def calibration(self) -> tuple[CalibrationBin, ...]:
        labels, probabilities, _ = self.columns()
        return calibration_bins(probabilities.ravel(), labels.ravel())


class _AveragePrecision:
    """Average precision of one class: sum over thresholds of (recall step) * precision; ties are one threshold.

    Called with how often each image was drawn, (N,); None if no drawn image has the label.
    """

    def __init__(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        self._order = np.argsort(-probabilities, kind="stable")
        self._labels = labels[self._order]
        ranked = probabilities[self._order]
        self._thresholds = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # last of each tie

    def __call__(self, weights: np.ndarray) -> float | None:
        drawn = weights[self._order]
        num_correct = np.cumsum(drawn * self._labels)[self._thresholds]
        num_predicted = np.cumsum(drawn)[self._thresholds]
        if num_correct[-1] == 0:
            return None
        steps = np.diff(num_correct, prepend=0)
        return float((steps * num_correct / np.maximum(num_predicted, 1)).sum() / num_correct[-1])


class _MeanAveragePrecision:
    """Mean of the average precisions of the classes that occur; 0 if none does."""

    def __init__(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        self._classes = [
            _AveragePrecision(truth, scores) for truth, scores in zip(labels.T, probabilities.T, strict=True)
        ]

    def __call__(self, weights: np.ndarray) -> float:
        defined = [value for average_precision in self._classes if (value := average_precision(weights)) is not None]
        return float(np.mean(defined)) if defined else 0.0


def precision_difference(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[float, Interval | None]:
    """The mean average precision of the first probabilities less that of the second, on the same images, and its
    interval, by drawing images for both. All are (N, K), labels of bool."""
    of_first, of_second = (_MeanAveragePrecision(labels, each) for each in (first, second))

    def difference(weights: np.ndarray) -> float:
        return of_first(weights) - of_second(weights)

    size = len(labels)
    return difference(np.ones(size, dtype=np.int64)), bootstrap_interval(difference, size, least=-1.0)


def _f1(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Micro F1, over all decisions together; and macro F1, its mean over the classes that occur."""
    num_correct = weights @ (labels & predicted)
    total = weights @ labels + weights @ predicted
    occurs = weights @ labels > 0
    micro = 2 * num_correct.sum() / total.sum() if total.sum() else 0.0
    macro = (2 * num_correct[occurs] / total[occurs]).mean() if occurs.any() else 0.0
    return float(micro), float(macro)
