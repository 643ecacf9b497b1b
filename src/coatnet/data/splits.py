"""Training and validation images of one source, how they were split, and what they look like."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coatnet.data.datasets import Dataset
from coatnet.data.decode import BadImage, decode, image_size
from coatnet.errors import UserError

_SAMPLED = 200  # images, evenly spread: enough for a median, little enough for a slow disk


@dataclass(frozen=True)
class Summary:
    """What a sample of the images looks like; sizes are (height, width) in pixels."""

    median: tuple[int, int]
    smallest: tuple[int, int]
    largest: tuple[int, int]
    grey: bool
    num_sampled: int

    @property
    def uniform(self) -> bool:
        return self.smallest == self.largest


@dataclass(frozen=True)
class Splits:
    """Two datasets with the same classes in the same order, and what `open_dataset` noticed on the way."""

    name: str
    training: Dataset
    validation: Dataset
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.training.classes

    @property
    def multilabel(self) -> bool:
        return self.training.multilabel

    @cached_property
    def summary(self) -> Summary:
        return summarise(self.training)

    @property
    def native_resolution(self) -> int:
        """The shorter side of the median training image, in pixels."""
        return min(self.summary.median)

    @property
    def grey(self) -> bool:
        """Whether every sampled training image is without colour."""
        return self.summary.grey

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """What was found, a few lines for people: images, sizes, classes, balance, split, notes."""
        counts = self.training.class_counts
        num_images = len(self.training) + len(self.validation)
        kind = "several labels an image" if self.multilabel else "one label an image"
        shown = ", ".join(self.classes[:10]) + (
            f", ... ({len(self.classes) - 10} more)" if len(self.classes) > 10 else ""
        )
        lines = [
            f"{self.name}: {num_images:,} images, {len(self.classes)} classes, {kind}",
            f"  split    {len(self.training):,} for training, {len(self.validation):,} for validation",
            f"  images {_describe_sizes(self.summary)}, {'grey' if self.grey else 'colour'}",
            f"  classes  {shown}",
            f"  balance  {_describe_balance(self.classes, counts)}",
        ]
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])


def summarise(dataset: Dataset) -> Summary:
    """Look at up to 200 images, evenly spread. An image that cannot be read does not count.

    Raises `UserError` with the last reason if none can be read.
    """
    numbers = np.unique(np.linspace(0, len(dataset) - 1, min(_SAMPLED, len(dataset))).astype(np.int64))
    sizes: list[tuple[int, int]] = []
    grey = True
    failure = None
    for index in numbers.tolist():
        try:
            encoded, _ = dataset.read(index)
            if isinstance(encoded, bytes):
                sizes.append(image_size(encoded, dataset.describe(index)))
                # Only the images before the first coloured one are decoded.
                grey = grey and _is_grey(decode(encoded, dataset.describe(index)).numpy())
            else:
                sizes.append((encoded.shape[0], encoded.shape[1]))
                grey = grey and encoded.ndim == 2
        except BadImage as bad:
            failure = bad
    if not sizes:
        raise UserError(f"{dataset.name}: none of {len(numbers)} images looked at can be used, the last one {failure}")
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    heights, widths = np.sort(np.array(sizes), axis=0).T
    median = int(heights[len(heights) // 2]), int(widths[len(widths) // 2])
    return Summary(median, by_area[0], by_area[-1], grey, len(sizes))


def choose_validation(names: Sequence[str], labels: NDArray, fraction: float) -> NDArray[np.bool_]:
    """Mark the images (N,) that are held out, by the hash of each one's name, class by class.

    An image's side depends on its own name alone, so adding files moves none, save that every class of two
    images or more keeps at least one on each side. With several labels an image (N, K), all images are
    one group.
    """
    hashes = np.array([_name_hash(name) for name in names])
    held_out = hashes < fraction
    groups = labels if labels.ndim == 1 else np.zeros(len(names), dtype=np.int64)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        by_hash = members[np.argsort(hashes[members], kind="stable")]
        if len(members) > 1:
            held_out[by_hash[0]] = True
            held_out[by_hash[-1]] = False
        else:
            held_out[members] = False
    return held_out


def _name_hash(name: str) -> float:
    # macOS writes accents decomposed, Linux composed: the same folder must split the same way on both.
    name_bytes = os.fsencode(unicodedata.normalize("NFC", name))
    return int.from_bytes(hashlib.blake2b(name_bytes, digest_size=8).digest(), "big") / 2**64


def _is_grey(pixels: NDArray[np.uint8]) -> bool:
    return bool((pixels[0] == pixels[1]).all() and (pixels[1] == pixels[2]).all())


def _describe_sizes(summary: Summary) -> str:
    (height, width), small, large = summary.median, summary.smallest, summary.largest
    if summary.uniform:
        return f"{width} x {height} pixels"
    spread = f"from {small[1]} x {small[0]} to {large[1]} x {large[0]}"
    return f"{width} x {height} pixels in the median, {spread} (of {summary.num_sampled} looked at)"


def _describe_balance(classes: tuple[str, ...], counts: NDArray[np.int64]) -> str:
    low, high = int(counts.argmin()), int(counts.argmax())
    if counts[low] == counts[high]:
        return f"{counts[low]:,} training images in every class"
    return f"{counts[low]:,} ({classes[low]}) to {counts[high]:,} ({classes[high]}) training images a class"
