"""Models beside each other on the same images: paired differences, where they disagree, curves, configurations."""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from coatnet.bundle.config import readable_json
from coatnet.errors import UserError, counted, shorten
from coatnet.evaluation.html_page import Line, blocks, data_uri, line_chart, page, text
from coatnet.evaluation.metrics import (
    FIGURES,
    Interval,
    discordant,
    may_be_chance,
    mcnemar,
    mean_interval,
    paired_difference,
    precision_difference,
)
from coatnet.evaluation.outputs import match_names
from coatnet.evaluation.plots import read_series
from coatnet.evaluation.predictions import PROBABILITIES, Predictions, read_array, read_predictions
from coatnet.system.document import Document, Section, Table
from coatnet.system.json_reader import flatten, read_json_object

MAIN_FIGURES = ("top1", "mean_average_precision")
MAX_LISTED, MAX_SHOWN = 20, 48  # images on which runs disagree: as text, and on the page


@dataclass(frozen=True, eq=False)
class Run:
    """A run with the predictions of its model, as `open_run` finds them.

    Attributes:
        name: as it was given.
        report: the content of its report.json.
        predictions: for its held-out images.
        recipe: the configuration of its training.
        metrics: its log, which need not exist.
    """

    name: str
    report: Mapping[str, Any]
    predictions: Predictions
    recipe: Mapping[str, Any]
    metrics: Path


