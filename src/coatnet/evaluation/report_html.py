"""A report as one page of HTML that asks for nothing outside of itself.

Its script and style are named in the content security policy by their hashes, so nothing else runs, whatever a class is
called. Images are data, plots are SVG.
"""

import base64
import hashlib
import html
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from coatnet.errors import one_line
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
from coatnet.system.document import Section, Table

MAX_MATRIX_CLASSES = 20  # chosen: more become an image, whose cells are chosen by two menus
MAX_IMAGE_BYTES = 5_000_000  # chosen: of all images of the matrix, so that a report stays below 10 MB
MAX_LISTED = 200  # unreadable images; the others stand in report.json
MAX_POINTS = 400  # of a curve


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


def page(title: str, sections: Mapping[str, str], data: Mapping[str, Any]) -> str:
    """A page of sections, by their headings; `data` is what the script works with. Empty sections are left out."""
    style, script = (
        files("coatnet.evaluation").joinpath("page", f"report.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    shown = {heading: content for heading, content in sections.items() if content}
    links = "".join(f'<li><a href="#s{n}">{text(heading)}</a></li>' for n, heading in enumerate(shown) if heading)
    body = "".join(
        f'<section id="s{n}"><h2>{text(heading)}</h2>{content}</section>'
        if heading
        else f"<section>{content}</section>"
        for n, (heading, content) in enumerate(shown.items())
    )
    # "<" would begin or end an element within the JSON.
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{text(title)}</title>'
        f"<style>{style}</style></head><body><header><h1>{text(title)}</h1>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main>'
        f'<script type="application/json" id="data">{embedded}</script><script>{script}</script></body></html>\n'
    )


def text(content: str) -> str:
    """A text of any origin as HTML: control characters escaped, isolated from the direction of its surroundings."""
    return html.escape(one_line(content))


def table(content: Table, *, sortable: bool = False, label: str = "") -> str:
    """A table that scrolls within its frame; with `sortable` a click on a heading sorts it. `label` is its name."""

    begin, end = ('<button type="button">', "</button>") if sortable else ("", "")

    def row(cells: Iterable[str], heading: bool = False) -> str:
        kinds = (' class="number"' if number in content.numbers else "" for number in range(len(content.header)))
        return "".join(
            f'<th scope="col"{kind}>{begin}{text(cell)}{end}</th>'
            if heading
            else f"<td{kind}><bdi>{text(cell)}</bdi></td>"
            for kind, cell in zip(kinds, cells, strict=True)
        )

    head = f"<thead><tr>{row(content.header, heading=True)}</tr></thead>" if any(content.header) else ""
    body = "".join(f"<tr>{row(cells)}</tr>" for cells in content.rows)
    label = text(label or ", ".join(filter(None, content.header)) or "Details")
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {label}">'
        f"<table{kind}>{head}<tbody>{body}</tbody></table></div>"
    )


def blocks(section: Section, plots: Path | None = None) -> str:
    """The paragraphs and tables of a section, and its plots if their folder is given."""
    shown, tables = [], 0
    for block in section.blocks:
        if isinstance(block, str):
            shown.append(f"<p>{text(block)}</p>")
        elif isinstance(block, Table):
            tables += 1  # regions of one page need names of their own
            label = f"{section.title} ({tables})" if tables > 1 else section.title
            shown.append(table(block, sortable=bool(block.summary), label=label))
        elif plots is not None:
            encoded = base64.b64encode((plots / block.file).read_bytes()).decode()
            shown.append(f'<img class="plot" src="data:image/png;base64,{encoded}" alt="{text(block.shows)}">')
    return "".join(shown)


class Line(NamedTuple):
    """A curve: name in the legend, points (M, 2), number of its color, whether it is thin, whether it has dots."""

    name: str
    points: np.ndarray
    color: int
    thin: bool = False
    dots: bool = False


