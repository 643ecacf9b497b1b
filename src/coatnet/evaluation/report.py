"""The result of an evaluation as data."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from coatnet.bundle.config import readable_json
from coatnet.data.test_time_augmentation import NUM_VIEWS
from coatnet.errors import counted
from coatnet.evaluation.metrics import FIGURES, CalibrationBin, ClassFigures, Interval, Metrics, main_figure
from coatnet.evaluation.predictions import Duplicates, Predictions, Slice, find_suspects
from coatnet.evaluation.reliability import Reliability
from coatnet.public_names import warn_renamed

MAX_SUSPECTS = 100  # in report.json


@dataclass(frozen=True)
class Mistake:
    """A misclassified image; `probability` is that of the wrong class."""

    image: str
    truth: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Report:
    """What `evaluate` returns. Two reports are equal if the figures and what they are of are equal: neither durations,
    machines and recipes nor images and the predictions for each of them are compared.

    Attributes:
        data: name of the data.
        split: validation, training, test or all.
        model: name of the variant.
        resolution: of the input, in pixels; height and width, `192 x 320`, where they differ.
        num_parameters: of the model.
        classes: names of the K classes.
        multilabel: whether an image may have several labels.
        figures: the figures of `Metrics.compute` by name, as fractions; `n` is the number of images.
        intervals: their 95 % intervals.
        per_class: figures of each class, in the order of `classes`.
        confusion: `confusion[i][j]` is the number of images of class i predicted as class j; None for multi-label
            and above 1,000 classes.
        confused_pairs: the most frequent mistakes: true class, predicted class, number of images.
        calibration: bins of the reliability diagram.
        mistakes: the misclassified images with the highest probabilities, up to 24.
        bad_images: why each unreadable image was left out, by its name.
        seconds: duration of the evaluation.
        views: test-time augmentation, as in `evaluate`.
        notes: what a reader of the figures must know.
        reliability: calibration, refusals and sets of classes of a calibrated model; None for others.
        duplicates: held-out images that stand in the training split of the data too; None where they were not compared.
        slices: accuracy by image size, brightness and folder, with intervals that hold at once.
        training: how the model came about: epochs, steps, minutes, images, hardware, software; empty if unknown.
        recipe: the configuration of its training; empty if unknown.
        thumbnails: the images of `mistakes`, uint8 (H, W, 3), at most 160 pixels a side.
        predictions: that for each image, in the order of the data.
        examples: images of the confusion matrix: number in `predictions`, pixels uint8 (H, W, 3) up to 96 a side.
        heat_maps: `thumbnails` with what mattered to the wrong class laid over (LayerCAM).
        metrics: the numbers of each image behind the figures, and behind those of probabilities.
    """

    data: str
    split: str
    model: str
    resolution: int | str
    num_parameters: int
    classes: tuple[str, ...]
    multilabel: bool
    figures: Mapping[str, float]
    intervals: Mapping[str, Interval | None]
    per_class: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    confused_pairs: tuple[tuple[str, str, int], ...]
    calibration: tuple[CalibrationBin, ...]
    mistakes: tuple[Mistake, ...]
    bad_images: Mapping[str, str]
    seconds: float = field(compare=False)
    views: str = "one"
    notes: tuple[str, ...] = ()
    reliability: Reliability | None = None
    duplicates: Duplicates | None = None
    slices: tuple[Slice, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict, compare=False)
    recipe: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    thumbnails: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)
    predictions: Predictions | None = field(default=None, compare=False, repr=False)
    examples: tuple[tuple[int, np.ndarray], ...] = field(default=(), compare=False, repr=False)
    heat_maps: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)
    metrics: tuple[Metrics, Metrics] | None = field(default=None, compare=False, repr=False)

    def headline(self) -> str:
        """The main figure in one line: `top-1 accuracy 94.1 % (95 % interval 93.6 to 94.5) on 10,000 images ...`."""
        name = main_figure(self.multilabel)
        text = f"{FIGURES[name].title} {self.format_figure(name)}"
        if self.intervals[name] is not None:
            text += f" (95 % interval {self.format_interval(name)})"
        return f"{text} on {self.format_num_images()} of {len(self.classes):,} classes"

    def format_figure(self, name: str) -> str:
        """A figure as text: fractions in percent."""
        value = self.figures[name]
        return f"{100 * value:.{self._percent_digits}f} %" if FIGURES[name].is_fraction else f"{value:.3f}"

    def format_interval(self, name: str) -> str:
        """The interval of a figure as text, `93.6 to 94.5`."""
        interval = self.intervals[name]
        if interval is None:
            return "unknown"
        scale, digits = (100, self._percent_digits) if FIGURES[name].is_fraction else (1, 3)
        return " to ".join(f"{scale * bound:.{digits}f}" for bound in interval)

    def format_num_images(self) -> str:
        """`10,000 images`."""
        return counted(int(self.figures["n"]), "image")

    def baselines(self) -> dict[str, float]:
        """What the main figure would be without looking at the images, as a fraction.

        `chance`: a class is drawn for each image. `majority`: the most frequent class of these images is always given.
        With several labels per image, only `chance`: the mean average precision of scores in random order.
        """
        support, total = [row.support for row in self.per_class], self.figures["n"]
        if self.multilabel:
            occurring = [count / total for count in support if count]
            return {"chance": sum(occurring) / len(occurring) if occurring else 0.0}
        return {"chance": 1 / len(self.classes), "majority": max(support) / total}

    def suspects(self) -> list[tuple[str, str, str, float]]:
        """Images whose label looks wrong, the most suspect first: name, label, the class that it is rather of, the
        probability of the label. None of the split training, or of images that may have several labels."""
        if self.predictions is None or self.multilabel or self.split == "training":
            return []
        found = self.predictions
        return [
            (found.images[row], found.truth[row], found.predicted[row], float(np.exp(-found.nll[row])))
            for row in find_suspects(found)
        ]

    def network_figures(self) -> dict[str, float]:
        """The figures of the network itself, whose probabilities a calibration has not changed."""
        return {**self.figures, **(self.reliability.network if self.reliability is not None else {})}

    def context(self) -> list[str]:
        """What is said beside the headline: baselines, and the figure without images of the training; sentences."""
        percent = {name: f"{100 * value:.1f} %" for name, value in self.baselines().items()}
        lines = [
            "Without looking at the images: "
            + (
                f"{percent['chance']} by scores in random order"
                if self.multilabel
                else f"{percent['chance']} by chance"
            )
            + (f", {percent['majority']} by always naming the most frequent class." if "majority" in percent else ".")
        ]
        if self.views != "one":
            several = f"the mean of {NUM_VIEWS[self.views]} views of it ({self.views})"
            lines.append(f"Each image was classified by {several}: `--views` of `coatnet predict`.")
        found, learned = self.duplicates, f"an image of the training split of {self.data}"  # which may be other data
        if found is not None and not (found.count or found.near):
            nearly = ", or nearly so" if found.near == 0 else ""
            lines.append(f"No image of these has the same pixels as {learned}{nearly}.")
        elif found is not None:
            first, nearly = (found.count, "") if found.count else (found.near or 0, "nearly ")
            same = f"{first:,} of these images {'has' if first == 1 else 'have'} {nearly}the same"
            more = f", {found.near:,} more nearly" if found.count and found.near else ""
            them = "it" if found.count + (found.near or 0) == 1 else "them"
            lines.append(
                f"{same} pixels as {learned}{more}; "
                + (
                    "no image is left without them."
                    if found.accuracy is None or found.interval is None
                    else f"without {them} {100 * found.accuracy:.{self._percent_digits}f} % of "
                    f"{found.others:,} {'have all labels right' if self.multilabel else 'are right'} (95 % interval "
                    f"{' to '.join(f'{100 * bound:.{self._percent_digits}f}' for bound in found.interval)})."
                )
            )
        return lines

    @property
    def _percent_digits(self) -> int:
        return 2 if self.figures["n"] >= 10_000 else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fractions not percent: the content of report.json and of a bundle's record."""
        left_out = {
            "thumbnails",
            "per_class",
            "reliability",
            "recipe",
            "predictions",
            "examples",
            "heat_maps",
            "metrics",
        }
        left_out |= {name for name in ("notes", "slices", "duplicates", "training") if not getattr(self, name)}
        left_out |= {"views"} if self.views == "one" else set()
        plain = {name: value for name, value in vars(self).items() if name not in left_out}
        rows = [{"class": name} | asdict(row) for name, row in zip(self.classes, self.per_class, strict=True)]
        plain |= {
            "headline": self.headline(),
            "per_class": rows,
            "figures": dict(self.figures),
            "intervals": {name: value and list(value) for name, value in self.intervals.items()},
            "calibration": [asdict(row) for row in self.calibration],
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
            "bad_images": dict(self.bad_images),
            "baselines": self.baselines(),
        }
        if self.reliability is not None:
            plain["reliability"] = asdict(self.reliability)
        if self.duplicates:
            plain["duplicates"] = asdict(self.duplicates)
        if suspects := self.suspects():
            names = ("image", "label", "suggested", "score")  # as in the table of `doctor --labels`
            plain["suspects"] = [dict(zip(names, row, strict=True)) for row in suspects[:MAX_SUSPECTS]]
        if self.slices:
            plain["slices"] = [asdict(each) for each in self.slices]
        # Through JSON once: tuples become lists, as they are in the file, and NaN is refused.
        return json.loads(json.dumps(plain, allow_nan=False))

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return readable_json(self.to_dict())


def __getattr__(name: str) -> object:
    if name != "write":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_renamed(f"{__name__}.write", "coatnet.write_report", since="0.2", removed_in="0.3")
    return import_module("coatnet.evaluation.report_markdown").write_report
