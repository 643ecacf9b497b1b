"""Pages of HTML that ask for nothing outside of themselves: sections, tables, curves, images.

Script and style are named in the content security policy by their hashes, so nothing else runs, whatever a class is
called. Images are data, plots are SVG.
"""

import base64
import hashlib
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from coatnet.errors import one_line
from coatnet.system.document import Section, Table

MAX_POINTS = 400  # of a curve


def page(title: str, sections: Mapping[str, str], data: Mapping[str, Any] | None = None) -> str:
    """A page of sections, by their headings. Empty sections are left out.

    Args:
        title: of the page.
        sections: HTML by heading; the one without a heading goes first, without a link.
        data: what the script works with, which sorts tables and shows the cells of a confusion matrix; None for a page
            without a script.
    """
    style, script = (
        files("coatnet.evaluation").joinpath("page", f"report.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    allowed_script, scripts = "", ""
    if data is not None:
        # "<" would begin or end an element within the JSON.
        embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        allowed_script = f"script-src 'sha256-{hashes[1]}'; "
        scripts = f'<script type="application/json" id="data">{embedded}</script><script>{script}</script>'
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; {allowed_script}"
        "base-uri 'none'; form-action 'none'"
    )
    shown = {heading: content for heading, content in sections.items() if content}
    links = "".join(f'<li><a href="#s{n}">{text(heading)}</a></li>' for n, heading in enumerate(shown) if heading)
    navigation = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if links else ""
    body = "".join(
        f'<section id="s{n}"><h2>{text(heading)}</h2>{content}</section>'
        if heading
        else f"<section>{content}</section>"
        for n, (heading, content) in enumerate(shown.items())
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{text(title)}</title>'
        f"<style>{style}</style></head><body><header><h1>{text(title)}</h1>"
        f"{navigation}</header><main>{body}</main>"
        f"{scripts}</body></html>\n"
    )


def text(content: str) -> str:
    """A text of any origin as HTML: control characters escaped, isolated from the direction of its surroundings."""
    return html.escape(one_line(content))


def data_uri(pixels: np.ndarray) -> str:
    """An image, uint8 (H, W, 3), as WebP within a URL."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "webp", quality=75, method=2)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"


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
