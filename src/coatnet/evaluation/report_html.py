"""A report as one page of HTML."""

import math
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from coatnet.errors import one_line
from coatnet.evaluation.html_page import Frame, Line, blocks, data_uri, line_chart, page, table, text
from coatnet.evaluation.metrics import FIGURES, CalibrationBin, main_figure
from coatnet.evaluation.plots import read_series, smooth
from coatnet.evaluation.report import Report
from coatnet.evaluation.report_sections import (
    SUSPECTS,
    WORST_MISTAKES,
    calibration_sentence,
    class_table,
    figures_table,
    percent,
    provenance,
    reliability_section,
    slices_section,
    suspects_section,
)
from coatnet.system.document import Table

MAX_MATRIX_CLASSES = 20  # chosen: more become an image, whose cells are chosen by two menus
MAX_IMAGE_BYTES = 5_000_000  # chosen: of all images of the matrix, so that a report stays below 10 MB
MAX_LISTED = 200  # unreadable images; the others stand in report.json


def to_html(report: Report, metrics_path: Path | None = None) -> str:
    """The report as a page. The log of a run, metrics.jsonl, adds its curves where it can be read."""
    name = main_figure(report.multilabel)
    headline = report.headline().partition(report.format_figure(name))
    notes = "".join(f"<p>{text(line)}</p>" for line in (*report.context(), *report.notes))
    top = f'<p class="figure">{text(headline[1])}</p><p>{text(headline[0])}{text(headline[2])}</p>{notes}' + table(
        figures_table(report)
    )
    curves = ""
    if metrics_path is not None and metrics_path.is_file():
        with suppress(OSError):  # a report without curves is better than none; `train` says so for curves.png
            curves = _curves(report, metrics_path)
    sections = {
        "": top,
        "Curves": curves,
        "What is taken for what": _confusion(report),
        "Classes": table(class_table(report), sortable=True),
        "Worst mistakes": _mistakes(report),
        SUSPECTS: blocks(suspects_section(report)),
        "Can the probabilities be trusted?": _calibration(report),
        "Refusals and sets of classes": blocks(reliability_section(report)) + _risk_coverage(report),
        "Groups of images": blocks(slices_section(report)),
        "Images that could not be read": _bad_images(report),
        "How it was made": _provenance(report),
    }
    return page(f"{report.model} on {report.data}", sections, _matrix_data(report))


def _curves(report: Report, metrics_path: Path) -> str:
    """Loss and accuracy over the epochs; the training loss as the held-out one is measured, as far as that goes."""
    training, sentence = comparable_loss(read_series(metrics_path, "loss"), report)
    figure = main_figure(report.multilabel)
    values = read_series(metrics_path, figure) * (1, 100)
    smoothed = np.column_stack((training[:, 0], smooth(training[:, 1]))) if len(training) else training
    lines = [
        Line("", training, 0, thin=True),
        Line("training, smoothed", smoothed, 0),
        Line("held out", read_series(metrics_path, "nll"), 1, dots=True),
    ]
    charts = line_chart("Loss", lines, "epoch")
    charts += line_chart(f"Held-out {FIGURES[figure].title}, %", [Line("held out", values, 1, dots=True)], "epoch")
    return f'<div class="charts">{charts}</div><p class="faint">{text(sentence)}</p>' if charts else ""


