"""The training and validation images of one source, how they were split, and what they look like."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from coatnet.data.channels import read_pixels, with_scale
from coatnet.data.datasets import ArrayDataset, Dataset, FileDataset, evenly_spaced, select
from coatnet.data.decode import BadImage, Scale, image_size
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
        complete: whether these are all that can be used.
    """

    median: tuple[int, int]
    smallest: tuple[int, int]
    largest: tuple[int, int]
    gray: bool
    num_sampled: int
    complete: bool = False

    @property
    def uniform(self) -> bool:
        """Whether all images have the same size."""
        return self.smallest == self.largest


@dataclass(frozen=True)
class SplitRule:
    """Which images are held out where the source does not say so; the fields are those of a recipe.

    Attributes:
        validation_fraction: of the images, by the hash of their names.
        test_fraction: of the images, for a test split, by another hash of their names.
        fold: instead of a fraction, `2/5` is the second of five folds; empty for none.
        kept_together: names of images that fall on one side, group by group.
        training_images: of the images to learn from, as many of each class; 0 for all.
        seed: which ones these are.
    """

    validation_fraction: float = 0.1
    test_fraction: float = 0.0
    fold: str = ""
    kept_together: Sequence[Sequence[str]] = ()
    training_images: int = 0
    seed: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The rule of a recipe's values, of which those of an earlier release are fewer."""
        return cls(**{each.name: values[each.name] for each in fields(cls) if values.get(each.name) is not None})

    def holds_out_as(self, other: "SplitRule") -> bool:
        """Whether another rule holds out the same images, but for what is kept together."""
        parts = ("validation_fraction", "test_fraction", "fold")
        return all(getattr(self, part) == getattr(other, part) for part in parts)

    def check(self) -> None:
        """Raise UserError unless both fractions leave images to learn from."""
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction!r}")
        if not 0 <= self.test_fraction < 1 - self.validation_fraction:
            raise UserError(
                "test_fraction must be 0 or more and leave images to learn from beside validation_fraction "
                f"{self.validation_fraction:g}, got {self.test_fraction!r}"
            )