class Frame:
    """The axes of a plot in SVG, 480 x 300, with ranges of x and y."""

    LEFT, RIGHT, TOP, BOTTOM = 46, 470, 12, 262

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], x_label: str) -> None:
        from matplotlib.ticker import MaxNLocator

        self.x_range, self.y_range = x_range, y_range
        self.parts = [f'<text x="470" y="296" text-anchor="end">{text(x_label)}</text>']
        for axis, bounds in ((0, x_range), (1, y_range)):
            for tick in MaxNLocator(5).tick_values(*bounds):
                if not bounds[0] - 1e-9 <= tick <= bounds[1] + 1e-9:
                    continue
                x, y = self.at(tick, y_range[0]) if axis == 0 else self.at(x_range[0], tick)
                shape = (
                    f'x="{x}" y="{y + 18}" text-anchor="middle"'
                    if axis == 0
                    else f'x="{x - 6}" y="{y + 4}" text-anchor="end"'
                )
                grid = "" if axis == 0 else f'<path class="axis" d="M{x} {y}H{self.RIGHT}"/>'
                self.parts.append(f"{grid}<text {shape}>{tick:g}</text>")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the drawing; what lies above the range is drawn at its edge."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        right = self.LEFT + (self.RIGHT - self.LEFT) * (x - x0) / (x1 - x0)
        down = self.BOTTOM - (self.BOTTOM - self.TOP) * (min(max(y, y0), y1) - y0) / (y1 - y0)
        return round(right, 1), round(down, 1)

    def svg(self, label: str) -> str:
        """The drawing, with what it shows for those who cannot see it."""
        return f'<svg viewBox="0 0 480 300" role="img" aria-label="{text(label)}">{"".join(self.parts)}</svg>'


def line_chart(title: str, lines: Sequence[Line], x_label: str) -> str:
    """Curves over each other, with a legend; nothing without points."""
    lines = [line for line in lines if len(line.points)]
    if not lines:
        return ""
    every = np.concatenate([line.points for line in lines if not line.thin] or [line.points for line in lines])
    low, high = float(every[:, 1].min()), float(every[:, 1].max())
    right = max(float(line.points[:, 0].max()) for line in lines) or 1.0
    frame = Frame((0.0, right), (low, high if high > low else low + 1), x_label)
    for line in lines:
        points = line.points[np.unique(np.linspace(0, len(line.points) - 1, MAX_POINTS).round().astype(int))]
        path = "L".join("{} {}".format(*frame.at(x, y)) for x, y in points.tolist())
        frame.parts.append(f'<path class="line s{line.color}{" thin" * line.thin}" d="M{path}"/>')
        if line.dots and len(points) <= 60:
            frame.parts += [
                '<circle class="s{}" cx="{}" cy="{}" r="3"/>'.format(line.color, *frame.at(x, y))
                for x, y in points.tolist()
            ]
    named = {line.name: line.color for line in lines if line.name}
    legend = "".join(f'<span class="s{color}">{text(name)}</span>' for name, color in named.items())
    return (
        f"<figure><figcaption>{text(title)}</figcaption>{frame.svg(': '.join((title, *named)))}"
        f'<div class="legend">{legend}</div></figure>'
    )


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
    several labels an image, the log has sums over the classes, and the held-out loss is their mean.
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
    answers, total = report.answers, 0
    for row, pixels in report.examples:
        assert answers is not None
        source = data_uri(pixels)
        total += len(source)
        if total > MAX_IMAGE_BYTES:
            break
        key = f"{index[answers.truth[row]]},{index[answers.predicted[row]]}"
        name, probability = one_line(answers.images[row])[:200], round(float(answers.probability[row]), 4)
        examples[key].append([name, probability, source, int(max(pixels.shape[:2]) <= 64)])
    return {"classes": [one_line(name) for name in report.classes], "cells": cells, "examples": examples}


def data_uri(pixels: np.ndarray) -> str:
    """An image, uint8 (H, W, 3), as WebP within a URL."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "webp", quality=75, method=2)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"


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