def comparable_loss(series: np.ndarray, report: Report) -> tuple[np.ndarray, str]:
    """The logged training loss (M, 2) on the scale of the held-out one, and a sentence on what still differs.

    Against smoothed labels even a perfect network has a loss, the entropy of the targets, which is subtracted. With
    several labels per image, the log has sums over the classes, and the held-out loss is their mean.
    """
    recipe, mixing, num_classes = report.recipe, report.recipe.get("mixing") or {}, len(report.classes)
    smoothing, least = float(mixing.get("label_smoothing") or 0.0), 0.0
    softmax = recipe.get("loss", "softmax") == "softmax"
    comparable = softmax != report.multilabel and not recipe.get("teacher") and bool(recipe)
    series = series.copy()
    if comparable and report.multilabel:
        series[:, 1] /= num_classes
        targets = [1 - smoothing / 2, smoothing / 2]
    else:
        targets = [1 - smoothing + smoothing / num_classes, *[smoothing / num_classes] * (num_classes - 1)]
    if comparable and smoothing:
        least = -sum(part * math.log(part) for part in targets if part > 0)
        series[:, 1] -= least
    mixed = [name for name in ("mixup", "cutmix") if mixing.get(f"{name}_alpha")]
    return series, (
        "The held-out loss is that of the averaged weights on images as they are. The training loss is that of the "
        "weights of each step on augmented images"
        + (f", mixed by {' and '.join(mixed)}" if mixed else "")
        + (
            f"; the {least:.3f} that labels smoothed by {smoothing:g} cost even a perfect network are subtracted, so "
            "that both are 0 at best"
            if least
            else ("; both are 0 at best" if comparable else "; its scale is another")
        )
        + ". It lies above the other as long as augmentation makes the task harder: compare how they go on."
    )


