"""`coatnet probe`: measure the features of a trained model on data of other classes, and make a model of them."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import BUNDLE_HELP, DATA_HELP, Parser
from coatnet.system.terminal import echo


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "probe",
        "Measure the features of a trained model: a linear probe and a k-nearest-neighbors classifier are fitted to\n"
        "the training split and measured on the validation split. The network itself is not trained. With --out the\n"
        "linear probe becomes a model, in minutes: with a hundred to some thousand images the first to try.",
        "examples:\n"
        "  coatnet probe auto --data path/to/folder --out runs/first     # then: coatnet predict runs/first image.jpg\n"
        f"  coatnet probe runs/mine --data other/images --k 10 --json\n\n{DATA_HELP}",
    )
    parser.add_argument(
        "bundle", metavar="BUNDLE", help=f"{BUNDLE_HELP}; auto: the published one that suits images and machine"
    )
    parser.add_argument(
        "--data", required=True, metavar="DATA", help="training and validation images of any classes, see below"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="new folder for the linear probe as a model (FOLDER/bundle) and its report"
    )
    parser.add_argument(
        "--k", type=int, metavar="K", help="number of nearest neighbors that vote (20, or all if fewer)"
    )
    parser.add_batch_size()
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, for a program")
    parser.add_max_megapixels()
    parser.add_device()
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Measure a model's features and print the figures."""
    given = parse_arguments(arguments)
    from coatnet.evaluation.probe import ProbeNotWritten, ProbeReport, probe

    def show(report: ProbeReport) -> None:
        echo(report.to_json() if given.json else report.to_text(), end="", is_json=given.json)

    options = {"k": given.k, "batch_size": given.batch_size, "device": given.device, "out": given.out}
    try:
        report = probe(given.bundle, given.data, **options)
    except ProbeNotWritten as error:
        show(error.report)
        raise
    show(report)
    return 0
