"""`coatnet doctor`: check a data source before training on it."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import DATA_HELP, FAILED, Parser
from coatnet.system.terminal import echo


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "doctor",
        "Read every image and report what is there: classes and sizes, unreadable files with the reason, duplicates\n"
        "with conflicting labels, and images that are in both training and validation. Exit code 1 if something\n"
        "is wrong.",
        f"examples:\n  coatnet doctor path/to/folder\n  coatnet doctor labels.csv --strict\n\n{DATA_HELP}",
    )
    parser.add_argument("data", metavar="DATA", help="a data source, see below")
    parser.add_argument("--strict", action="store_true", help="also report files that decode only with a warning")
    parser.add_max_megapixels()
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Check a data source and print what was found."""
    given = parse_arguments(arguments)
    from coatnet.data.inspection import inspect

    inspection = inspect(given.data, strict=given.strict)
    echo(inspection.describe())
    return 0 if inspection.healthy else FAILED
