"""`coatnet compare`: finished runs beside each other on the same images."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coatnet.cli.parser import Parser
from coatnet.cli.runs import data_of
from coatnet.errors import UserError
from coatnet.system.terminal import echo

if TYPE_CHECKING:
    import numpy as np

    from coatnet.evaluation.predictions import Predictions


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "compare",
        "Compare finished runs with the first of them on the same held-out images: differences with paired intervals\n"
        "(and McNemar's exact test), images on which they disagree, curves over each other, configurations. A run of\n"
        "an earlier release, without predictions.csv, is evaluated again.",
        "examples:\n"
        "  coatnet compare runs/a runs/b\n"
        "  coatnet compare runs/a runs/b runs/c --out compare.html\n"
        "  coatnet evaluate runs/a --data other --split all --out a    # and b likewise: on other images\n"
        "  coatnet compare a b",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of `train` or `evaluate --out`, two or more")
    parser.add_argument("--out", metavar="FILE", help="also write a page, such as compare.html")
    parser.add_batch_size()
    parser.add_form("findings")
    parser.add_max_megapixels()
    parser.add_device()
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Compare runs and print what was found."""
    given = parse_arguments(arguments)
    if len(given.runs) < 2:
        raise UserError(f"compare takes two runs or more, and there is {given.runs[0]} alone")
    if given.out and Path(given.out).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {given.out} is not the name of a page: give one that ends with .html")
    from coatnet.evaluation.compare import compare, open_run
    from coatnet.system.document import show
    from coatnet.system.files import atomic_write, output_path, translate_write_errors, user_path

    paths = [user_path(path) for path in given.runs]
    found = compare([open_run(path, lambda folder: _evaluate(folder, given)) for path in paths])
    try:
        if given.out:
            with translate_write_errors(given.out):
                page = found.to_html(lambda names: _thumbnails(paths[0], found.runs[0].report, names))
                atomic_write(output_path(given.out), page, errors="backslashreplace")
    finally:  # a full disk costs the page, not the figures
        show(found.document(), json=found.to_json() if given.json else "", markdown=given.markdown)
    if given.out:
        echo(f"coatnet: the page is {given.out}", error=True)
    return 0


def _evaluate(folder: Path, given: argparse.Namespace) -> tuple[Mapping[str, Any], "Predictions"]:
    """Report and predictions of a run of an earlier release, by its bundle and the data that its recipe names."""
    from coatnet.evaluation import evaluate
    from coatnet.system.progress import ProgressBar

    data = data_of(folder)
    if data is None or not (folder / "bundle").is_dir():
        raise UserError(
            f"{folder} has neither predictions.csv nor a bundle with a recipe.yaml beside it: evaluate its model with "
            "`coatnet evaluate --out`, and compare that folder"
        )
    with ProgressBar(f"evaluating {folder}") as bar:
        report = evaluate(
            folder / "bundle",
            data,
            batch_size=given.batch_size,
            device=given.device,
            progress=bar.update,
            with_images=False,
        )
    assert report.predictions is not None
    return report.to_dict(), report.predictions


def _thumbnails(folder: Path, report: Mapping[str, Any], names: Sequence[str]) -> dict[str, "np.ndarray"]:
    """Images of the data that the recipe of a run names, whatever their split; none if the report is on other data, or
    the data cannot be opened any more."""
    from coatnet.data.decode import BadImage
    from coatnet.data.loader import read_image
    from coatnet.data.open import open_dataset
    from coatnet.evaluation.evaluate import EXAMPLE_PIXELS, thumbnail

    images, wanted = {}, set(names)
    with suppress(UserError, OSError):
        if (data := data_of(folder)) is None:
            return {}
        splits = open_dataset(data, evaluation=True, multilabel=bool(report.get("multilabel")))
        for part in splits.parts.values() if splits.name == report.get("data") else ():
            for index in range(len(part)):
                if (name := part.describe(index)) in wanted:
                    with suppress(BadImage):
                        images[name] = thumbnail(read_image(part, index)[0], EXAMPLE_PIXELS)
    return images
