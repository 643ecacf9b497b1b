"""Do the probabilities mean what they say? Reliability in equal bins (Guo et al., 2017, arXiv:1706.04599)."""

from dataclasses import dataclass

import numpy as np

NUM_BINS = 15


@dataclass(frozen=True)
class CalibrationBin:
    """The predictions whose probability lies in (low, high]: how many, how sure, how often right."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def _bin_of(confidences: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(confidences * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)


def calibration_error(confidences: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Expected calibration error: sum over bins of share * |mean confidence - accuracy|. All shapes (N,)."""
    gaps = confidences - correct
    total = float(len(gaps)) if weights is None else float(weights.sum())
    if weights is not None:
        gaps = gaps * weights
    # share * |mean of the gaps| = |sum of the gaps| / N: no division by the size of a bin.
    return float(np.abs(np.bincount(_bin_of(confidences), weights=gaps, minlength=NUM_BINS)).sum() / total)


def calibration_bins(confidences: np.ndarray, correct: np.ndarray) -> tuple[CalibrationBin, ...]:
    """The rows of a reliability diagram; empty bins have neither confidence nor accuracy."""
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
