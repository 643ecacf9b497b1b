"""The prediction for each image of an evaluation: kept as a table, compared by groups and with the training images."""

import csv
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from coatnet.data.datasets import Dataset
from coatnet.data.decode import BadImage
from coatnet.data.loader import InspectImages, read_image
from coatnet.data.near_duplicates import Fingerprint, fingerprint, fingerprints, near_pairs, pixel_digest
from coatnet.data.transforms import Image, as_images
from coatnet.errors import UserError
from coatnet.evaluation.metrics import Interval, wilson_interval
from coatnet.system.files import MAX_LOG_BYTES, read_regular
from coatnet.system.hardware import num_cores

PROBABILITIES = "probabilities.npy"  # beside a report
HEADER = ("image", "truth", "predicted", "probability", "nll")
MAX_FILES_READ = 20_000  # chosen: a minute of decoding photographs; more are left to `coatnet doctor`
MIN_SLICED_IMAGES = 30  # chosen: a third of fewer says nothing
MAX_PROBABILITIES = 50_000_000  # chosen: 200 MB beside a report
MAX_FOLDERS = 12  # chosen: more slices make every interval wider
READ_TOGETHER = 1000  # images in memory
EXAMPLES_IN_A_CELL, MAX_EXAMPLES = 8, 800  # chosen: of 96 pixels, a few MB


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model predicted for N images, in the order of the data.

    Attributes:
        images: their names within the data.
        truth: their class; several labels are joined by ";".
        predicted: the class that is predicted, likewise.
        probability: of the prediction (N,); of the least certain decision where an image may have several labels.
        nll: negative log-likelihood (N,).
        probabilities: of each class (N, K), by which images are ranked; None where an image has one label.
    """

    images: tuple[str, ...]
    truth: tuple[str, ...]
    predicted: tuple[str, ...]
    probability: np.ndarray
    nll: np.ndarray
    probabilities: np.ndarray | None = None

    @property
    def correct(self) -> np.ndarray:
        """Whether each is right, (N,) of bool."""
        return np.array([truth == predicted for truth, predicted in zip(self.truth, self.predicted, strict=True)], bool)

    def to_csv(self) -> str:
        """The table as text, with the columns of `HEADER`."""
        text = io.StringIO(newline="")
        rows = csv.writer(text)  # with "\n" alone, Python 3.11 does not quote the "\r" of a name
        rows.writerow(HEADER)
        numbers = ([f"{value:.6g}" for value in column] for column in (self.probability, self.nll))
        rows.writerows(zip(self.images, self.truth, self.predicted, *numbers, strict=True))
        return text.getvalue()


def read_predictions(path: Path) -> Predictions:
    """Read the table that `Predictions.to_csv` wrote.

    Raises UserError if it is another, OSError if it cannot be read.
    """
    text = read_regular(path, MAX_LOG_BYTES).decode(errors="replace")
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        if tuple(header) != HEADER:
            raise ValueError
        images, truth, predicted, *numbers = zip(*rows, strict=True)
        probability, nll = (np.array(column, dtype=float) for column in numbers)
    except (ValueError, csv.Error):
        raise UserError(f"{path} is damaged: it is not a table with the columns {', '.join(HEADER)}") from None
    return Predictions(images, truth, predicted, probability, nll)


def read_array(path: Path, shape: tuple[int, int], dtype: type[np.floating]) -> np.ndarray | None:
    """The array in an .npy file, mapped into memory; None if it holds none of this shape and type."""
    if not path.is_file():  # opening a pipe would wait
        return None
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, OverflowError):
        return None
    return found if found.shape == shape and found.dtype == dtype else None


@dataclass(frozen=True)
class Slice:
    """How a group of the images fares.

    Attributes:
        kind: what divides the images: image size, brightness or folder.
        name: of the group.
        count: number of its images.
        accuracy: fraction of them that is right (all labels, where an image may have several).
        interval: of the accuracy; all intervals of a report hold at once with 95 % (Bonferroni).
    """

    kind: str
    name: str
    count: int
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Duplicates:
    """Measured images whose pixels stand in the training images as well.

    Attributes:
        count: number of such images.
        others: number of the other measured images, without near copies.
        accuracy: fraction of the others that is right, None without any.
        interval: its 95 % interval.
        near: number of further images that are nearly the same as a training image; None where not looked for.
    """

    count: int
    others: int
    accuracy: float | None
    interval: Interval | None
    near: int | None = None


class ImageProperties(NamedTuple):
    """What is seen of an image without a model: a digest of its pixels, its size, its mean from 0 (black) to 1, and by
    what near copies are found, if they are looked for."""

    digest: bytes
    height: int
    width: int
    brightness: float
    fingerprint: Fingerprint | None = None


def image_properties(images: Sequence[Image] | np.ndarray, *, near: bool = True) -> list[ImageProperties]:
    """Properties of images, or of an array of images of one size; with `near`, their fingerprints as well."""
    marks: Iterable[Fingerprint | None] = [None] * len(images)
    if isinstance(images, np.ndarray):
        pixels = as_images(images)  # (B, 3 or 1, H, W)
        marks = fingerprints(pixels) if near else marks
    else:
        pixels = [as_images(each) for each in images]
        marks = map(fingerprint, pixels) if near else marks
    return [
        ImageProperties(pixel_digest(image), each.shape[1], each.shape[2], float(each.numpy().mean()) / 255, mark)
        for image, each, mark in zip(images, pixels, marks, strict=True)
    ]


def read_properties(dataset: Dataset, *, near: bool = True) -> list[ImageProperties | None]:
    """Decode and look at all images; None for one that cannot be read."""

    def read(index: int) -> ImageProperties | None:
        try:
            return image_properties([read_image(dataset, index)[0]], near=near)[0]
        except BadImage:
            return None

    if dataset.in_memory:
        parts = np.array_split(np.arange(len(dataset)), max(1, -(-len(dataset) // READ_TOGETHER)))
        return [each for part in parts for each in image_properties(dataset.read_batch(part)[0], near=near)]
    if not dataset.thread_safe:
        return list(map(read, range(len(dataset))))
    with ThreadPoolExecutor(num_cores()) as pool:
        return list(pool.map(read, range(len(dataset))))


def choose_properties(datasets: Sequence[Dataset], training: Dataset | None) -> InspectImages | None:
    """How to find the properties of images that are measured, which takes time: None where they are too many."""
    if not few_enough(*datasets):
        return None
    every = [*datasets, training] if training is not None else []
    return partial(image_properties, near=0 < sum(map(len, every)) <= MAX_FILES_READ)


def few_enough(*datasets: Dataset) -> bool:
    """Whether reading all of these images once more takes little time beside their evaluation."""
    return sum(len(dataset) for dataset in datasets if not dataset.in_memory) <= MAX_FILES_READ


def find_duplicates(
    correct: np.ndarray,
    properties: Sequence[ImageProperties],
    training: Dataset,
    training_properties: Sequence[ImageProperties] = (),
) -> Duplicates | None:
    """Compare measured images, whether they are right (N,) and what they look like, with those of the training, which
    are read if they have not been; None without any. Near copies are looked for if the images have fingerprints."""
    if not len(training):
        return None
    near = properties[0].fingerprint is not None
    learned = {
        each.digest: each.fingerprint for each in training_properties or read_properties(training, near=near) if each
    }
    copied = np.array([each.digest in learned for each in properties])
    close = np.zeros(len(properties), bool)
    if near:
        others = {each.digest: each.fingerprint for each in properties if each.digest not in learned}
        marks = [each for each in (*learned.values(), *others.values()) if each is not None]
        digests = np.array([*learned, *others], dtype=object)
        found = set(digests[near_pairs(marks, between=len(learned))[:, 1]])
        close = np.array([each.digest in found for each in properties])
    rest = correct[~(copied | close)]
    right = int(rest.sum())
    measured = (right / len(rest), wilson_interval(right, len(rest))) if len(rest) else (None, None)
    return Duplicates(int(copied.sum()), len(rest), *measured, near=int(close.sum()) if near else None)


def find_slices(predictions: Predictions, properties: Sequence[ImageProperties]) -> tuple[Slice, ...]:
    """Accuracy by image size, brightness and folder, where the images differ in it."""
    correct = predictions.correct
    if len(correct) < MIN_SLICED_IMAGES:
        return ()
    sides = np.array([math.sqrt(each.height * each.width) for each in properties])
    lights = np.array([100 * each.brightness for each in properties])
    groups = [
        *(("image size", *group) for group in _thirds(sides, "pixels")),
        *(("brightness", *group) for group in _thirds(lights, "% of white")),
        *(("folder", *group) for group in _folders(predictions)),
    ]
    level = NormalDist().inv_cdf(1 - 0.05 / (2 * max(1, len(groups))))
    return tuple(
        Slice(kind, name, int(mask.sum()), float(correct[mask].mean()),
              wilson_interval(int(correct[mask].sum()), int(mask.sum()), level))
        for kind, name, mask in groups
    )  # fmt: skip


def _thirds(values: np.ndarray, unit: str) -> Iterator[tuple[str, np.ndarray]]:
    """Three groups of about equal number, by name; of values that are almost all equal none."""
    low, high = (float(f"{bound:.3g}") for bound in np.quantile(values, (1 / 3, 2 / 3)))
    groups = {
        f"up to {low:g} {unit}": values <= low,
        f"{low:g} to {high:g} {unit}": (low < values) & (values <= high),
        f"above {high:g} {unit}": (low < values) & (high < values),
    }
    if sum(mask.any() for mask in groups.values()) > 1:
        yield from ((name, mask) for name, mask in groups.items() if mask.any())


def _folders(predictions: Predictions) -> Iterator[tuple[str, np.ndarray]]:
    """The most frequent folders that the images come from, the folder of their class apart."""
    paths = [PurePosixPath(image).parent.parts for image in predictions.images]
    names = [
        "/".join(part for part in path if part != truth) for path, truth in zip(paths, predictions.truth, strict=True)
    ]
    found = Counter(names)
    if len(found) > 1:
        kept = [name for name, _ in found.most_common(MAX_FOLDERS if len(found) <= MAX_FOLDERS else MAX_FOLDERS - 1)]
        groups = np.array([kept.index(name) if name in kept else len(kept) for name in names])
        titles = [name or "(none)" for name in kept] + [f"{len(found) - len(kept):,} other folders"]
        yield from ((title, groups == number) for number, title in enumerate(titles) if (groups == number).any())


def find_suspects(predictions: Predictions) -> list[int]:
    """Numbers of the images whose label looks wrong, the least probable label first, by confident learning (Northcutt
    et al., 2021): another class is predicted, as surely as images of that class are of it on average."""
    truth, predicted = np.array(predictions.truth, dtype=object), np.array(predictions.predicted, dtype=object)
    given = np.exp(-predictions.nll)
    usual = {name: given[truth == name].mean() for name in set(predictions.truth)}
    limits = np.array([usual.get(name, np.inf) for name in predictions.predicted])
    found = np.flatnonzero((truth != predicted) & (predictions.probability >= limits))
    return found[np.argsort(given[found], kind="stable")].tolist()


def choose_examples(predictions: Predictions) -> list[int]:
    """Numbers of the images to show of the cells of a confusion matrix: of each of the most frequent cells a few.

    Of a cell of mistakes the surest, up to three quarters of all; of right ones the least sure.
    """
    cells: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, cell in enumerate(zip(predictions.truth, predictions.predicted, strict=True)):
        cells[cell].append(number)
    chosen: dict[bool, list[int]] = {False: [], True: []}
    for cell in sorted(cells, key=lambda cell: -len(cells[cell])):
        right = cell[0] == cell[1]
        sign = 1 if right else -1
        chosen[right] += sorted(cells[cell], key=lambda number: sign * predictions.probability[number])[
            :EXAMPLES_IN_A_CELL
        ]
    wrong = chosen[False][: MAX_EXAMPLES * 3 // 4]
    return wrong + chosen[True][: MAX_EXAMPLES - len(wrong)]