def _confusion(report: Report) -> str:
    if report.multilabel or report.confusion is None:
        return ""
    names, matrix = report.classes, report.confusion
    worst = max((count for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j), default=0)

    def cell(truth: int, predicted: int, count: int) -> str:
        if not count:
            return "<td></td>"
        kind = "r" if truth == predicted else "w strong" if count == worst else "w"
        label = f"{names[truth]} taken for {names[predicted]}: {count:,} images"
        return (
            f'<td><button type="button" class="{kind}" data-cell="{truth},{predicted}" aria-pressed="false" '
            f'aria-label="{text(label)}">{count:,}</button></td>'
        )

    if len(names) <= MAX_MATRIX_CLASSES:
        heads = "".join(f'<th scope="col" title="{text(n)}"><span><bdi>{text(n)}</bdi></span></th>' for n in names)
        rows = "".join(
            f'<tr><th scope="row" title="{text(names[i])}"><span><bdi>{text(names[i])}</bdi></span></th>'
            f"{''.join(cell(i, j, count) for j, count in enumerate(row))}</tr>"
            for i, row in enumerate(matrix)
        )
        chosen = (
            '<div class="scroll" role="region" tabindex="0" aria-label="Confusion matrix"><table class="matrix">'
            f"<thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    else:
        menus = "".join(f'<label>{label} <select id="{label}"></select></label>' for label in ("truth", "predicted"))
        chosen = (
            f'<canvas role="img" aria-label="Confusion matrix of {len(names):,} classes: the two menus below choose a '
            f'cell"></canvas><div class="choose">{menus}</div>'
        )
    index = {name: number for number, name in enumerate(names)}
    pairs = "".join(
        f'<li><button type="button" data-cell="{index[truth]},{index[predicted]}" aria-pressed="false">'
        f"<bdi>{text(truth)}</bdi> taken for <bdi>{text(predicted)}</bdi>: {count:,} "
        f"({percent(count / report.per_class[index[truth]].support)} of the class)</button></li>"
        for truth, predicted, count in report.confused_pairs
    )
    most = f"<details><summary>The most frequent mistakes</summary><ol>{pairs}</ol></details>" if pairs else ""
    return (
        "<p>True classes down, predicted classes across; blue is right, orange is wrong. A cell shows its images.</p>"
        f'{chosen}<div id="cell" aria-live="polite"></div>{most}'
    )


def _matrix_data(report: Report) -> dict[str, Any]:
    """What the script shows: names of the classes, cells that are not empty, images of some."""
    if report.multilabel or report.confusion is None:
        return {}
    matrix = np.array(report.confusion)
    cells = [[int(i), int(j), int(matrix[i, j])] for i, j in np.argwhere(matrix)]
    index = {name: number for number, name in enumerate(report.classes)}
    examples: dict[str, list[list[Any]]] = defaultdict(list)
    predictions, total = report.predictions, 0
    for row, pixels in report.examples:
        assert predictions is not None
        source = data_uri(pixels)
        total += len(source)
        if total > MAX_IMAGE_BYTES:
            break
        key = f"{index[predictions.truth[row]]},{index[predictions.predicted[row]]}"
        name, probability = one_line(predictions.images[row])[:200], round(float(predictions.probability[row]), 4)
        examples[key].append([name, probability, source, int(max(pixels.shape[:2]) <= 64)])
    return {"classes": [one_line(name) for name in report.classes], "cells": cells, "examples": examples}


def _mistakes(report: Report) -> str:
    if not report.mistakes:
        return ""
    shown = []
    for number, wrong in enumerate(report.mistakes):
        picture = ""
        if number < len(report.thumbnails):
            pixels = report.thumbnails[number]
            views = [(pixels, wrong.image)]
            if number < len(report.heat_maps):
                views.append((report.heat_maps[number], "the same with its heat map"))
            kind = ' class="pixels"' if max(pixels.shape[:2]) <= 64 else ""
            images = "".join(f'<img{kind} src="{data_uri(view)}" alt="{text(alt[:200])}">' for view, alt in views)
            picture = f'<div class="pair">{images}</div>' if len(views) > 1 else images
        shown.append(
            f"<li>{picture}<p><bdi>{text(wrong.truth)}</bdi> taken for <bdi>{text(wrong.predicted)}</bdi> "
            f'({percent(wrong.probability)})</p><p class="clamp faint"><bdi>{text(wrong.image)}</bdi></p></li>'
        )
    note = WORST_MISTAKES + (
        " Beside each image, red is what mattered most to the answer (LayerCAM)." if report.heat_maps else ""
    )
    return f'<p>{text(note)}</p><ul class="images worst">{"".join(shown)}</ul>'


def _calibration(report: Report) -> str:
    drawn = _reliability_diagram(
        report.calibration, "How often right, by probability; dashed: exactly as often as claimed"
    )
    if report.reliability is not None:
        drawn += _reliability_diagram(report.reliability.bins_before, "The same before calibration")
    return f'<p>{text(calibration_sentence(report))}</p><div class="charts">{drawn}</div>'


def _reliability_diagram(bins: Iterable[CalibrationBin], title: str) -> str:
    frame = Frame((0.0, 1.0), (0.0, 1.0), "probability given; below, how many")
    filled = [row for row in bins if row.count]
    for row in filled:
        (left, top), (right, bottom) = frame.at(row.low, row.accuracy or 0.0), frame.at(row.high, 0)
        shape, tall = f'x="{left + 1}" width="{right - left - 2:.1f}"', 30 * row.count / max(r.count for r in filled)
        said = f"{row.count:,} predictions, {percent(row.confidence)} given, {percent(row.accuracy)} right"
        frame.parts.append(
            f'<rect class="bar" {shape} y="{top}" height="{bottom - top:.1f}"><title>{said}</title></rect>'
            f'<rect class="count" {shape} y="{bottom - tall:.1f}" height="{tall:.1f}"/>'
        )
    (x0, y0), (x1, y1) = frame.at(0, 0), frame.at(1, 1)
    frame.parts.append(f'<path class="diagonal" d="M{x0} {y0}L{x1} {y1}"/>')
    return f"<figure><figcaption>{text(title)}</figcaption>{frame.svg(title)}</figure>"


def _risk_coverage(report: Report) -> str:
    if report.reliability is None:
        return ""
    points = 100 * np.array(report.reliability.risk_coverage).reshape(-1, 2)
    line = Line("wrong among the answered", points, 1)
    return line_chart("Risk and coverage: % wrong of the images that are answered", [line], "% of the images answered")


def _bad_images(report: Report) -> str:
    if not report.bad_images:
        return ""
    rows = list(report.bad_images.items())
    more = f" The first {MAX_LISTED} are listed; report.json has all." if len(rows) > MAX_LISTED else ""
    return f"<p>They are not in the figures above ({len(rows):,}).{more}</p>" + table(
        Table(("image", "reason"), rows[:MAX_LISTED])
    )


def _provenance(report: Report) -> str:
    made = table(Table(("", ""), provenance(report)))
    if not report.recipe:
        return made
    values = yaml.safe_dump(dict(report.recipe), sort_keys=False, allow_unicode=True)
    lines = "\n".join(text(line) for line in values.splitlines())
    return f"{made}<details><summary>Configuration of the training</summary><pre>{lines}</pre></details>"
