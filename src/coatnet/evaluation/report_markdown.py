"""A report as a page of Markdown, and as a folder with its plots."""

from pathlib import Path

import numpy as np

from coatnet.evaluation.plots import draw_calibration, draw_confusion, draw_mistakes
from coatnet.evaluation.predictions import MAX_PROBABILITIES, PROBABILITIES
from coatnet.evaluation.report import Report
from coatnet.evaluation.report_html import to_html
from coatnet.evaluation.report_sections import document
from coatnet.system.files import atomic_files, atomic_write, output_path


def write_report(report: Report, folder: str | Path) -> None:
    """Write a report into a folder, which is made if needed: report.html, report.md, report.json and more.

    The plots of report.md are confusion.png (up to 1,000 classes, single-label), mistakes.png and calibration.png;
    report.html holds all of its own, and the curves of the run whose metrics.jsonl lies in the folder. predictions.csv
    has the answer to each image; probabilities.npy, where an image may have several labels, those of each class.

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
    if report.predictions is not None:
        table = report.predictions.probabilities
        if table is not None and table.size <= MAX_PROBABILITIES:
            with atomic_files(folder / PROBABILITIES) as (staged,), open(staged, "wb") as file:
                np.save(file, table)
        atomic_write(folder / "predictions.csv", report.predictions.to_csv(), errors="backslashreplace")
    atomic_write(folder / "report.html", to_html(report, folder / "metrics.jsonl"), errors="backslashreplace")
    atomic_write(folder / "report.md", to_markdown(report, with_plots=True), errors="backslashreplace")
    atomic_write(folder / "report.json", report.to_json(), errors="backslashreplace")  # last: then all is there


def to_markdown(report: Report, *, with_plots: bool = False) -> str:
    """Format a report as GitHub-flavored Markdown; sections without content are left out.

    Args:
        report: from `evaluate`.
        with_plots: whether to show the images that `write_report` puts beside the page.
    """
    return document(report).to_markdown(with_plots=with_plots)