@dataclass(frozen=True)
class Difference:
    """A run against the first one, on the N images of both.

    Attributes:
        run, reference: names of the two.
        gained: number of images that only `run` has right.
        lost: number of images that only `reference` has right.
        difference: of the fractions that are right; positive if `run` is better.
        interval: its 95 % interval, of pairs; None for one image.
        p: of McNemar's exact test: how often chance alone makes the two counts at least as unequal.
        nll_difference: of the mean negative log-likelihoods; negative if `run` is better.
        nll_interval: its 95 % interval, of pairs; None for one image.
        map_difference: of the mean average precisions; None where an image has one label, or probabilities are missing.
        map_interval: its 95 % interval, of drawing the same images for both; None for one image or equal answers.
    """

    run: str
    reference: str
    gained: int
    lost: int
    difference: float
    interval: Interval
    p: float
    nll_difference: float
    nll_interval: Interval | None
    map_difference: float | None = None
    map_interval: Interval | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found.

    Attributes:
        runs: the runs, the first of which is the reference.
        images: names of the N images that all of them answered.
        correct: whether each run is right, (number of runs, N) of bool.
        differences: each other run against the first.
        disagreements: numbers of the images on which predictions differ; where the surest clash first.
        settings: configuration values that differ, and `views`, by dotted name, in the order of the runs.
    """

    runs: tuple[Run, ...]
    images: tuple[str, ...]
    correct: np.ndarray
    differences: tuple[Difference, ...]
    disagreements: tuple[int, ...]
    settings: Mapping[str, tuple[Any, ...]]
    rows: tuple[tuple[int, ...], ...] = field(repr=False)  # number of each image in the predictions of each run

    def to_json(self) -> str:
        """All findings as indented JSON."""
        return readable_json(
            {
                "n": len(self.images),
                "runs": [
                    {
                        "run": run.name,
                        "headline": run.report.get("headline"),
                        "figures": run.report.get("figures"),
                        "intervals": run.report.get("intervals"),
                        "right_on_these": float(right.mean()),
                    }
                    for run, right in zip(self.runs, self.correct, strict=True)
                ],
                "differences": [vars(each) for each in self.differences],
                "num_disagreements": len(self.disagreements),
                "disagreements": [self._predictions_for(number) for number in self.disagreements],
                "configuration": {name: list(values) for name, values in self.settings.items()},
            }
        )

    def _predictions_for(self, number: int) -> dict[str, Any]:
        predictions = [run.predictions for run in self.runs]
        rows = [rows[number] for rows in self.rows]
        return {
            "image": self.images[number],
            "truth": predictions[0].truth[rows[0]],
            "predicted": [each.predicted[row] for each, row in zip(predictions, rows, strict=True)],
        }

    def document(self) -> Document:
        """The findings as a document."""
        n, names = len(self.images), [run.name for run in self.runs]
        figures = [
            (run.name, *_main_figure(run.report), f"{100 * right.mean():.2f} %")
            for run, right in zip(self.runs, self.correct, strict=True)
        ]
        listed = [self._predictions_for(number) for number in self.disagreements[:MAX_LISTED]]
        more = f" The first {MAX_LISTED}:" if len(self.disagreements) > MAX_LISTED else ""
        settings = [(name, *("none" if v is None else str(v) for v in vs)) for name, vs in self.settings.items()]
        right = "all labels right" if self.runs[0].report.get("multilabel") else "right"
        sections = [
            Section("", [Table(("run", "figure", "95 % interval", "images", f"{right} on these"), figures, (2, 3, 4))]),
            Section(
                "Differences on the same images",
                [*(describe(each, right) for each in self.differences), *self._without_probabilities()],
            ),
            Section(
                "Where they disagree",
                [
                    f"{counted(len(self.disagreements), 'image')} of {n:,} with different predictions.{more}",
                    *([self._disagreement_table(listed)] if listed else []),
                ],
            ),
            Section("Configuration", [*([Table(("", *names), settings)] if settings else []), *self._about_settings()]),
        ]
        return Document(" against ".join(names), f"Compared on {counted(n, 'image')}", sections)

    def _about_settings(self) -> list[str]:
        """Why no value is listed, or whose are not."""
        if missing := [run.name for run in self.runs if not run.recipe]:
            return [f"There is none of {shorten(missing)}."]
        return [] if self.settings else ["The recorded ones are the same."]

    def _without_probabilities(self) -> list[str]:
        """A line if mean average precisions cannot be compared."""
        if not self.runs[0].report.get("multilabel") or all(
            each.map_difference is not None for each in self.differences
        ):
            return []
        missing = [run.name for run in self.runs if run.predictions.probabilities is None]
        reason = (
            f"no {PROBABILITIES} in {shorten(missing)}, as of an earlier release; "
            "`coatnet evaluate RUN --data X --out FOLDER` writes it, and such folders can be compared."
            if missing
            else "the runs have other classes, or the name of one has a semicolon."
        )
        return [f"Mean average precision is not compared: {reason}"]

    def _disagreement_table(self, listed: Sequence[Mapping[str, Any]]) -> Table:
        rows = [(each["image"], *(said or NOTHING for said in (each["truth"], *each["predicted"]))) for each in listed]
        return Table(("image", "truth", *(run.name for run in self.runs)), rows)

    def to_html(self, thumbnails: Callable[[Sequence[str]], Mapping[str, np.ndarray]] | None = None) -> str:
        """The findings as a page like report.html; `thumbnails` gives the images of some names, as far as it can."""
        found = self.document()
        sections = {"": f"<p class='figure'>{text(found.headline)}</p>" + blocks(found.sections[0])}
        sections |= {section.title: blocks(section) for section in found.sections[1:]}
        shown = [self._predictions_for(number) for number in self.disagreements[:MAX_SHOWN]]
        images = thumbnails([each["image"] for each in shown]) if thumbnails is not None else {}
        pictures = "".join(
            f'<li><img class="pixels" src="{data_uri(images[each["image"]])}" alt="{text(each["image"][:200])}">'
            f"<p><bdi>{text(each['truth'] or NOTHING)}</bdi></p><p class='faint'>"
            + "<br>".join(
                f"{text(run.name)}: <bdi>{text(predicted or NOTHING)}</bdi>"
                for run, predicted in zip(self.runs, each["predicted"], strict=True)
            )
            + "</p></li>"
            for each in shown
            if each["image"] in images
        )
        if pictures:
            sections["Where they disagree"] += f'<ul class="images">{pictures}</ul>'
        curves = {title: self._curves(name, title) for name, title in _CURVES.items()}
        sections["Curves"] = f'<div class="charts">{"".join(curves.values())}</div>' if any(curves.values()) else ""
        return page(found.title, sections, {})

    def _curves(self, name: str, title: str) -> str:
        scale = 100 if name in MAIN_FIGURES else 1
        lines = [
            Line(run.name, read_series(run.metrics, name) * (1, scale), number, dots=True)
            for number, run in enumerate(self.runs)
            if run.metrics.is_file()
        ]
        return line_chart(title, lines, "epoch")


NOTHING = "nothing"  # an image without labels, where it may have several
_CURVES = {"nll": "Held-out loss", "top1": "Held-out top-1 accuracy, %", "loss": "Training loss, as logged",
           "mean_average_precision": "Held-out mean average precision, %"}  # fmt: skip


def open_run(path: str | Path, evaluate_again: Callable[[Path], tuple[Mapping[str, Any], Predictions]]) -> Run:
    """Read the figures and predictions in a folder of `train` or `evaluate --out`.

    Args:
        path: the folder.
        evaluate_again: gives report and predictions of a finished run without predictions.csv, of an earlier release.

    Raises:
        UserError: it is no such folder, or the run is not finished.
    """
    folder = Path(path)
    if not (folder / "report.json").is_file():
        what = "is not finished" if (folder / "recipe.yaml").exists() else "holds no run and no report"
        if (folder / "figures.json").is_file():
            what = "is a run of a study that kept its figures only (--keep_weights of a new study keeps models)"
        raise UserError(f"{path} {what}: give folders of finished runs, or those of `coatnet evaluate --out`")
    report, recipe = read_json_object(folder / "report.json"), {}
    if (folder / "bundle" / "config.json").is_file():
        config = read_json_object(folder / "bundle" / "config.json")
        record = config.get("record")
        recipe = record.get("recipe") or {} if isinstance(record, dict) else {}
    if (folder / "predictions.csv").is_file():
        predictions = read_predictions(folder / "predictions.csv")
        if report.get("multilabel") and isinstance(classes := report.get("classes"), list):
            table = read_array(folder / PROBABILITIES, (len(predictions.images), len(classes)), np.float32)
            predictions = replace(predictions, probabilities=table)
    else:
        report, predictions = evaluate_again(folder)
    return Run(str(path), report, predictions, recipe if isinstance(recipe, dict) else {}, folder / "metrics.jsonl")


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs with the first of them, on the images that all of them answered.

    Raises:
        UserError: there are fewer than two, they have no image in common, or its label is not the same in all.
    """
    if len(runs) < 2:
        raise UserError("a comparison takes two runs or more")
    numbers = [_numbers(run.predictions) for run in runs]
    common = [key for key in numbers[0] if all(key in other for other in numbers[1:])]
    if not common:
        raise UserError(
            f"{runs[0].name} and {', '.join(run.name for run in runs[1:])} have no held-out image in common: evaluate "
            "them on the same data with `coatnet evaluate --out`, and compare those folders"
        )
    rows = tuple(tuple(found[key] for key in common) for found in numbers)
    several = any(run.report.get("multilabel") for run in runs)
    truth = [_as_compared(run.predictions.truth, chosen, several) for run, chosen in zip(runs, rows, strict=True)]
    for run, theirs in zip(runs[1:], truth[1:], strict=True):
        differing = [key[0] for key, ours, other in zip(common, truth[0], theirs, strict=True) if ours != other]
        if differing:
            raise UserError(
                f"{counted(len(differing), 'image')} of {len(common):,} have another label in {run.name} than in "
                f"{runs[0].name}, first {differing[0]}: runs are compared on the same images with the same labels"
            )
    correct, nll, sure = (
        np.stack([column[list(chosen)] for column, chosen in zip(columns, rows, strict=True)])
        for columns in zip(
            *((run.predictions.correct, run.predictions.nll, run.predictions.probability) for run in runs), strict=True
        )
    )
    predicted = [
        _as_compared(run.predictions.predicted, chosen, several) for run, chosen in zip(runs, rows, strict=True)
    ]
    unequal = [number for number, given in enumerate(zip(*predicted, strict=True)) if len(set(given)) > 1]
    unequal.sort(key=lambda number: (correct[:, number].any() == correct[:, number].all(), -sure[:, number].min()))
    return Comparison(
        runs=tuple(runs),
        images=tuple(name for name, _ in common),
        correct=correct,
        differences=tuple(_difference(runs, number, correct, nll, rows) for number in range(1, len(runs))),
        disagreements=tuple(unequal),
        settings=_settings([run.recipe for run in runs])
        | _settings([{"views": run.report.get("views", "one")} for run in runs]),
        rows=rows,
    )


