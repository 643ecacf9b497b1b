"""Exact figures of a classifier, gathered batch by batch.

Every image leaves a few numbers behind and the figures are computed from all of them at the end, so that
not even their last bit depends on the batch size. Shapes: B batch, N images, K classes.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from coatnet.errors import UserError
from coatnet.evaluation.calibration import CalibrationBin
from coatnet.evaluation.intervals import Interval
from coatnet.evaluation.multilabel import MultilabelCounts
from coatnet.evaluation.single_label import SingleLabelCounts


@dataclass(frozen=True)
class ClassFigures:
    """One class: how many images carry it and how well it is found; None where a figure is undefined."""

    support: int
    precision: float | None
    recall: float | None
    f1: float | None
    average_precision: float | None = None


class Metrics:
    """Top-1 and top-5 and their company for one label an image; average precision and F1 for several.

    Single-label figures: n, top1, top5 (where K > 5), macro_recall, macro_f1, nll, brier, calibration_error.
    Multi-label figures: n, mean_average_precision, micro_f1, macro_f1, exact_match, nll, brier,
    calibration_error; a label is claimed at a probability of 0.5.
    """

    def __init__(self, num_classes: int, multilabel: bool = False) -> None:
        self.num_classes = num_classes
        self.multilabel = multilabel
        self._counts = MultilabelCounts(num_classes) if multilabel else SingleLabelCounts(num_classes)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits (B, K); labels (B,) class indices, or (B, K) of 0 and 1 for multi-label.

        Raises:
            UserError: a logit is NaN or infinite.
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
            raise UserError("the model's output is not finite (NaN or infinity): its weights are broken")
        self._counts.update(scores, truth)

    @property
    def parts(self) -> list[tuple[np.ndarray, ...]]:
        """What each batch left behind; may be set to those of several counts, one after the other."""
        return self._counts.batches

    @parts.setter
    def parts(self, parts: list[tuple[np.ndarray, ...]]) -> None:
        self._counts.batches = parts

    def compute(self) -> dict[str, float]:
        """The figures of all images so far as fractions, and `n`, their number."""
        return self._counts.figures()

    def intervals(self) -> dict[str, Interval | None]:
        """95 % intervals of the figures of `compute`; None where one image cannot tell."""
        return self._counts.intervals()

    def per_class(self) -> list[ClassFigures]:
        """K rows, in the order of the classes."""
        return [ClassFigures(**row) for row in self._counts.per_class()]

    def confusion(self) -> np.ndarray | None:
        """Images of class i taken for class j, (K, K); None for multi-label and above 1,000 classes."""
        return self._counts.confusion()

    def confused_pairs(self, limit: int = 15) -> list[tuple[int, int, int]]:
        """The commonest mistakes: (true class, predicted class, images), most frequent first."""
        return self._counts.confused_pairs(limit)

    def calibration(self) -> tuple[CalibrationBin, ...]:
        """The reliability diagram's bins, over top-1 probabilities, or over every label's for multi-label."""
        return self._counts.calibration()
