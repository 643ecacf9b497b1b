"""Calibration of probabilities: reliability diagram and expected error (Guo et al., 2017, arXiv:1706.04599)."""

from dataclasses import dataclass

import numpy as np

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
