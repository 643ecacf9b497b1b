"""Check every image of a source before training: unreadable ones, copies, sizes, and what gives a class away."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coatnet.data.datasets import Dataset, links_outside
from coatnet.data.decode import BadImage, jpeg_warning
from coatnet.data.loader import to_image
from coatnet.data.near_duplicates import Fingerprint, fingerprint, near_pairs, pixel_digest
from coatnet.data.open import open_dataset
from coatnet.data.shortcuts import Shortcut, find_shortcuts, properties_of
from coatnet.data.splits import Splits, Summary, is_gray, summary_of
from coatnet.data.transforms import as_images
from coatnet.errors import counted, cut, one_line, shorten
from coatnet.system.terminal import report_wait

MAX_LISTED = 20
Place = tuple[str, int]  # training, validation or test, and the number of the image in it
Pairs = Sequence[tuple[Place, Place]]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. Images have the names that `Dataset.describe` gives; `print(inspection)` lists them.

    Attributes:
        splits: the images that were inspected.
        bad: the reason for each image that cannot be used.
        warnings: the warning of the JPEG library for each image that has one (with `strict`).
        leaking: pairs of images with the same pixels in two splits, the one nearer to training first.
        contradictions: pairs of images with the same pixels and different labels.
        num_repeated: training images with the pixels of an earlier one.
        empty_classes: classes of which no training image can be used.
        num_measured: validation images that can be used.
        links_outside: images that are links out of the data's folder, and what they lead to. They are read for
            training and prediction, but not packed.
        summary: sizes and color of all images that can be used; None without any.
        near: pairs of images that are nearly the same, but not in every pixel; the earlier first.
        shortcuts: what gives a class away; nothing is looked for where images have several labels.
        left_out: why `rows` leaves out an image, by its place.
    """

    splits: Splits
    bad: Mapping[str, str]
    warnings: Mapping[str, str]
    leaking: tuple[tuple[Place, Place], ...]
    contradictions: tuple[tuple[str, str], ...]
    num_repeated: int
    empty_classes: tuple[str, ...] = ()
    num_measured: int = 1
    links_outside: tuple[tuple[str, str], ...] = ()
    summary: Summary | None = None
    near: tuple[tuple[Place, Place], ...] = ()
    shortcuts: tuple[Shortcut, ...] = ()
    left_out: Mapping[Place, str] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether there is no bad image, no warning and no leak."""
        return not (self.bad or self.warnings or self.leaking)

    def __str__(self) -> str:
        return self.describe()

    def name(self, place: Place) -> str:
        """The name of an image."""
        return self.splits.parts[place[0]].describe(place[1])

    def rows(self) -> list[Place]:
        """The images for a clean table, in order: all that can be used but copies, images that a split further from
        training has too or nearly, and copies under different labels."""
        places = [(split, index) for split, part in self.splits.parts.items() for index in range(len(part))]
        return [place for place in places if place not in self.left_out]

    @property
    def leaks(self) -> tuple[tuple[str, str], ...]:
        """Pairs of images with the same pixels in two splits, the one nearer to training first."""
        return self._named(self.leaking)

    @property
    def near_leaks(self) -> tuple[tuple[str, str], ...]:
        """Pairs that are nearly the same, in two splits, the one nearer to training first."""
        return self._named(self.near_leaking)

    @property
    def near_leaking(self) -> Pairs:
        """As `near_leaks`, by their places."""
        return [pair for pair in self.near if pair[0][0] != pair[1][0]]

    @property
    def near_contradictions(self) -> tuple[tuple[str, str], ...]:
        """Pairs that are nearly the same and have different labels."""
        return self._named([pair for pair in self.near if not _same_label(self.splits, *pair)])

    def _named(self, pairs: Pairs) -> tuple[tuple[str, str], ...]:
        return tuple((self.name(one), self.name(other)) for one, other in pairs)

    def describe(self) -> str:
        """The summary of the splits and the findings, one per line."""
        # Without one image that can be read, the list below says so.
        lines = [self.splits.describe(self.summary) if self.summary else one_line(f"{self.splits.name}:")]
        lines += _section("cannot be used", [f"{name}: {reason}" for name, reason in self.bad.items()])
        if self.bad:
            lines.append(self._consequence())
        lines += _section("decoded with a warning", [f"{name}: {text}" for name, text in self.warnings.items()])
        for pairs, what in ((self.leaking, "found in {} too"), (self.near_leaking, "nearly the same as one of {}")):
            for split, other in itertools.combinations(self.splits.parts, 2):
                those = self._named([pair for pair in pairs if (pair[0][0], pair[1][0]) == (split, other)])
                lines += _section(f"of {other} {what.format(split)}", _equations(those))
        if self.leaking or self.near_leaks:
            lines.append(
                "  a new training keeps copies with one label on one side, among up to 20,000 images"
                if self.splits.by_name
                else "  training uses them as they are, and the figures on held-out images are then too high; --write "
                "FILE leaves each in one split, the test if that has it, else validation"
            )
        lines += _section("with a duplicate of another label", _equations(self.contradictions))
        lines += _section("nearly the same as one of another label", _equations(self.near_contradictions))
        if self.num_repeated:
            lines.append(f"{counted(self.num_repeated, 'training image')} repeating an earlier one")
        if near := len({other for one, other in self.near if one[0] == other[0] == "training"}):
            lines.append(f"{counted(near, 'training image')} nearly repeating an earlier one")
        if self.contradictions or self.near_contradictions or self.num_repeated or near:
            lines.append("  training learns from each of them, so what is repeated counts more")
        for each in self.shortcuts:
            lines.append(
                f"{each.name} is told from all others by its {each.property} alone ({100 * each.accuracy:.0f} % "
                "balanced accuracy): a model may learn that, and fail where it does not hold"
            )
        lines += _section(
            "leading out of the data's folder", [f"{name} -> {file}" for name, file in self.links_outside]
        )
        return "\n".join([*map(cut, lines), "healthy" if self.healthy else "not healthy"])

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain values, all of them."""
        pairs = ("leaks", "contradictions", "near_leaks", "near_contradictions", "links_outside")
        return {
            "data": self.splits.name,
            "healthy": self.healthy,
            "images": {split: len(part) for split, part in self.splits.parts.items()},
            "classes": list(self.splits.classes),
            "training_images": dict(zip(self.splits.classes, map(int, self.splits.training.class_counts), strict=True)),
            "notes": list(self.splits.notes),
            "sizes": vars(self.summary) if self.summary else None,
            "bad": dict(self.bad),
            "warnings": dict(self.warnings),
            **{name: [list(pair) for pair in getattr(self, name)] for name in pairs},
            "near": [list(pair) for pair in self._named(self.near)],
            "repeated": self.num_repeated,
            "empty_classes": list(self.empty_classes),
            "shortcuts": [each._asdict() for each in self.shortcuts],
        }

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
    """Decode every image of all splits and compare their pixels.

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
    left_out: dict[Place, str] = {}
    first_of_split: dict[tuple[str, bytes], Place] = {}
    leaking, contradictions = [], []
    copies: dict[bytes, list[Place]] = {}  # of all splits, by their pixels
    num_repeated = 0
    learned: set[int] = set()  # classes of the training images that can be used
    measured: list[Place] = []  # the images that can be used, and what was measured of them
    properties, sizes, gray = [], [], True
    distinct: list[tuple[Place, bytes, Fingerprint]] = []  # of each split
    for split, dataset in splits.parts.items():
        for index, found in _measure(dataset, bad, warnings, strict):
            place = split, index
            if found is None:
                left_out[place] = "cannot be used"
                continue
            if split == "training":
                label = dataset.labels[index]
                learned.update(np.flatnonzero(label).tolist() if splits.multilabel else [int(label)])
            measured.append(place)
            properties.append(found.properties)
            sizes.append(found.size)
            gray &= found.gray
            copies.setdefault(found.digest, []).append(place)
            first = copies[found.digest][0]
            first_there = first_of_split.setdefault((split, found.digest), place)
            if first_there == place:
                distinct.append((place, found.digest, found.fingerprint))
            if first == place:
                continue
            num_repeated += split == "training"
            for other in splits.parts:
                if other != split and (there := first_of_split.get((other, found.digest))):
                    leaking.append((there, place))
                    left_out[there] = f"in {split} too"
            if first_there != place:
                left_out[place] = "a copy"
            if not _same_label(splits, first, place):
                contradictions.append((splits.parts[first[0]].describe(first[1]), dataset.describe(index)))
    for places in copies.values():
        if not all(_same_label(splits, places[0], place) for place in places[1:]):
            left_out |= dict.fromkeys(places, "a copy under another label")
    near = tuple(
        (distinct[one][0], distinct[other][0])
        for one, other in near_pairs([each for *_, each in distinct]).tolist()
        if distinct[one][1] != distinct[other][1]
    )
    left_out |= {one: f"nearly in {other[0]} too" for one, other in near if one[0] != other[0] and one not in left_out}
    shortcuts: list[Shortcut] = []
    if measured and not splits.multilabel:
        labels = np.array([int(splits.parts[split].label(index)) for split, index in measured])
        shortcuts = find_shortcuts(np.stack(properties), labels, splits.classes)
    return Inspection(
        splits,
        bad,
        warnings,
        tuple(leaking),
        tuple(contradictions),
        num_repeated,
        empty_classes=tuple(name for index, name in enumerate(splits.classes) if index not in learned),
        num_measured=sum(split == "validation" for split, _ in measured),
        links_outside=tuple(link for part in splits.parts.values() for link in links_outside(part)),
        summary=summary_of(sizes, gray=gray, complete=True) if sizes else None,
        near=near,
        shortcuts=tuple(shortcuts),
        left_out=left_out,
    )


class _ImageFacts(NamedTuple):
    """What is kept of an image that has been decoded."""

    digest: bytes  # of its pixels
    size: tuple[int, int]
    gray: bool
    properties: np.ndarray
    fingerprint: Fingerprint


def _measure(
    dataset: Dataset, bad: dict[str, str], warnings: dict[str, str], strict: bool
) -> Iterator[tuple[int, _ImageFacts | None]]:
    """Yield the index of each image and what is measured; None for one that cannot be read, which is added to `bad`."""
    for index in range(len(dataset)):
        try:
            encoded, _ = dataset.read(index)
            image = to_image(dataset, index, encoded)
            if strict and (text := jpeg_warning(encoded)):
                warnings[dataset.describe(index)] = text
        except BadImage as error:
            bad[error.name] = error.reason
            yield index, None
            continue
        pixels = as_images(image)  # (3 or 1, H, W)
        values = pixels.numpy()
        size, gray = (values.shape[1], values.shape[2]), len(values) == 1 or is_gray(values)
        yield index, _ImageFacts(pixel_digest(image), size, gray, properties_of(pixels), fingerprint(pixels))


def _same_label(splits: Splits, one: Place, other: Place) -> bool:
    first, second = (splits.parts[split].label(index) for split, index in (one, other))
    return np.array_equal(first, second)


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
