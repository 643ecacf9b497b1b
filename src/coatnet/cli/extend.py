"""`coatnet extend`: add classes to a trained model from a few images each."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import BUNDLE_HELP, DATA_HELP, Parser
from coatnet.system.terminal import echo_summary, summary_of_a_write


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "extend",
        "Add classes to a trained model from a few images each, in seconds: the network stays as it is, and a\n"
        "classifier of all classes is found on its features, by the best of several methods. What the old\n"
        "classes lose is measured if --old gives images of them.",
        "examples:\n"
        "  coatnet extend runs/mine --data new/classes --out runs/more\n"
        f"  coatnet extend runs/mine --data new/classes --old path/to/folder --out runs/more\n\n{DATA_HELP}",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--data", required=True, metavar="DATA", help="images of the new classes, see below")
    parser.add_argument("--old", metavar="DATA", help="images of the old classes: fitted to, measured before and after")
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="SHARE",
        help="accuracy that the old classes may lose, by their training images; 0.01 is one percentage point (0.01)",
    )
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="folder for the model of all classes")
    parser.add_batch_size()
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, for a program")
    parser.add_max_megapixels()
    parser.add_device()
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Add classes, write the bundle, and print what was gained and lost."""
    given = parse_arguments(arguments)
    from coatnet.bundle.bundle import require_bundle_place
    from coatnet.bundle.config import readable_json
    from coatnet.evaluation import extend

    target = require_bundle_place(given.out, sources=[given.bundle])
    options = {} if given.max_drop is None else {"max_drop": given.max_drop}
    made = extend(given.bundle, given.data, old=given.old, batch_size=given.batch_size, device=given.device, **options)
    figures = (readable_json(made.bundle.record["extension"]) if given.json else made.to_text()).rstrip()
    with summary_of_a_write(figures):
        made.bundle.save(target)
    if not given.json:
        echo_summary(f"The model of {len(made.bundle.classes)} classes is {given.out}.")
    return 0
