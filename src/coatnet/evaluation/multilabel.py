"""Counting when an image may carry several labels, or none. Shapes: B batch, N images, K classes."""

import numpy as np

from coatnet.evaluation.calibration import CalibrationBin, calibration_bins, calibration_error
from coatnet.evaluation.intervals import Interval, bootstrap_interval, mean_interval, wilson_interval


class MultilabelCounts:
    """Keeps every probability: average precision is a statement about their order over all images."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.batches: list[tuple[np.ndarray, ...]] = []

    def update(self, logits: np.ndarray, labels: np.ndarray) -> None:
        if not np.isin(labels, (0, 1)).all():
            raise ValueError("multi-label labels must be 0 or 1")
        labels = labels.astype(bool)
        # log(1 + exp(-z)) for present labels, log(1 + exp(z)) for absent ones: exact for large logits.
        losses = np.logaddexp(0, np.where(labels, -logits, logits)).mean(axis=1)
        probabilities = 0.5 * (1 + np.tanh(logits / 2))
        self.batches.append((labels, probabilities, losses))

    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not self.batches:
            raise ValueError("no images were counted")
        labels, probabilities, losses = zip(*self.batches, strict=True)
        return np.concatenate(labels), np.concatenate(probabilities), np.concatenate(losses)

    def figures(self) -> dict[str, float]:
        labels, probabilities, losses = self._columns()
        everyone = np.ones(len(labels), dtype=np.int64)
        claims = probabilities >= 0.5
        return {
            "n": len(labels),
            "mean_average_precision": _MeanAveragePrecision(labels, probabilities)(everyone),
            "micro_f1": _f1(labels, claims, everyone)[0],
            "macro_f1": _f1(labels, claims, everyone)[1],
            "exact_match": float((labels == claims).all(axis=1).mean()),
            "nll": float(losses.mean()),
            "brier": float(((probabilities - labels) ** 2).mean()),
            "calibration_error": calibration_error(probabilities.ravel(), labels.ravel()),
        }

    def intervals(self) -> dict[str, Interval | None]:
        labels, probabilities, losses = self._columns()
        size, claims = len(labels), probabilities >= 0.5

        def drawn_calibration_error(weights: np.ndarray) -> float:
            spread = np.repeat(weights, self.num_classes)  # (N * K,): the labels of an image are drawn together
            return calibration_error(probabilities.ravel(), labels.ravel(), spread)

        return {
            "mean_average_precision": bootstrap_interval(_MeanAveragePrecision(labels, probabilities), size),
            "micro_f1": bootstrap_interval(lambda weights: _f1(labels, claims, weights)[0], size),
            "macro_f1": bootstrap_interval(lambda weights: _f1(labels, claims, weights)[1], size),
            "exact_match": wilson_interval(int((labels == claims).all(axis=1).sum()), size),
            "nll": mean_interval(losses),
            "brier": mean_interval(((probabilities - labels) ** 2).mean(axis=1)),
            "calibration_error": bootstrap_interval(drawn_calibration_error, size),
        }

    def per_class(self) -> list[dict]:
        labels, probabilities, _ = self._columns()
        claims = probabilities >= 0.5
        support, claimed, found = labels.sum(0), claims.sum(0), (labels & claims).sum(0)
        everyone = np.ones(len(labels), dtype=np.int64)
        return [
            {
                "support": int(support[k]),
                "precision": float(found[k] / claimed[k]) if claimed[k] else None,
                "recall": float(found[k] / support[k]) if support[k] else None,
                "f1": float(2 * found[k] / (claimed[k] + support[k])) if claimed[k] + support[k] else None,
                "average_precision": _AveragePrecision(labels[:, k], probabilities[:, k])(everyone),
            }
            for k in range(self.num_classes)
        ]

    def confusion(self) -> None:
        return None

    def confused_pairs(self, limit: int) -> list[tuple[int, int, int]]:
        return []

    def calibration(self) -> tuple[CalibrationBin, ...]:
        labels, probabilities, _ = self._columns()
        return calibration_bins(probabilities.ravel(), labels.ravel())


class _AveragePrecision:
    """AP = sum over thresholds of (recall step) * precision, equal probabilities being one threshold.

    Called with how often each image was drawn, (N,); None when no drawn image carries the label.
    """

    def __init__(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        self._order = np.argsort(-probabilities, kind="stable")
        self._labels = labels[self._order]
        ranked = probabilities[self._order]
        self._thresholds = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # last of each tie

    def __call__(self, weights: np.ndarray) -> float | None:
        drawn = weights[self._order]
        found = np.cumsum(drawn * self._labels)[self._thresholds]
        claimed = np.cumsum(drawn)[self._thresholds]
        if found[-1] == 0:
            return None
        steps = np.diff(found, prepend=0)
        return float((steps * found / np.maximum(claimed, 1)).sum() / found[-1])


class _MeanAveragePrecision:
    """The mean of the average precisions of the classes that occur; 0 when none does."""

    def __init__(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        self._classes = [
            _AveragePrecision(truth, scores) for truth, scores in zip(labels.T, probabilities.T, strict=True)
        ]

    def __call__(self, weights: np.ndarray) -> float:
        defined = [value for of_class in self._classes if (value := of_class(weights)) is not None]
        return float(np.mean(defined)) if defined else 0.0


def _f1(labels: np.ndarray, claims: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """F1 over all decisions together (micro), and its mean over the classes that occur (macro)."""
    found = weights @ (labels & claims)
    total = weights @ labels + weights @ claims
    there = weights @ labels > 0
    micro = 2 * found.sum() / total.sum() if total.sum() else 0.0
    macro = (2 * found[there] / total[there]).mean() if there.any() else 0.0
    return float(micro), float(macro)
