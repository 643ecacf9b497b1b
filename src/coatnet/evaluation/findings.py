"""What was found among the images of a data set: a page for people to look through, and a table to train on.

The page is one HTML file that asks for nothing from outside.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coatnet.data.datasets import FileDataset
from coatnet.data.inspection import Inspection, Place
from coatnet.data.loader import read_image
from coatnet.data.manifest import require_below_table, write_manifest
from coatnet.data.splits import Splits
from coatnet.errors import UserError
from coatnet.evaluation.evaluate import thumbnail
from coatnet.evaluation.html_page import data_uri, page, text
from coatnet.evaluation.label_check import LabelCheck
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


def require_table(path: str, splits: Splits) -> None:
    """Raise UserError if no table of these images may be written to a path."""
    parts = [part for part in splits.parts.values() if isinstance(part, FileDataset)]
    if len(parts) < len(splits.parts):
        raise UserError(f"{splits.name}: --write names files of images, and these have none of their own")
    require_below_table(path, [part.path(index) for part in parts for index in range(len(part))], splits.classes)


def write_table(path: str, inspection: Inspection, check: LabelCheck | None) -> None:
    """Write the images that can be used as a table, the worst labels first."""
    splits, rows = inspection.splits, []
    suggested = {(each.split, each.name): each.suggested for each in check.suspects} if check else {}
    for split, index in inspection.rows():
        dataset = splits.parts[split]
        assert isinstance(dataset, FileDataset)
        key = split, dataset.describe(index)
        score = check.scores.get(key) if check else None  # a test split is not judged
        judged = (suggested.get(key, ""), "" if score is None else round(score, 6)) if check else ()
        side = {"training": "train", "validation": "val"}.get(split, split)
        rows.append((dataset.path(index), dataset.label_name(index), *judged, side))
    if check:
        rows.sort(key=lambda row: (not row[2], row[3] == "", row[3]))  # the suspects first, what was not judged last
    columns = ("suggested", "score", "split") if check else ("split",)
    write_manifest(path, columns, rows, multilabel=splits.multilabel)


def write_page(path: str, inspection: Inspection, check: LabelCheck | None) -> None:
    """Write the page with the images that were found."""
    splits = inspection.splits
    places: dict[tuple[str, str], Place] = {}
    if check:
        every = ((split, index) for split in ("training", "validation") for index in range(len(getattr(splits, split))))
        places = {(place[0], inspection.name(place)): place for place in every}

    def entry(shown: Sequence[Place], *lines: str) -> Entry:
        pixels = (read_image(splits.parts[split], index)[0] for split, index in shown)
        images = [thumbnail(each, THUMBNAIL_PIXELS) for each in pixels]
        return Entry(images, lines)

    def pairs(found: Sequence[tuple[Place, Place]]) -> Iterator[Entry]:
        for one, other in found:
            names = [
                f"{inspection.name(each)} ({each[0]}: {splits.parts[each[0]].label_name(each[1])})"
                for each in (one, other)
            ]
            yield entry((one, other), *names)

    across = inspection.near_leaking
    within = [pair for pair in inspection.near if pair[0][0] == pair[1][0]]
    sections = []
    if check:
        suspects = (
            entry(
                [places[each.split, each.name]],
                each.name,
                f"{each.label}, rather {each.suggested}",
                f"{each.score:.3f}",
            )
            for each in check.suspects
        )
        sections.append(Section("Labels that look wrong", len(check.suspects), suspects))
    sections.append(Section("Nearly the same, in two splits", len(across), pairs(across)))
    sections.append(Section("Nearly the same", len(within), pairs(within)))
    if check:
        outliers = (
            entry([places[split, name]], name, f"{far:.1f} times as far from others as usual")
            for split, name, far in check.outliers
        )
        sections.append(Section("Unlike all others", len(check.outliers), outliers))
    write_image_page(path, f"{splits.name}: what doctor found", sections)


def write_image_page(path: str | Path, title: str, sections: Sequence[Section]) -> None:
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
