"""Arguments of the verbs that look things over: the family, and data."""

import argparse
from collections.abc import Sequence

from coatnet.arguments.parser import DATA_HELP, Parser


def models_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "models",
        "The family: parameters, and multiply-accumulates of one image at 224, 384 and 512 pixels (the table:\n"
        "only of the paper's rows), counted as you wait, with the paper's figures beside them.",
        "examples:\n  coatnet models\n  coatnet models coatnet-0 coatnet-1 --json",
    )
    parser.add_argument("names", nargs="*", metavar="MODEL", help="only these")
    parser.add_argument("--json", action="store_true", help="numbers for a program rather than a table for people")
    return parser.parse(arguments)


def doctor_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "doctor",
        "Read every picture and say what is there: which files are bad and why, and which pictures stand\n"
        "both in training and in validation. Exit code 1 if something is wrong.",
        f"examples:\n  coatnet doctor path/to/folder\n  coatnet doctor labels.csv --strict\n\n{DATA_HELP}",
    )
    parser.add_argument("data", metavar="DATA", help="a data source, see below")
    parser.add_argument("--strict", action="store_true", help="also name files that decode only with a warning")
    return parser.parse(arguments)