@dataclass(frozen=True)
class Splits:
    """Two datasets with the same classes in the same order. `print(splits)` summarizes them.

    Attributes:
        name: of the source, in messages and reports.
        training: the images to learn from.
        validation: the images to measure on.
        notes: what `open_dataset` noticed, such as how the images were split and which files were left out.
        by_name: whether the validation images were chosen by the hash of their names.
        test: images that are measured once, at the end of a training; None without any.
    """

    name: str
    training: Dataset
    validation: Dataset
    notes: tuple[str, ...] = ()
    by_name: bool = False
    test: Dataset | None = None

    def __post_init__(self) -> None:
        """Raises UserError if two classes have one name: a bundle refuses them after the training."""
        for name, count in Counter(self.classes).items():
            if count > 1:
                raise UserError(f"{self.name}: class {name!r} is named twice")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.training.classes

    @property
    def parts(self) -> dict[str, Dataset]:
        """The datasets by name, `training` and `validation`, and `test` where there is one."""
        parts = {"training": self.training, "validation": self.validation, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

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

    def with_scale(self, scale: Scale | None) -> "Splits":
        """The same images, read as levels of a scale, or as 8-bit RGB without one."""
        parts = {name: with_scale(part, scale) for name, part in self.parts.items()}
        return self if all(getattr(self, name) is part for name, part in parts.items()) else replace(self, **parts)

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

    def describe(self, summary: Summary | None = None) -> str:
        """A summary of a few lines: number of images, split, sizes, classes, balance, notes.

        Args:
            summary: what the images look like, if more of them have been read than a sample.
        """
        summary = summary or self.summary
        counts = self.training.class_counts
        num_images = len(self.training) + len(self.validation)
        kind = "several labels per image" if self.multilabel else "one label per image"
        shown = ", ".join(self.classes[:10])
        if len(self.classes) > 10:
            shown += f", ... ({len(self.classes) - 10} more)"
        lines = [
            f"{self.name}: {counted(num_images, 'image')}, {counted(len(self.classes), 'class')}, {kind}",
            f"  split    {len(self.training):,} for training, {len(self.validation):,} for validation"
            + (f", {len(self.test):,} for the test at the end" if self.test is not None else ""),
            f"  images   {_describe_sizes(summary)}, {self._describe_values(summary)}",
            f"  classes  {shown}",
            f"  balance  {_describe_balance(self.classes, counts)}",
        ]
        return "\n".join(cut(one_line(line)) for line in lines + [f"  note     {note}" for note in self.notes])

    def _describe_values(self, summary: Summary) -> str:
        scale: Scale | None = getattr(self.training, "scale", None)
        if scale is None:
            return "gray" if summary.gray else "color"
        return f"{counted(scale.channels, 'channel')}, values from {scale.low:g} to {scale.high:g}"


def summarize(dataset: Dataset) -> Summary:
    """Read up to 200 images, evenly spread, and summarize their sizes and color; unreadable ones are skipped.

    Of large ones only the first are decoded, up to 100 million pixels; then the header decides.

    Raises:
        UserError: none can be read; the message has the last reason.
    """
    indices = evenly_spaced(len(dataset), SAMPLED_IMAGES)
    sizes: list[tuple[int, int]] = []
    gray, decoded = True, 0
    failure = None
    for index in indices:
        try:
            encoded, _ = dataset.read(index)
            if isinstance(encoded, bytes):
                size = image_size(encoded, dataset.describe(index))
                if gray or not sizes or decoded < DECODED_PIXELS:
                    decoded += size[0] * size[1]
                    gray &= is_gray(
                        read_pixels(encoded, dataset.describe(index), getattr(dataset, "scale", None)).numpy()
                    )
            else:
                size = encoded.shape[:2]
                gray &= encoded.ndim == 2
            sizes.append(size)
        except BadImage as bad:
            failure = bad
    if not sizes:
        raise UserError(f"{dataset.name}: none of {len(indices)} sampled images can be used, the last one {failure}")
    return summary_of(sizes, gray=gray)


def summary_of(sizes: Sequence[tuple[int, int]], *, gray: bool, complete: bool = False) -> Summary:
    """The summary of images of these heights and widths."""
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    heights, widths = np.sort(np.array(sizes), axis=0).T
    median = int(heights[len(heights) // 2]), int(widths[len(widths) // 2])
    return Summary(median, by_area[0], by_area[-1], gray, len(sizes), complete)


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


def divide(splits: Splits, rule: SplitRule, *, evaluation: bool = False) -> Splits:
    """Divide images that were held out by their names as a rule says beyond its fraction.

    A group that is kept together counts as its first image. The test split is chosen before the others.

    Args:
        evaluation: the rule is that of a training, perhaps on other images, which may have a split of their own.

    Raises:
        UserError: the source says itself which images are held out, the fold is not valid, or there are fewer images to
            learn from than asked for.
    """
    divided = _divide(splits, rule, evaluation=evaluation)
    if not rule.training_images or evaluation:
        return divided
    training, n = divided.training, rule.training_images
    few = select((training,), choose_few(divided, n, rule.seed))
    return replace(divided, training=few, notes=(*divided.notes, f"{n:,} of {len(training):,} images to learn from"))


def choose_few(splits: Splits, n: int, seed: int) -> NDArray[np.bool_]:
    """Choose n of the images to learn from, as many of each class: a mask (N,), True for these.

    Raises:
        UserError: the source does not tell its labels in advance, has fewer images, or a class would have none.
    """
    training = splits.training
    if not isinstance(training, ArrayDataset | FileDataset):
        raise UserError(f"training_images is for images in folders, tables and arrays, not for {splits.name}")
    if n > len(training):
        raise UserError(f"training_images is {n:,}, but {splits.name} has {len(training):,} to learn from")
    chosen = np.zeros(len(training), bool)
    chosen[choose_training(training.labels, seed)[:n]] = True
    labels = training.labels[chosen]
    counts = labels.sum(axis=0) if training.multilabel else np.bincount(labels, minlength=len(training.classes))
    if empty := int((counts == 0).sum() - (training.class_counts == 0).sum()):
        raise UserError(
            f"training_images is {n:,}, which leaves {counted(empty, 'class')} without any: give "
            f"{len(training.classes):,} or more"
        )
    return chosen


def keep_rare_labels(
    labels: NDArray, heads: NDArray[np.int64], test: NDArray[np.bool_], held_out: NDArray[np.bool_]
) -> None:
    """Give back to training, in place, the first image of each label that has no other there, with its copies."""
    known = labels[~(test | held_out)].any(axis=0)
    for row in np.flatnonzero(test | held_out):
        if (labels[row].astype(bool) & ~known).any():
            copies = heads == heads[row]
            test[copies] = held_out[copies] = False
            known |= labels[copies].any(axis=0)


def _divide(splits: Splits, rule: SplitRule, *, evaluation: bool) -> Splits:
    if not (rule.test_fraction or rule.fold or rule.kept_together):
        return splits
    if not splits.by_name:
        asked = "fold" * bool(rule.fold) or "test_fraction" * bool(rule.test_fraction)
        if asked and not evaluation:
            raise UserError(
                f"{splits.name} is divided already, which {asked} would change: give the images without a split (one "
                f"folder for each class, a table without a column split; of shards, what was packed), or leave {asked} "
                "out"
            )
        return splits
    parts = (splits.training, splits.validation)
    keys = np.array([part.key(index) for part in parts for index in range(len(part))], dtype=object)
    labels = np.concatenate([part.labels for part in parts])
    places = {part.describe(index): row for row, (part, index) in enumerate(_every(parts))}
    first: dict[str, int] = {}  # a table may name an image twice
    heads = np.array([first.setdefault(key, row) for row, key in enumerate(keys)])  # who decides for the image
    for group in rule.kept_together:
        if present := [places[name] for name in group if name in places]:
            heads[np.isin(heads, heads[present])] = heads[present[0]]
    units = np.unique(heads)
    test = np.zeros(len(keys), bool)
    if rule.test_fraction:
        salted = [f"test:{keys[row]}" for row in units]
        test[units] = choose_validation(salted, labels[units], rule.test_fraction)
        units = units[~test[units]]
    held_out = np.zeros(len(keys), bool)
    if rule.fold:
        number, _, count = rule.fold.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) >= 2):
            raise UserError(f"fold {rule.fold!r:.40} is not valid: write 2/5 for the second of five folds")
        if int(count) > len(units) and not evaluation:
            raise UserError(f"fold {rule.fold!r:.40} of {counted(len(units), 'image')}: some folds would be empty")
        held_out[units] = assign_folds(keys[units].tolist(), labels[units], int(count)) == int(number) - 1
        notes = [f"held out fold {rule.fold} by the hash of the name, as many of each class in every fold"]
    else:
        held_out[units] = choose_validation(keys[units].tolist(), labels[units], rule.validation_fraction)
        notes = [note for note in splits.notes if note.startswith("held out")]
    test, held_out = test[heads], held_out[heads]
    if labels.ndim == 2 and not rule.fold:
        keep_rare_labels(labels, heads, test, held_out)
    if rule.kept_together:
        notes.append(f"copies and near copies on one side of the split: {counted(len(rule.kept_together), 'group')}")
    return replace(
        splits,
        training=select(parts, ~(test | held_out)),
        validation=select(parts, held_out),
        test=select(parts, test) if rule.test_fraction else None,
        notes=(*notes, *(note for note in splits.notes if not note.startswith("held out"))),
    )


def choose_training(labels: NDArray, seed: int) -> NDArray[np.int64]:
    """An order of images, any beginning of which has as many of each class, give or take one, until a class ends.

    Args:
        labels: class indices (N,). Multi-label images (N, K) are one group.
        seed: another seed is another order.

    Returns:
        The images' places, (N,).
    """
    groups = labels if labels.ndim == 1 else np.zeros(len(labels), dtype=np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    by_class = shuffled[np.argsort(groups[shuffled], kind="stable")]
    starts = np.flatnonzero(np.diff(groups[by_class], prepend=-1))
    sizes = np.diff(starts, append=len(groups))
    turns = np.empty(len(groups), dtype=np.int64)  # in which round of all classes the image comes
    turns[by_class] = np.arange(len(groups)) - np.repeat(starts, sizes)
    return np.lexsort((groups, turns))


def _every(parts: Sequence[Dataset]) -> Iterator[tuple[Dataset, int]]:
    return ((part, index) for part in parts for index in range(len(part)))


def assign_folds(names: Sequence[str], labels: NDArray, num_folds: int) -> NDArray[np.int64]:
    """The fold of each image, (N,), by the hash of its name: as many of a class in each, give or take one.

    Args:
        names: of the images, N.
        labels: class indices (N,). Multi-label images (N, K) are one group.
        num_folds: number of folds.
    """
    hashes = np.array([_name_hash(name) for name in names])
    groups = labels if labels.ndim == 1 else np.zeros(len(names), dtype=np.int64)
    folds = np.empty(len(names), dtype=np.int64)
    folds[np.lexsort((hashes, groups))] = np.arange(len(names)) % num_folds
    return folds


def _name_hash(name: str) -> float:
    # macOS writes accents decomposed, Linux composed: the same folder must split the same way on both.
    name_bytes = os.fsencode(unicodedata.normalize("NFC", name))
    return int.from_bytes(hashlib.blake2b(name_bytes, digest_size=8).digest(), "big") / 2**64


def is_gray(pixels: NDArray[np.uint8]) -> bool:
    """Whether the channels of an image (C, H, W) are equal."""
    return all(bool((pixels[0] == other).all()) for other in pixels[1:])


def _describe_sizes(summary: Summary) -> str:
    (height, width), small, large = summary.median, summary.smallest, summary.largest
    if summary.uniform:
        return f"{width} x {height} pixels"
    spread = f"from {small[1]} x {small[0]} to {large[1]} x {large[0]}"
    read = f"all {summary.num_sampled:,}" if summary.complete else f"of {summary.num_sampled} sampled"
    return f"{width} x {height} pixels in the median, {spread} ({read})"


def _describe_balance(classes: tuple[str, ...], counts: NDArray[np.int64]) -> str:
    low, high = int(counts.argmin()), int(counts.argmax())
    if counts[low] == counts[high]:
        return f"{counts[low]:,} training images in every class"
    return f"{counts[low]:,} ({classes[low]}) to {counts[high]:,} ({classes[high]}) training images a class"
