"""A page with images, for people to look through: one HTML file that asks for nothing from outside."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coatnet.errors import one_line
from coatnet.system.files import atomic_write, output_path, translate_write_errors

MAX_IMAGE_BYTES = 8_000_000  # chosen: with the text a page stays below 10 MB, which browsers and mail take
THUMBNAIL_PIXELS = 96  # of the longer side
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif }
body { margin: 1rem auto; max-width: 80rem; padding: 0 1rem }
ul { display: flex; flex-wrap: wrap; gap: .75rem; list-style: none; padding: 0 }
li { width: 12.5rem; border: 1px solid #8886; border-radius: .4rem; padding: .5rem; overflow-wrap: anywhere }
img { width: 5.6rem; height: 5.6rem; object-fit: contain; background: #fff }
p { margin: .2rem 0 }
"""


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
    style = base64.b64encode(sha256(_STYLE.encode()).digest()).decode()
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><main><h1>{_text(title)}</h1>"
    ]
    filled = [section for section in sections if section.total]
    for section in filled:
        parts.append(f"<h2>{_text(section.title)} ({section.total:,})</h2><ul>")
        left, shown = MAX_IMAGE_BYTES // len(filled), 0
        for entry in section.entries:
            tile = _tile(entry)
            left -= len(tile)
            if left < 0:
                break
            parts.append(tile)
            shown += 1
        parts.append("</ul>")
        if shown < section.total:
            parts.append(f"<p>{section.total - shown:,} more are not shown here.</p>")
    if not filled:
        parts.append("<p>Nothing was found.</p>")
    with translate_write_errors(path):
        atomic_write(output_path(path), "\n".join([*parts, "</main></body></html>\n"]))


def _tile(entry: Entry) -> str:
    alternative = _text(entry.lines[0]) if entry.lines else ""
    images = "".join(f'<img alt="{alternative}" src="{_data_url(image)}">' for image in entry.images)
    return f"<li>{images}{''.join(f'<p>{_text(line)}</p>' for line in entry.lines)}</li>"


def _data_url(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _text(name: str) -> str:
    """A name as text of the page, without control characters and marks that turn its direction."""
    return html.escape(one_line(name).encode(errors="replace").decode(), quote=True)
