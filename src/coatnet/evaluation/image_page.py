"""A page with images, for people to look through: one HTML file that asks for nothing from outside."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coatnet.evaluation.html_page import data_uri, page, text
from coatnet.system.files import atomic_write, output_path, translate_write_errors

MAX_IMAGE_BYTES = 8_000_000  # chosen: with the text a page stays below 10 MB, which browsers and mail take
THUMBNAIL_PIXELS = 96  # of the longer side


class Entry(NamedTuple):
    """One tile of the page: one image or two that are compared, each uint8 (H, W, 3), and lines of text below."""

    images: Sequence[NDArray[np.uint8]]
    lines: Sequence[str]


class Section(NamedTuple):
    """A heading, the number of its entries, and the entries, worst first, made when they are written."""

    title: str
    total: int
    entries: Iterable[Entry]


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page; sections share the bytes for images, and a line says how many entries did not fit.

    Raises:
        UserError: it cannot be written.
    """
    filled = [section for section in sections if section.total]
    shown = {
        f"{section.title} ({section.total:,})": _tiles(section, MAX_IMAGE_BYTES // len(filled)) for section in filled
    }
    with translate_write_errors(path):
        content = page(title, shown or {"": "<p>Nothing was found.</p>"})
        atomic_write(output_path(path), content, errors="backslashreplace")


def _tiles(section: Section, num_bytes: int) -> str:
    """The entries of a section, as far as they fit into so many bytes."""
    tiles = list[str]()
    for entry in section.entries:
        tile = _tile(entry)
        num_bytes -= len(tile)
        if num_bytes < 0:
            break
        tiles.append(tile)
    left_out = section.total - len(tiles)
    more = f"<p>{left_out:,} more are not shown here.</p>" if left_out else ""
    return f'<ul class="images worst">{"".join(tiles)}</ul>{more}'


def _tile(entry: Entry) -> str:
    alternative = text(entry.lines[0][:200]) if entry.lines else ""
    images = "".join(f'<img alt="{alternative}" src="{data_uri(image)}">' for image in entry.images)
    pair = f'<div class="pair">{images}</div>' if len(entry.images) > 1 else images
    return f"<li>{pair}{''.join(f'<p><bdi>{text(line)}</bdi></p>' for line in entry.lines)}</li>"