def _as_compared(answers: Sequence[str], rows: Sequence[int], several: bool) -> Sequence[str | frozenset[str]]:
    """Class names of some images as runs are compared: with composed accents (NFC), and several in any order."""
    composed = [unicodedata.normalize("NFC", answers[row]) for row in rows]
    return [frozenset(each.split(";")) for each in composed] if several else composed


def describe(each: Difference, right: str = "right") -> str:
    """A difference in a sentence, with what its interval allows to say; `right` is what is counted of an image."""
    low, high = (100 * bound for bound in each.interval)
    return (
        f"{each.run} against {each.reference}: {100 * each.difference:+.2f} points {right} (95 % interval "
        f"{low:+.2f} to {high:+.2f}), {_verdict(each.interval, each.p)}. Only it is right for "
        f"{counted(each.gained, 'image')}, only the other for {each.lost:,} (McNemar's exact test: p = {each.p:.2g}). "
        f"Negative log-likelihood {each.nll_difference:+.4f}"
        + (" ({:+.4f} to {:+.4f}).".format(*each.nll_interval) if each.nll_interval else ".")
        + _describe_precision(each)
    )


def _verdict(interval: Interval, p: float = 0.0) -> str:
    if may_be_chance(interval, p):
        return "not distinguishable from it"
    return "better" if interval[0] > 0 else "worse"


