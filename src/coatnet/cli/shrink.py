"""`coatnet shrink`: leave classes of a trained model out, or make one of several, without training."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import BUNDLE_HELP, Parser
from coatnet.cli.rename import parse_pairs
from coatnet.errors import UserError
from coatnet.system.terminal import echo_summary


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "shrink",
        "Leave classes of a trained model out, or make one of several, without training and without images. The\n"
        "probabilities that stay are shared among the classes that stay; that of a merged class is about the sum of\n"
        "those of its parts. The result is not calibrated: `coatnet calibrate` does that, with images.",
        "examples:\n"
        "  coatnet shrink runs/mine --drop Bag Sandal --out runs/fewer\n"
        "  coatnet shrink runs/mine --merge shoe='Sneaker,Ankle boot' top=Shirt,Pullover --out runs/fewer",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--drop", nargs="+", default=[], metavar="CLASS", help="classes to leave out")
    parser.add_argument(
        "--merge", nargs="+", default=[], metavar="NEW=A,B", help="a new name, and the classes that become this one"
    )
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="folder for the model of fewer classes")
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Change the classes, write the bundle, and print what it has."""
    given = parse_arguments(arguments)
    if not given.drop and not given.merge:
        raise UserError("nothing is to be changed: give --drop CLASS ... or --merge NEW=A,B ...")
    groups = {new: parts.split(",") for new, parts in parse_pairs(given.merge, "--merge", "shoe=Sneaker,Sandal")}
    from coatnet.bundle import load
    from coatnet.bundle.bundle import require_bundle_place
    from coatnet.bundle.classes import drop_classes, merge_classes

    target, bundle = require_bundle_place(given.out, sources=[given.bundle]), load(given.bundle)
    lines = []
    if groups:  # first: it needs what calibration knows
        bundle, agreement = merge_classes(bundle, groups)
        lines.append(f"{100 * agreement:.1f} % of typical images get the class that sums of probabilities would give")
    if given.drop:
        bundle = drop_classes(bundle, given.drop)
    bundle.save(target)
    lines.append(f"The model of {len(bundle.classes)} classes is {given.out}. It is not calibrated.")
    echo_summary("\n".join(lines))
    return 0
