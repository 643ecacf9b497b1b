"""`coatnet evaluate`: measure a trained model on labeled images."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import BUNDLE_HELP, DATA_HELP, Parser
from coatnet.system.terminal import echo


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "evaluate",
        "Measure a trained model on labeled images: accuracy (top-1, top-5), log-likelihood, calibration and each\n"
        "class, with 95 % intervals; for images with several labels, mean average precision.",
        "examples:\n"
        "  coatnet evaluate runs/clothes --data fashion-mnist-small\n"
        "  coatnet evaluate runs/mine --data other/images --split all --json > report.json\n\n"
        f"{DATA_HELP}",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument(
        "--data", required=True, metavar="DATA", help="labeled images, see below; classes are matched by name"
    )
    parser.add_argument(
        "--split",
        choices=("validation", "training", "all"),
        default="validation",
        help="which part of the data (validation)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, for a program")
    parser.add_max_megapixels()
    parser.add_device()
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Measure a trained model and print its report."""
    given = parse_arguments(arguments)
    from coatnet.evaluation import evaluate, to_markdown
    from coatnet.system.progress import ProgressBar

    with ProgressBar("evaluating") as bar:
        report = evaluate(given.bundle, given.data, split=given.split, device=given.device, progress=bar.update)
    echo(report.to_json() if given.json else to_markdown(report), end="", is_json=given.json)
    return 0
