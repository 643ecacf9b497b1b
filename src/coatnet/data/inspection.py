"""Check every image of a source before training: unreadable ones, duplicates between training and validation."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from coatnet.data.datasets import Dataset, links_outside
from coatnet.data.decode import BadImage, jpeg_warning
from coatnet.data.loader import read_image
from coatnet.data.open import open_dataset
from coatnet.data.splits import Splits
from coatnet.data.transforms import Image
from coatnet.errors import UserError, counted, cut, one_line, shorten
from coatnet.system.terminal import report_wait

MAX_LISTED = 20


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. Images have the names that `Dataset.describe` gives; `print(inspection)` lists them.

    Attributes:
        splits: the images that were inspected.
        bad: the reason for each image that cannot be used.
        warnings: the warning of the JPEG library for each image that has one (with `strict`).
        leaks: pairs of images with the same pixels, one in training and one in validation.
        contradictions: pairs of images with the same pixels and different labels.
        num_repeated: training images with the pixels of an earlier one.
        empty_classes: classes of which no training image can be used.
        num_measured: validation images that can be used.
        links_outside: images that are links out of the data's folder, and what they lead to. They are read for
            training and prediction, but not packed.
    """

    splits: Splits
    bad: Mapping[str, str]
    warnings: Mapping[str, str]
    leaks: tuple[tuple[str, str], ...]
    contradictions: tuple[tuple[str, str], ...]
    num_repeated: int
    empty_classes: tuple[str, ...] = ()
    num_measured: int = 1
    links_outside: tuple[tuple[str, str], ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether there is no bad image, no warning and no leak."""
        return not (self.bad or self.warnings or self.leaks)

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """The summary of the splits and the findings, one per line."""
        try:
            lines = [self.splits.describe(self.bad)]
        except UserError:  # not one image can be read: the list below says so
            lines = [one_line(f"{self.splits.name}:")]
        lines += _section("cannot be used", [f"{name}: {reason}" for name, reason in self.bad.items()])
        if self.bad:
            lines.append(self._consequence())
        lines += _section("decoded with a warning", [f"{name}: {text}" for name, text in self.warnings.items()])
        lines += _section("of validation found in training too", _equations(self.leaks))
        lines += _section("with a duplicate of another label", _equations(self.contradictions))
        if self.num_repeated:
            lines.append(f"{counted(self.num_repeated, 'training image')} repeating an earlier one")
        lines += _section(
            "leading out of the data's folder", [f"{name} -> {file}" for name, file in self.links_outside]
        )
        return "\n".join([*lines, "healthy" if self.healthy else "not healthy"])

    def _consequence(self) -> str:
        """What a training does about the bad images."""
        if len(self.empty_classes) == len(self.splits.classes) or not self.num_measured:
            part = "validation" if not self.num_measured else "training"
            return f"  no {part} image can be used, so training is refused"
        text = (
            "  training uses others in their place, evaluation leaves them out; --bad_image_budget limits their number"
        )
        if self.empty_classes:
            text += f"; nothing is learned of {shorten(self.empty_classes)}"
        return text


@report_wait("reading every image")
def inspect(source: str | Path | Splits, strict: bool = False) -> Inspection:
    """Decode every image of both splits and compare their pixels.

    Args:
        source: a source as `open_dataset` takes it, or splits.
        strict: also report warnings of the JPEG library about images that it decodes, such as flipped bytes.

    Returns:
        The findings; `inspection.healthy` says whether there is nothing to mend.

    Raises:
        UserError: the source cannot be opened.
    """
    splits = source if isinstance(source, Splits) else open_dataset(source)
    bad: dict[str, str] = {}
    warnings: dict[str, str] = {}
    first_seen: dict[bytes, tuple[Dataset, int]] = {}
    leaks, contradictions = [], []
    num_repeated = 0
    learned: set[int] = set()  # classes of the training images that can be used
    num_measured = 0  # validation images that can be used
    for dataset in (splits.training, splits.validation):
        for index, digest in _digests(dataset, bad, warnings, strict):
            if dataset is splits.training:
                label = dataset.labels[index]
                learned.update(np.flatnonzero(label).tolist() if splits.multilabel else [int(label)])
            else:
                num_measured += 1
            first, number = first_seen.setdefault(digest, (dataset, index))
            if first is dataset and number == index:
                continue
            pair = (first.describe(number), dataset.describe(index))
            num_repeated += dataset is splits.training
            if first is not dataset:
                leaks.append(pair)
            if not np.array_equal(first.label(number), dataset.label(index)):
                contradictions.append(pair)
    empty = tuple(name for index, name in enumerate(splits.classes) if index not in learned)
    outside = tuple(link for dataset in (splits.training, splits.validation) for link in links_outside(dataset))
    return Inspection(
        splits, bad, warnings, tuple(leaks), tuple(contradictions), num_repeated, empty, num_measured, outside
    )


def _digests(
    dataset: Dataset, bad: dict[str, str], warnings: dict[str, str], strict: bool
) -> Iterator[tuple[int, bytes]]:
    """Yield the index and a digest of the pixels of each good image; the others are added to `bad`."""
    for index in range(len(dataset)):
        try:
            image, _ = read_image(dataset, index)
            if strict and (text := jpeg_warning(dataset.read(index)[0])):
                warnings[dataset.describe(index)] = text
        except BadImage as error:
            bad[error.name] = error.reason
            continue
        yield index, pixel_digest(image)


def pixel_digest(image: Image) -> bytes:
    """A digest that two images share if their pixels and shapes are equal: tensor (3, H, W) or array of uint8."""
    pixels = image.numpy() if isinstance(image, torch.Tensor) else image
    shape = str(pixels.shape).encode()
    return hashlib.blake2b(pixels.tobytes(), digest_size=16, key=shape).digest()


def _equations(pairs: tuple[tuple[str, str], ...]) -> list[str]:
    return [f"{one} = {other}" for one, other in pairs]


def _section(what: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = [f"  and {len(entries) - MAX_LISTED:,} more"] if len(entries) > MAX_LISTED else []
    return [
        f"{counted(len(entries), 'image')} {what}",
        *(f"  {cut(one_line(entry))}" for entry in entries[:MAX_LISTED]),
        *more,
    ]
