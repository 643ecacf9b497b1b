"""A report as a page of Markdown, and as a folder with its plots."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from coatnet.evaluation.metrics import FIGURES, ClassFigures
from coatnet.evaluation.plots import draw_calibration, draw_confusion, draw_mistakes
from coatnet.evaluation.report import Report
from coatnet.system.files import atomic_files, atomic_write, output_path
from coatnet.system.terminal import escape_markdown

MAX_OPEN_TABLE_ROWS = 50  # chosen: a longer table is folded


def write_report(report: Report, folder: str | Path) -> None:
    """Write report.md, report.json and the plots shown in it into a folder, which is made if needed.

    The plots are confusion.png (up to 1,000 classes, single-label), mistakes.png and calibration.png.

    Args:
        report: the evaluation.
        folder: where the files go; files of these names are replaced.

    Raises:
        OSError: the disk refuses.
    """
    folder = output_path(folder)
    if report.confusion is not None:
        with atomic_files(folder / "confusion.png") as (staged,):
            draw_confusion(np.array(report.confusion), report.classes, staged)
    if report.thumbnails:
        with atomic_files(folder / "mistakes.png") as (staged,):
            draw_mistakes(report.thumbnails, report.mistakes, staged)
    with atomic_files(folder / "calibration.png") as (staged,):
        draw_calibration(report.calibration, staged)
    # Names of files need not be Unicode; what is not is written as JSON would escape it.
    atomic_write(folder / "report.md", to_markdown(report, with_plots=True), errors="backslashreplace")
    atomic_write(folder / "report.json", report.to_json(), errors="backslashreplace")  # last: then all is there


def to_markdown(report: Report, *, with_plots: bool = False) -> str:
    """Format a report as GitHub-flavored Markdown; sections without content are left out.

    Args:
        report: from `evaluate`.
        with_plots: whether to show the images that `write_report` puts beside the page.
    """
    headline = report.headline()
    model, data = escape_markdown(report.model), escape_markdown(report.data)
    sections = [
        f"# {model} on {data}\n\n**{headline[0].upper()}{headline[1:]}**",
        "\n\n".join(escape_markdown(note) for note in report.notes),
        _table(
            ("figure", "value", "95 % interval", "what it says"),
            [
                (figure.title, report.format_figure(name), report.format_interval(name), figure.meaning)
                for name, figure in FIGURES.items()
                if name in report.figures
            ],
            numbers=(1, 2),
        ),
        _confusion_section(report, with_plots),
        _class_section(report),
        _mistake_section(report, with_plots),
        _calibration_section(report, with_plots),
        _bad_image_section(report),
        _provenance_section(report),
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
        (escape_markdown(truth), escape_markdown(predicted), f"{count:,}", _percent(count / support[truth]))
        for truth, predicted, count in report.confused_pairs
    ]
    header = ("truth", "taken for", "images", "of the class")
    parts.append(_table(header, rows, numbers=(2, 3)) if rows else "Nothing: every image was classified right.")
    return "\n\n".join(parts)


def _class_section(report: Report) -> str:
    measure = "average_precision" if report.multilabel else "f1"

    def weakest_first(item: tuple[str, ClassFigures]) -> tuple:
        value = getattr(item[1], measure)
        return (item[1].support == 0, value is None, value)

    ordered = sorted(zip(report.classes, report.per_class, strict=True), key=weakest_first)
    columns = ["recall", "precision", "f1"] + ["average_precision"] * report.multilabel
    header = ["class", "images"] + [name.replace("_", " ").replace("f1", "F1") for name in columns]
    rows = [
        [escape_markdown(name), f"{row.support:,}"] + [_percent(getattr(row, column)) for column in columns]
        for name, row in ordered
    ]
    numbers = range(1, len(header))
    if len(rows) <= MAX_OPEN_TABLE_ROWS:
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
            escape_markdown(wrong.image),
            escape_markdown(wrong.truth),
            escape_markdown(wrong.predicted),
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
    rows = [(escape_markdown(image), escape_markdown(reason)) for image, reason in report.bad_images.items()]
    return f"## Images that could not be read\n\nThey are not in the figures above ({len(rows):,}).\n\n" + _table(
        ("image", "reason"), rows
    )


def _provenance_section(report: Report) -> str:
    rows = [
        ("data", f"{escape_markdown(report.data)}, {escape_markdown(report.split)}, {report.format_num_images()}"),
        ("model", f"{escape_markdown(report.model)}, {report.num_parameters / 1e6:,.2f} M parameters"),
        ("resolution", f"{report.resolution} pixels"),
        (
            "time",
            f"{report.seconds:,.1f} s, {report.figures['n'] / max(report.seconds, 1e-9):,.0f} images/s",
        ),
    ]
    return "## How it was made\n\n" + _table(("", ""), rows)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()) -> str:
    rule = ["---"] * len(header)
    for column in numbers:
        rule[column] = "---:"
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
