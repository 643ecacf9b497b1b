"""`coatnet doctor`: check a data source before training on it."""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from coatnet.cli.parser import BUNDLE_HELP, DATA_HELP, FAILED, Parser
from coatnet.errors import UserError, counted
from coatnet.system.files import require_absent
from coatnet.system.terminal import echo

if TYPE_CHECKING:
    from coatnet.data.inspection import Inspection, Place
    from coatnet.data.splits import Splits
    from coatnet.evaluation.image_page import Entry
    from coatnet.evaluation.label_check import LabelCheck


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "doctor",
        "Read every image and report what is there: classes and sizes, unreadable files with the reason, copies and\n"
        "near copies, those with conflicting labels or in two of training, validation and test, classes that size,\n"
        "brightness or color give away. With --labels also wrong labels, outliers and classes that look the same.\n"
        "Exit code 1 if an image is unreadable or in two of the splits; with --strict also if one decodes\n"
        "only with a warning.",
        "examples:\n"
        "  coatnet doctor path/to/folder\n"
        "  coatnet doctor labels.csv --strict --json\n"
        "  coatnet doctor path/to/folder --labels --model runs/mine --html suspects.html --write path/to/fixed.csv\n"
        f"  coatnet train --data path/to/fixed.csv --out runs/next     # once its column label is right\n\n{DATA_HELP}",
    )
    parser.add_argument("data", metavar="DATA", help="a data source, see below")
    parser.add_argument("--strict", action="store_true", help="also report files that decode only with a warning")
    parser.add_argument(
        "--labels", action="store_true", help="also look for wrong labels, by the features of the model of --model"
    )
    parser.add_argument(
        "--model", metavar="BUNDLE", help=f"with --labels: {BUNDLE_HELP}; auto: the published one that suits the images"
    )
    parser.add_argument(
        "--write",
        metavar="FILE.csv",
        help="table for `coatnet train --data` without copies and unreadable images: path, label, split; with --labels "
        "also suggested and score, the worst first",
    )
    parser.add_argument("--html", metavar="FILE.html", help="page with the images that were found, the worst first")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, for a program")
    parser.add_max_megapixels()
    parser.add_device()
    given = parser.parse(arguments)
    if given.labels and not given.model:
        parser.error(
            "--labels needs --model: a bundle of your own, such as one trained on these images, or auto, the published "
            "network that suits them, which is fetched once"
        )
    for name, ending in (("write", ".csv"), ("html", ".html")):
        path = getattr(given, name)
        if path and not path.lower().endswith(ending):
            parser.error(f"--{name} {path} is no {ending}")
        if path:
            require_absent(path)
    if given.model and not given.labels:
        parser.error("--model is for --labels: give that as well")
    return given


def run(arguments: Sequence[str]) -> int:
    """Check a data source and print what was found."""
    given = parse_arguments(arguments)
    from coatnet.bundle.config import readable_json
    from coatnet.data.inspection import inspect
    from coatnet.data.open import open_dataset
    from coatnet.data.shards.dataset import ShardDataset

    splits = open_dataset(given.data)
    for part in splits.parts.values():
        if isinstance(part, ShardDataset):
            part.verify_when_read()
    if given.write:
        require_files(given.write, splits)
    opened = None
    if given.labels:
        from coatnet.evaluation.label_check import open_for_labels

        opened = open_for_labels(given.model, splits, given.device)
    inspection, check = inspect(splits, strict=given.strict), None
    try:
        if opened is not None:
            from coatnet.evaluation.label_check import check_opened

            check = check_opened(opened._replace(splits=inspection.splits))
        if given.write:
            write_table(given.write, inspection, check)
        if given.html:
            write_page(given.html, inspection, check)
    finally:  # the findings are printed even if labels cannot be checked or files not written
        if given.json:
            labels = {"labels": check.to_dict()} if check else {}
            echo(readable_json(inspection.to_dict() | labels), end="", is_json=True)
        else:
            if check:
                echo(check.describe())
            echo(inspection.describe())
    if given.write and not given.json:
        reasons = list(inspection.left_out.values())
        left_out = [f"{reasons.count(reason):,} {reason}" for reason in dict.fromkeys(reasons)]
        without = f", without {', '.join(left_out)}" if left_out else ""
        echo(f"{given.write}: {counted(len(inspection.rows()), 'image')}{without}")
    return 0 if inspection.healthy else FAILED


def require_files(path: str, splits: "Splits") -> None:
    """Raise UserError if no table of these images may be written to a path."""
    from coatnet.data.datasets import FileDataset
    from coatnet.data.manifest import require_below_table

    parts = [part for part in splits.parts.values() if isinstance(part, FileDataset)]
    if len(parts) < len(splits.parts):
        raise UserError(f"{splits.name}: --write names files of images, and these have none of their own")
    require_below_table(path, [part.path(index) for part in parts for index in range(len(part))], splits.classes)


def write_table(path: str, inspection: "Inspection", check: "LabelCheck | None") -> None:
    """Write the images that can be used as a table, the worst labels first."""
    from coatnet.data.datasets import FileDataset
    from coatnet.data.manifest import write_manifest

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


def write_page(path: str, inspection: "Inspection", check: "LabelCheck | None") -> None:
    """Write the page with the images that were found."""
    from coatnet.data.loader import read_image
    from coatnet.evaluation import image_page
    from coatnet.evaluation.evaluate import thumbnail
    from coatnet.evaluation.image_page import Entry, Section

    splits = inspection.splits
    places: dict[tuple[str, str], Place] = {}
    if check:
        every = ((split, index) for split in ("training", "validation") for index in range(len(getattr(splits, split))))
        places = {(place[0], inspection.name(place)): place for place in every}

    def entry(shown: Sequence["Place"], *lines: str) -> "Entry":
        pixels = (read_image(splits.parts[split], index)[0] for split, index in shown)
        images = [thumbnail(each, image_page.THUMBNAIL_PIXELS) for each in pixels]
        return Entry(images, lines)

    def pairs(found: Sequence[tuple["Place", "Place"]]) -> Iterator["Entry"]:
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
    image_page.write_page(path, f"{splits.name}: what doctor found", sections)
