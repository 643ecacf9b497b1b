"""`coatnet rename`: give classes of a trained model other names."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import BUNDLE_HELP, Parser
from coatnet.errors import UserError
from coatnet.system.terminal import echo_summary


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "rename",
        "Give classes of a trained model other names; its answers, calibration and figures stay as they are.",
        "examples:\n  coatnet rename runs/mine 'T-shirt/top=T-shirt' Bag=Handbag --out runs/renamed",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("names", nargs="+", metavar="OLD=NEW", help="a present name and the new one")
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="folder for the renamed model")
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Rename classes and write the bundle."""
    given = parse_arguments(arguments)
    names = dict(parse_pairs(given.names, "OLD=NEW", "Bag=Handbag"))
    from coatnet.bundle import load
    from coatnet.bundle.bundle import require_bundle_place
    from coatnet.bundle.classes import rename_classes

    target = require_bundle_place(given.out, sources=[given.bundle])
    rename_classes(load(given.bundle), names).save(target)
    echo_summary(f"The renamed model is {given.out}.")
    return 0


def parse_pairs(texts: Sequence[str], option: str, example: str) -> list[tuple[str, str]]:
    """Texts `A=B` as pairs. Raises UserError for another text, or if two begin alike."""
    pairs = []
    for text in texts:
        first, equals, second = text.partition("=")
        if not (first.strip() and equals and second.strip()):
            raise UserError(f"{option}: {text[:100]!r} is not a pair such as {example}")
        pairs.append((first, second))
    if len({first for first, _ in pairs}) < len(pairs):
        raise UserError(f"{option}: a name is given twice; each stands once before =")
    return pairs
