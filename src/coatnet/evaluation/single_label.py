"""Counting when every image has one label. Shapes: B batch, N images, K classes."""

from functools import partial

import numpy as np

from coatnet.evaluation.calibration import CalibrationBin, calibration_bins, calibration_error
from coatnet.evaluation.intervals import Interval, bootstrap_interval, mean_interval, wilson_interval

# chosen: a dense matrix of 1,000 classes is 8 MB; of 21,841 classes it would be 3.8 GB.
LARGEST_CONFUSION = 1000


class SingleLabelCounts:
    """Six numbers an image: label, prediction, rank of the label, confidence, NLL and Brier score."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.batches: list[tuple[np.ndarray, ...]] = []

    def update(self, logits: np.ndarray, labels: np.ndarray) -> None:
        labels = labels.astype(np.int64)
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise ValueError(f"labels must lie in 0..{self.num_classes - 1}, got {labels.min()}..{labels.max()}")
        rows = np.arange(len(labels))
        predicted = logits.argmax(axis=1)
        of_label = logits[rows, labels][:, None]
        # Ties are broken towards the lower class, as argmax does: a constant output earns no free top-5.
        earlier = np.arange(self.num_classes) < labels[:, None]
        rank = ((logits > of_label) | ((logits == of_label) & earlier)).sum(axis=1)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        probabilities = np.exp(log_probabilities)
        nll = -log_probabilities[rows, labels]
        brier = (probabilities**2).sum(axis=1) - 2 * probabilities[rows, labels] + 1
        self.batches.append((labels, predicted, rank, probabilities[rows, predicted], nll, brier))

    def _columns(self) -> tuple[np.ndarray, ...]:
        if not self.batches:
            raise ValueError("no images were counted")
        return tuple(np.concatenate(column) for column in zip(*self.batches, strict=True))

    def figures(self) -> dict[str, float]:
        labels, _, rank, confidence, nll, brier = self._columns()
        correct = rank == 0
        rows = [row for row in self.per_class() if row["support"]]
        figures = {"n": len(labels), "top1": float(correct.mean())}
        if self.num_classes > 5:
            figures["top5"] = float((rank < 5).mean())
        return figures | {
            "macro_recall": float(np.mean([row["recall"] for row in rows])),
            "macro_f1": float(np.mean([row["f1"] for row in rows])),
            "nll": float(nll.mean()),
            "brier": float(brier.mean()),
            "calibration_error": calibration_error(confidence, correct),
        }

    def intervals(self) -> dict[str, Interval | None]:
        labels, predicted, rank, confidence, nll, brier = self._columns()
        size, correct = len(labels), rank == 0
        intervals: dict[str, Interval | None] = {"top1": wilson_interval(int(correct.sum()), size)}
        if self.num_classes > 5:
            intervals["top5"] = wilson_interval(int((rank < 5).sum()), size)
        drawn = partial(_macro_averages, labels, predicted, self.num_classes)
        return intervals | {
            "macro_recall": bootstrap_interval(lambda weights: drawn(weights)[0], size),
            "macro_f1": bootstrap_interval(lambda weights: drawn(weights)[1], size),
            "nll": mean_interval(nll),
            "brier": mean_interval(brier),
            "calibration_error": bootstrap_interval(partial(calibration_error, confidence, correct), size),
        }

    def per_class(self) -> list[dict]:
        labels, predicted, *_ = self._columns()
        support, claimed, found = _class_counts(labels, predicted, self.num_classes)
        return [
            {
                "support": int(there),
                "precision": float(right / said) if said else None,
                "recall": float(right / there) if there else None,
                "f1": float(2 * right / (said + there)) if said + there else None,
            }
            for there, said, right in zip(support, claimed, found, strict=True)
        ]

    def confusion(self) -> np.ndarray | None:
        if self.num_classes > LARGEST_CONFUSION:
            return None
        labels, predicted, *_ = self._columns()
        pairs = np.bincount(labels * self.num_classes + predicted, minlength=self.num_classes**2)
        return pairs.reshape(self.num_classes, self.num_classes)

    def confused_pairs(self, limit: int) -> list[tuple[int, int, int]]:
        labels, predicted, *_ = self._columns()
        wrong = labels != predicted
        pairs, counts = np.unique(labels[wrong] * self.num_classes + predicted[wrong], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:limit]
        return [(int(pairs[i]) // self.num_classes, int(pairs[i]) % self.num_classes, int(counts[i])) for i in order]

    def calibration(self) -> tuple[CalibrationBin, ...]:
        _, _, rank, confidence, *_ = self._columns()
        return calibration_bins(confidence, rank == 0)


def _class_counts(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each class, the images that have it, that were given it, and both; each (K,)."""
    right = labels == predicted
    return (
        np.bincount(labels, weights, num_classes),
        np.bincount(predicted, weights, num_classes),
        np.bincount(labels[right], None if weights is None else weights[right], num_classes),
    )


def _macro_averages(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int, weights: np.ndarray
) -> tuple[float, float]:
    """Recall and F1, averaged over the classes that occur."""
    support, claimed, found = _class_counts(labels, predicted, num_classes, weights)
    there = support > 0
    recall = found[there] / support[there]
    f1 = 2 * found[there] / (support[there] + claimed[there])
    return float(recall.mean()), float(f1.mean())
