"""Properties of images that give a class away without looking at what they show: size, brightness, color.

A network learns such a shortcut where it can (Geirhos et al., 2020, arXiv:2004.07780), and fails where
it does not hold.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from coatnet.data.splits import assign_folds

PROPERTIES = ("height", "width", "aspect ratio", "brightness", "contrast", "share of red", "share of blue")
GIVES_AWAY = 0.9  # chosen: least balanced accuracy; a coin has 0.5
MIN_IMAGES = 20  # chosen: of a class, and of all others
MAX_CLASSES = 100  # chosen: the largest are judged
NUM_FOLDS = 5


class Shortcut(NamedTuple):
    """A class, the property that tells it from all others, and with which balanced accuracy on images not used."""

    name: str
    property: str
    accuracy: float


def properties_of(pixels: Tensor) -> NDArray[np.float32]:
    """The values of `PROPERTIES` of an image (C, H, W); one of other than three channels counts as gray."""
    pixels = pixels if len(pixels) in (1, 3) else pixels.mean(dim=0, keepdim=True)
    height, width = pixels.shape[1:]
    step = max(1, min(height, width) // 64)
    colors = pixels[:, ::step, ::step].float().mean(dim=(1, 2)).expand(3)
    brightness = float(colors.mean())
    total = max(3 * brightness, 1e-6)
    contrast = float(pixels[:, ::step, ::step].float().mean(dim=0).std(correction=0))
    return np.array(
        [height, width, width / height, brightness, contrast, float(colors[0]) / total, float(colors[2]) / total],
        dtype=np.float32,
    ).round(4)


def find_shortcuts(properties: NDArray[np.float32], labels: NDArray, classes: Sequence[str]) -> list[Shortcut]:
    """Find the classes that one interval of one property tells from all others, by cross-validation.

    Inside or outside of an interval is what a decision tree of depth 2 on one property can say.

    Args:
        properties: (N, 7), from `properties_of`.
        labels: (N,).
        classes: names.
    """
    counts, found = np.bincount(labels, minlength=len(classes)), []
    folds = assign_folds([str(row) for row in range(len(labels))], labels, NUM_FOLDS)
    for label in np.argsort(-counts, kind="stable")[:MAX_CLASSES].tolist():
        if min(counts[label], len(labels) - counts[label]) < MIN_IMAGES:
            continue
        is_it = labels == label
        accuracies = [_cross_validated(values, is_it, folds) for values in properties.T]
        best = int(np.argmax(accuracies))
        if accuracies[best] >= GIVES_AWAY:
            found.append(Shortcut(classes[label], PROPERTIES[best], round(accuracies[best], 4)))
    return sorted(found, key=lambda each: -each.accuracy)


def _cross_validated(values: NDArray[np.float32], is_it: NDArray[np.bool_], folds: NDArray[np.int64]) -> float:
    said = np.empty(len(values), bool)
    for fold in range(NUM_FOLDS):
        held_out = folds == fold
        low, high, inside = _best_interval(values[~held_out], is_it[~held_out])
        said[held_out] = ((values[held_out] >= low) & (values[held_out] <= high)) == inside
    return float((said[is_it].mean() + (~said[~is_it]).mean()) / 2)


def _best_interval(values: NDArray[np.float32], is_it: NDArray[np.bool_]) -> tuple[float, float, bool]:
    """The interval whose inside, or outside, has the best balanced accuracy: the largest sum of consecutive weights."""
    known, places = np.unique(values, return_inverse=True)
    weights = np.where(is_it, 1 / max(is_it.sum(), 1), -1 / max((~is_it).sum(), 1))
    sums = np.concatenate([[0.0], np.cumsum(np.bincount(places, weights=weights))])
    best = []
    for sign in (1, -1):
        signed = sign * sums
        lowest = np.minimum.accumulate(signed[:-1])
        end = int(np.argmax(signed[1:] - lowest))
        start = int(np.argmin(signed[: end + 1]))
        best.append((signed[end + 1] - signed[start], float(known[start]), float(known[end]), sign > 0))
    return max(best)[1:]
