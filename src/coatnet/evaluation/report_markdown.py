"""A report as a page of Markdown, and as a folder with its plots."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from coatnet.evaluation.plots import draw_calibration, draw_confusion, draw_mistakes
from coatnet.evaluation.predictions import MAX_PROBABILITIES, PROBABILITIES
from coatnet.evaluation.report import Report
from coatnet.evaluation.report_html import to_html
from coatnet.evaluation.report_sections import document
from coatnet.system.files import atomic_files, output_path

PAGES = ("report.json", "report.html", "report.md")
MAY_BE_ABSENT = ("confusion.png", "mistakes.png", "predictions.csv", PROBABILITIES)


def write_report(report: Report, folder: str | Path) -> None:
    """Write a report into a folder, which is made if needed: report.html, report.md, report.json and more.

    The plots of report.md are confusion.png (up to 1,000 classes, single-label), mistakes.png and calibration.png;
    report.html holds all of its own, and the curves of the run whose metrics.jsonl lies in the folder. predictions.csv
    has the answer to each image; probabilities.npy, where an image may have several labels, those of each class.

    Args:
        report: the evaluation.
        folder: where the files go. Those of an earlier report are replaced or removed, unless a file cannot be
            written: then all stay as they were.

    Raises:
        OSError: the disk refuses.
    """
    folder = output_path(folder)

    def text(content: str) -> Callable[[Path], object]:
        # Names of files need not be Unicode; what is not is written as JSON would escape it.
        return lambda path: path.write_bytes(content.encode(errors="backslashreplace"))

    write: dict[str, Callable[[Path], object]] = {}
    if report.confusion is not None:
        write["confusion.png"] = partial(draw_confusion, np.array(report.confusion), report.classes)
    if report.thumbnails:
        write["mistakes.png"] = partial(draw_mistakes, report.thumbnails, report.mistakes)
    write["calibration.png"] = partial(draw_calibration, report.calibration)
    if report.predictions is not None:
        table = report.predictions.probabilities
        if table is not None and table.size <= MAX_PROBABILITIES:
            write[PROBABILITIES] = partial(np.save, arr=table)
        write["predictions.csv"] = text(report.predictions.to_csv())
    write["report.html"] = text(to_html(report, folder / "metrics.jsonl"))
    write["report.md"] = text(to_markdown(report, with_plots=True))
    write["report.json"] = text(report.to_json())  # renamed last: then all is there
    # Stopped between two renames, the folder has no report rather than figures of one and answers of another.
    earlier = [folder / name for name in (*PAGES, *(name for name in MAY_BE_ABSENT if name not in write))]
    with atomic_files(*(folder / name for name in write), remove=earlier) as staged:
        for each, path in zip(write.values(), staged, strict=True):
            each(path)


def to_markdown(report: Report, *, with_plots: bool = False) -> str:
    """Format a report as GitHub-flavored Markdown; sections without content are left out.

    Args:
        report: from `evaluate`.
        with_plots: whether to show the images that `write_report` puts beside the page.
    """
    return document(report).to_markdown(with_plots=with_plots)
