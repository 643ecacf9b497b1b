"""The training and validation images of one source, how they were split, and what they look like."""

import hashlib
import os
import unicodedata
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coatnet.data.datasets import Dataset, evenly_spaced
from coatnet.data.decode import BadImage, decode, image_size
from coatnet.errors import UserError, counted, cut, one_line
from coatnet.public_names import renamed_attribute

SMALL_IMAGE_PIXELS = 64  # up to this side an image keeps its own size, if it may, and is shifted, not cropped
NONE_TO_HOLD_OUT = "no class has two images, so all are measured"
SAMPLED_IMAGES = 200  # chosen: enough for a median, few enough for a slow disk
DECODED_PIXELS = 100_000_000  # of these images: about a second


@dataclass(frozen=True)
class Summary:
    """What a sample of the images looks like.

    Attributes:
        median: median height and median width, in pixels.
        smallest: (height, width) of the image with the smallest area.
        largest: (height, width) of the image with the largest area.
        gray: whether every image is without color.
        num_sampled: how many images were read.
    """

    median: tuple[int, int]
    smallest: tuple[int, int]
    largest: tuple[int, int]
    gray: bool
    num_sampled: int

    @property
    def uniform(self) -> bool:
        """Whether all images have the same size."""
        return self.smallest == self.largest


@dataclass(frozen=True)
class Splits:
    """Two datasets with the same classes in the same order. `print(splits)` summarizes them.

    Attributes:
        name: of the source, in messages and reports.
        training: the images to learn from.
        validation: the images to measure on.
        notes: what `open_dataset` noticed, such as how the images were split and which files were left out.
    """

    name: str
    training: Dataset
    validation: Dataset
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.training.classes

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.training.multilabel

    @cached_property
    def content(self) -> dict[str, dict[str, int | str]]:
        """The number of images of each split and a hash of their names within the data, the same wherever it lies."""
        found: dict[str, dict[str, int | str]] = {}
        for split, dataset in (("training", self.training), ("validation", self.validation)):
            hashed = hashlib.sha256()
            for part in dataset.content():
                hashed.update(part)
            found[split] = {"images": len(dataset), "sha256": hashed.hexdigest()}
        return found

    @cached_property
    def summary(self) -> Summary:
        """Sizes and color of a sample of the training images, or of validation without any; read when first used."""
        return summarize(self.training if len(self.training) else self.validation)

    @property
    def native_resolution(self) -> int:
        """The shorter side of the median training image, in pixels."""
        return min(self.summary.median)

    @property
    def gray(self) -> bool:
        """Whether every sampled training image is without color."""
        return self.summary.gray

    grey = renamed_attribute("grey", "gray", since="0.2", removed_in="0.3")

    def __str__(self) -> str:
        return self.describe()

    def describe(self, unusable: Container[str] = ()) -> str:
        """A summary of a few lines: number of images, split, sizes, classes, balance, notes.

        Args:
            unusable: names of images that are known to be unreadable, whose sizes do not count.
        """
        summary = summarize(self.training, unusable) if unusable else self.summary
        counts = self.training.class_counts
        num_images = len(self.training) + len(self.validation)
        kind = "several labels an image" if self.multilabel else "one label an image"
        shown = ", ".join(self.classes[:10])
        if len(self.classes) > 10:
            shown += f", ... ({len(self.classes) - 10} more)"
        lines = [
            f"{self.name}: {counted(num_images, 'image')}, {counted(len(self.classes), 'class')}, {kind}",
            f"  split    {len(self.training):,} for training, {len(self.validation):,} for validation",
            f"  images   {_describe_sizes(summary)}, {'gray' if summary.gray else 'color'}",
            f"  classes  {shown}",
            f"  balance  {_describe_balance(self.classes, counts)}",
        ]
        return "\n".join(cut(one_line(line)) for line in lines + [f"  note     {note}" for note in self.notes])


def summarize(dataset: Dataset, unusable: Container[str] = ()) -> Summary:
    """Read up to 200 images, evenly spread, and summarize their sizes and color; unreadable ones are skipped.

    These are the images named in `unusable` and those that do not decode. Of large ones only the first are decoded, up
    to 100 million pixels; then the header decides.

    Raises:
        UserError: none can be read; the message has the last reason.
    """
    indices = evenly_spaced(len(dataset), SAMPLED_IMAGES)
    sizes: list[tuple[int, int]] = []
    gray, decoded = True, 0
    failure = None
    for index in indices:
        try:
            if unusable and (name := dataset.describe(index)) in unusable:
                raise BadImage(name, "unreadable")
            encoded, _ = dataset.read(index)
            if isinstance(encoded, bytes):
                size = image_size(encoded, dataset.describe(index))
                if gray or not sizes or decoded < DECODED_PIXELS:
                    decoded += size[0] * size[1]
                    gray &= _is_gray(decode(encoded, dataset.describe(index)).numpy())
            else:
                size = encoded.shape[:2]
                gray &= encoded.ndim == 2
            sizes.append(size)
        except BadImage as bad:
            failure = bad
    if not sizes:
        raise UserError(f"{dataset.name}: none of {len(indices)} sampled images can be used, the last one {failure}")
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    heights, widths = np.sort(np.array(sizes), axis=0).T
    median = int(heights[len(heights) // 2]), int(widths[len(widths) // 2])
    return Summary(median, by_area[0], by_area[-1], gray, len(sizes))


def choose_validation(names: Sequence[str], labels: NDArray, fraction: float) -> NDArray[np.bool_]:
    """Choose which images to hold out, class by class, by the hash of each image's name.

    The choice for an image depends on its own name alone, so adding images moves no others, except that every class
    of two images or more has at least one on each side.

    Args:
        names: of the images, N.
        labels: class indices (N,). Multi-label images (N, K) are one group.
        fraction: of the images to hold out.

    Returns:
        A mask (N,), True for the images that are held out.
    """
    hashes = np.array([_name_hash(name) for name in names])
    held_out = hashes < fraction
    groups = labels if labels.ndim == 1 else np.zeros(len(names), dtype=np.int64)
    by_hash = np.lexsort((hashes, groups))  # group by group, in each of them by the hash
    first = np.flatnonzero(np.diff(groups[by_hash], prepend=-1))
    last = np.flatnonzero(np.diff(groups[by_hash], append=-1))
    held_out[by_hash[first]] = True
    held_out[by_hash[last]] = False  # a lone image is both
    return held_out


def _name_hash(name: str) -> float:
    # macOS writes accents decomposed, Linux composed: the same folder must split the same way on both.
    name_bytes = os.fsencode(unicodedata.normalize("NFC", name))
    return int.from_bytes(hashlib.blake2b(name_bytes, digest_size=8).digest(), "big") / 2**64


def _is_gray(pixels: NDArray[np.uint8]) -> bool:
    return bool((pixels[0] == pixels[1]).all() and (pixels[1] == pixels[2]).all())


def _describe_sizes(summary: Summary) -> str:
    (height, width), small, large = summary.median, summary.smallest, summary.largest
    if summary.uniform:
        return f"{width} x {height} pixels"
    spread = f"from {small[1]} x {small[0]} to {large[1]} x {large[0]}"
    return f"{width} x {height} pixels in the median, {spread} (of {summary.num_sampled} sampled)"


def _describe_balance(classes: tuple[str, ...], counts: NDArray[np.int64]) -> str:
    low, high = int(counts.argmin()), int(counts.argmax())
    if counts[low] == counts[high]:
        return f"{counts[low]:,} training images in every class"
    return f"{counts[low]:,} ({classes[low]}) to {counts[high]:,} ({classes[high]}) training images a class"
