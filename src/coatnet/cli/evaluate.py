"""`coatnet evaluate`: measure a trained model on labeled images."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import BUNDLE_HELP, DATA_HELP, Parser
from coatnet.errors import UserError
from coatnet.system.files import require_outside, translate_write_errors, user_path
from coatnet.system.terminal import echo


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "evaluate",
        "Measure a trained model on labeled images: accuracy (top-1, top-5), log-likelihood, calibration and each\n"
        "class, with 95 % intervals; for images with several labels, mean average precision.",
        "examples:\n"
        "  coatnet evaluate runs/clothes --data fashion-mnist-small\n"
        "  coatnet evaluate runs/mine --data other/images --split all --out measured   # measured/report.html\n"
        "  coatnet evaluate runs/mine --data path/to/folder --views flip\n\n"
        f"{DATA_HELP}",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument(
        "--data", required=True, metavar="DATA", help="labeled images, see below; classes are matched by name"
    )
    parser.add_argument(
        "--split",
        choices=("validation", "training", "test", "all"),
        default="validation",
        help="which part of the data (validation)",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="also write the report there: report.html, .md and .json, predictions.csv, plots",
    )
    parser.add_views()
    parser.add_batch_size(counts="images, or views of them,")
    parser.add_form("figures")
    parser.add_max_megapixels()
    parser.add_device()
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Measure a trained model and print its report."""
    given = parse_arguments(arguments)
    from coatnet.evaluation import evaluate, write_report
    from coatnet.evaluation.report_sections import document
    from coatnet.system.document import show
    from coatnet.system.progress import ProgressBar

    if given.out:
        check_folder(given.out, given.data)
    with ProgressBar("evaluating") as bar:
        report = evaluate(
            given.bundle,
            given.data,
            split=given.split,
            batch_size=given.batch_size,
            device=given.device,
            progress=bar.update,
            with_images=bool(given.out),
            views=given.views,
        )
    try:
        if given.out:
            with translate_write_errors(given.out):
                write_report(report, given.out)
    finally:  # a full disk costs the report, not the figures
        show(document(report), json=report.to_json() if given.json else "", markdown=given.markdown)
    if given.out:
        echo(f"coatnet: the report is {given.out}/report.html", error=True)
    return 0


def check_folder(out: str, data: str) -> None:
    """Raise UserError if a report may not be written to a folder: it is a file, a run, or among the images."""
    from coatnet.data.open import NAMES

    folder = user_path(out)
    if folder.is_file():
        raise UserError(f"{out} is a file: give a folder for out")
    if any((folder / name).exists() for name in ("recipe.yaml", "bundle", "config.json")):
        raise UserError(
            f"{out} holds a run or a bundle, whose own report would be replaced: give another folder for out"
        )
    if data not in NAMES and "://" not in data:
        require_outside(folder.absolute(), str(user_path(data).absolute()))