def _describe_precision(each: Difference) -> str:
    if each.map_difference is None:
        return ""
    said = f" Mean average precision {100 * each.map_difference:+.2f} points"
    if each.map_interval is None:
        return f"{said}."
    low, high = (100 * bound for bound in each.map_interval)
    return f"{said} (95 % interval {low:+.2f} to {high:+.2f}), {_verdict(each.map_interval)}."


def _difference(
    runs: Sequence[Run], number: int, correct: np.ndarray, nll: np.ndarray, rows: Sequence[Sequence[int]]
) -> Difference:
    ours, theirs, gaps = correct[number], correct[0], nll[number] - nll[0]
    gained, lost = discordant(ours, theirs)
    return Difference(
        run=runs[number].name,
        reference=runs[0].name,
        gained=gained,
        lost=lost,
        difference=(gained - lost) / len(ours),
        interval=paired_difference(ours, theirs),
        p=mcnemar(gained, lost),
        nll_difference=float(gaps.mean()),
        nll_interval=mean_interval(gaps, least=-math.inf),
        **_precision(runs[number], runs[0], rows[number], rows[0]),
    )


def _precision(run: Run, reference: Run, rows: Sequence[int], reference_rows: Sequence[int]) -> dict[str, Any]:
    """The difference of mean average precisions and its interval, by the names in `Difference`; {} if it is unknown."""
    ours, theirs = run.predictions.probabilities, reference.predictions.probabilities
    classes, others = (each.report.get("classes") or [] for each in (reference, run))
    # The column of each class in the probabilities of the run.
    order = [column for column in match_names(classes, others) if column is not None]
    if ours is None or theirs is None or not classes or not len(others) == len(classes) == len({*order}):
        return {}
    columns = {name: column for column, name in enumerate(classes)}
    labels = np.zeros((len(rows), len(classes)), dtype=bool)
    for number, row in enumerate(reference_rows):
        for name in filter(None, reference.predictions.truth[row].split(";")):
            if name not in columns:  # a name with a semicolon of its own
                return {}
            labels[number, columns[name]] = True
    difference, interval = precision_difference(labels, ours[list(rows)][:, order], theirs[list(reference_rows)])
    return {"map_difference": difference, "map_interval": interval}


def _numbers(predictions: Predictions) -> dict[tuple[str, int], int]:
    """The number of each image by its name, and by how often the name has occurred before."""
    seen: Counter[str] = Counter()
    numbers = {}
    for number, name in enumerate(predictions.images):
        numbers[name, seen[name]] = number
        seen[name] += 1
    return numbers


def _settings(recipes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The values that differ among the recipes that are there; None for what a recipe lacks."""
    flat = [flatten(recipe) for recipe in recipes]
    found = {}
    for name in dict.fromkeys(name for recipe in flat for name in recipe):
        values = [recipe.get(name) for recipe in flat if recipe]
        if any(value != values[0] for value in values):
            found[name] = tuple(recipe.get(name) for recipe in flat)
    return found


def _main_figure(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """Figure, interval and number of images of a report.json, as text; "" for what it lacks."""
    figures, intervals = report.get("figures") or {}, report.get("intervals") or {}
    name = next((name for name in MAIN_FIGURES if name in figures), None)
    if name is None:
        return "", "", ""
    interval = intervals.get(name)
    shown = " to ".join(f"{100 * bound:.2f}" for bound in interval) if interval else ""
    return f"{FIGURES[name].title} {100 * figures[name]:.2f} %", shown, f"{int(figures['n']):,}"
