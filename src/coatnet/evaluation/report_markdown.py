"""A report as a page of GitHub-flavoured Markdown; percent instead of fractions, weakest classes first."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coatnet.evaluation.report import Report

# Figure -> (title, what it says, whether it is a share shown in percent).
FIGURES = {
    "top1": ("top-1 accuracy", "the first guess is right", True),
    "top5": ("top-5 accuracy", "the truth is among the first five guesses", True),
    "mean_average_precision": ("mean average precision", "how well each class ranks the images", True),
    "macro_recall": ("macro recall", "accuracy with every class counted alike", True),
    "micro_f1": ("micro F1", "F1 of all decisions at a probability of 0.5", True),
    "macro_f1": ("macro F1", "F1 with every class counted alike", True),
    "exact_match": ("exact match", "all labels of an image are right", True),
    "calibration_error": ("calibration error", "mean gap between probability and accuracy", True),
    "nll": ("negative log-likelihood", "nats; 0 is best", False),
    "brier": ("Brier score", "squared error of the probabilities; 0 is best", False),
}

LONGEST_OPEN_TABLE = 50


def headline(report: Report) -> str:
    """`top-1 accuracy 94.1 % (95 % interval 93.6 to 94.5) on 10,000 images of 10 classes`."""
    name = "mean_average_precision" if report.multilabel else "top1"
    value = _figure(report, name)
    if report.intervals[name] is not None:
        value += f" (95 % interval {_interval(report, name)})"
    return f"{FIGURES[name][0]} {value} on {_images(report)} of {len(report.classes):,} classes"


def render(report: Report, *, with_plots: bool) -> str:
    """The page, section by section; sections with nothing to say are left out."""
    title = headline(report)
    sections = [
        f"# {_text(report.model)} on {_text(report.data)}\n\n**{title[0].upper()}{title[1:]}**",
        _table(
            ("figure", "value", "95 % interval", "what it says"),
            [
                (FIGURES[name][0], _figure(report, name), _interval(report, name), FIGURES[name][1])
                for name in FIGURES
                if name in report.figures
            ],
            numbers=(1, 2),
        ),
        _confusion_section(report, with_plots),
        _class_section(report),
        _mistake_section(report, with_plots),
        _calibration_section(report, with_plots),
        _bad_image_section(report),
        _making_section(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _confusion_section(report: Report, with_plots: bool) -> str:
    if report.multilabel:
        return ""
    parts = ["## What is taken for what"]
    if with_plots and report.confusion is not None:
        parts.append("![Confusion matrix: true classes down, predicted classes across](confusion.png)")
    support = {name: row.support for name, row in zip(report.classes, report.per_class, strict=True)}
    rows = [
        (_text(truth), _text(predicted), f"{count:,}", _percent(count / support[truth]))
        for truth, predicted, count in report.confused_pairs
    ]
    header = ("truth", "taken for", "images", "of the class")
    parts.append(_table(header, rows, numbers=(2, 3)) if rows else "Nothing: every image was classified right.")
    return "\n\n".join(parts)


def _class_section(report: Report) -> str:
    measure = "average_precision" if report.multilabel else "f1"

    def weakness(item: tuple) -> tuple:
        value = getattr(item[1], measure)
        return (item[1].support == 0, value is None, value)

    ordered = sorted(zip(report.classes, report.per_class, strict=True), key=weakness)
    columns = ["recall", "precision", "f1"] + ["average_precision"] * report.multilabel
    header = ["class", "images"] + [name.replace("_", " ").replace("f1", "F1") for name in columns]
    rows = [
        [_text(name), f"{row.support:,}"] + [_percent(getattr(row, column)) for column in columns]
        for name, row in ordered
    ]
    numbers = range(1, len(header))
    if len(rows) <= LONGEST_OPEN_TABLE:
        return "## Classes, weakest first\n\n" + _table(header, rows, numbers=numbers)
    return "\n\n".join(
        (
            "## The ten weakest classes",
            _table(header, rows[:10], numbers=numbers),
            f"<details><summary>All {len(rows):,} classes, weakest first</summary>",
            _table(header, rows, numbers=numbers),
            "</details>",
        )
    )


def _mistake_section(report: Report, with_plots: bool) -> str:
    if not report.mistakes:
        return ""
    parts = [
        "## Worst mistakes",
        "Sure and wrong: a hard image, a wrong label, or something the model never saw.",
    ]
    if with_plots and report.thumbnails:
        parts.append("![The worst mistakes: truth, and what the model saw instead](mistakes.png)")
    rows = [
        (
            str(number),
            _text(wrong.image),
            _text(wrong.truth),
            _text(wrong.predicted),
            _percent(wrong.probability),
        )
        for number, wrong in enumerate(report.mistakes, start=1)
    ]
    parts.append(_table(("", "image", "truth", "prediction", "probability"), rows, numbers=(0, 4)))
    return "\n\n".join(parts)


def _calibration_section(report: Report, with_plots: bool) -> str:
    total = sum(row.count for row in report.calibration)
    sure = sum(row.count * row.confidence for row in report.calibration if row.confidence is not None) / total
    right = sum(row.count * row.accuracy for row in report.calibration if row.accuracy is not None) / total
    if report.multilabel:
        sentence = f"Labels get {_percent(sure)} on average and {_percent(right)} of them are there"
    else:
        sentence = f"The first guess gets {_percent(sure)} on average and is right for {_percent(right)}"
    gap = sure - right
    verdict = "well balanced" if abs(gap) < 0.01 else "too high" if gap > 0 else "too low"
    text = f"## Can the probabilities be trusted?\n\n{sentence}: on the whole the probabilities are {verdict}."
    if with_plots:
        text += "\n\n![Accuracy at each level of probability](calibration.png)"
    return text


def _bad_image_section(report: Report) -> str:
    if not report.bad_images:
        return ""
    rows = [(_text(image), _text(reason)) for image, reason in report.bad_images.items()]
    return f"## Images that could not be read\n\nThey are not in the figures above ({len(rows):,}).\n\n" + _table(
        ("image", "reason"), rows
    )


def _making_section(report: Report) -> str:
    rows = [
        ("data", f"{_text(report.data)}, {_text(report.split)}, {_images(report)}"),
        ("model", f"{_text(report.model)}, {report.num_parameters / 1e6:,.2f} M parameters"),
        ("resolution", f"{report.resolution} pixels"),
        (
            "time",
            f"{report.seconds:,.1f} s, {report.figures['n'] / max(report.seconds, 1e-9):,.0f} images/s",
        ),
    ]
    return "## How it was made\n\n" + _table(("", ""), rows)


def _images(report: Report) -> str:
    n = int(report.figures["n"])
    return f"{n:,} image" + "s" * (n != 1)


def _figure(report: Report, name: str) -> str:
    value = report.figures[name]
    return f"{100 * value:.{_digits(report)}f} %" if FIGURES[name][2] else f"{value:.3f}"


def _digits(report: Report) -> int:
    return 2 if report.figures["n"] >= 10_000 else 1


def _interval(report: Report, name: str) -> str:
    interval = report.intervals[name]
    if interval is None:
        return "unknown"
    scale, digits = (100, _digits(report)) if FIGURES[name][2] else (1, 3)
    return " to ".join(f"{scale * bound:.{digits}f}" for bound in interval)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _text(text: str) -> str:
    """Names come from folders and files: whatever they hold must neither break a table nor become markup."""
    flat = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", flat)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()) -> str:
    rule = ["---"] * len(header)
    for column in numbers:
        rule[column] = "---:"
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
