"""A look at every image before training: what cannot be read, what leaks from training into validation."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from coatnet.data.datasets import Dataset
from coatnet.data.decode import BadImage, complaint
from coatnet.data.loader import read_image
from coatnet.data.open import open_dataset
from coatnet.data.splits import Splits
from coatnet.errors import UserError

_LISTED = 20


@dataclass(frozen=True)
class Inspection:
    """What was found. Names are those of `Dataset.describe`; pairs are images with the same pixels."""

    splits: Splits
    bad: Mapping[str, str]
    warnings: Mapping[str, str]
    leaks: tuple[tuple[str, str], ...]
    contradictions: tuple[tuple[str, str], ...]
    num_repeated: int

    @property
    def healthy(self) -> bool:
        """No bad image, no warning, and nothing in validation that training has seen."""
        return not (self.bad or self.warnings or self.leaks)

    def describe(self) -> str:
        """The findings for people, one a line."""
        try:
            lines = [self.splits.describe()]
        except UserError:  # not one image can be read: the list below says so
            lines = [f"{self.splits.name}:"]
        complaints = [f"{name}: {text}" for name, text in self.warnings.items()]
        lines += _section("images cannot be used", [f"{name}: {reason}" for name, reason in self.bad.items()])
        lines += _section("images decode with a warning", complaints)
        lines += _section("images of validation are in training too", _equations(self.leaks))
        lines += _section("images have a twin with another label", _equations(self.contradictions))
        if self.num_repeated:
            lines.append(f"{self.num_repeated:,} training images repeat an earlier one")
        return "\n".join([*lines, "healthy" if self.healthy else "not healthy"])


def inspect(source: str | Path | Splits, strict: bool = False) -> Inspection:
    """Decode every image of both splits and compare their pixels.

    `strict` also reports what the JPEG library complains of but decodes, such as flipped bytes.

    Raises `UserError` if the source cannot be opened.
    """
    splits = source if isinstance(source, Splits) else open_dataset(source)
    bad: dict[str, str] = {}
    warnings: dict[str, str] = {}
    first_seen: dict[bytes, tuple[Dataset, int]] = {}
    leaks, contradictions = [], []
    num_repeated = 0
    for dataset in (splits.training, splits.validation):
        for index, digest in _digests(dataset, bad, warnings, strict):
            first, number = first_seen.setdefault(digest, (dataset, index))
            if first is dataset and number == index:
                continue
            pair = (first.describe(number), dataset.describe(index))
            num_repeated += dataset is splits.training
            if first is not dataset:
                leaks.append(pair)
            if not np.array_equal(first.labels[number], dataset.labels[index]):
                contradictions.append(pair)
    return Inspection(splits, bad, warnings, tuple(leaks), tuple(contradictions), num_repeated)


def _digests(
    dataset: Dataset, bad: dict[str, str], warnings: dict[str, str], strict: bool
) -> Iterator[tuple[int, bytes]]:
    """The number and a digest of the pixels of each image; the others go to `bad`."""
    for index in range(len(dataset)):
        try:
            image, _ = read_image(dataset, index)
            if strict and (text := complaint(dataset.read(index)[0])):
                warnings[dataset.describe(index)] = text
        except BadImage as error:
            bad[error.name] = error.reason
            continue
        pixels = image.numpy() if isinstance(image, torch.Tensor) else image
        size = str(pixels.shape).encode()
        yield index, hashlib.blake2b(pixels.tobytes(), digest_size=16, key=size).digest()


def _equations(pairs: tuple[tuple[str, str], ...]) -> list[str]:
    return [f"{one} = {other}" for one, other in pairs]


def _section(title: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = [f"  and {len(entries) - _LISTED:,} more"] if len(entries) > _LISTED else []
    return [f"{len(entries):,} {title}", *(f"  {entry}" for entry in entries[:_LISTED]), *more]
