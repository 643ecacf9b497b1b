"""Arguments of the verbs that use a finished model."""

import argparse
from collections.abc import Sequence

from coatnet.cli.arguments.parser import BUNDLE_HELP, DATA_HELP, Parser


def evaluate_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "evaluate",
        "Measure a finished model: top-1, top-5, likelihood, calibration, every class (several labels: mAP).",
        "examples:\n"
        "  coatnet evaluate runs/clothes/bundle --data fashion-mnist-small\n"
        "  coatnet evaluate runs/mine/bundle --data other/images --split all --json > report.json\n\n"
        f"{DATA_HELP}",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--data", required=True, metavar="X", help="what to measure on; classes are matched by name")
    parser.add_argument("--split", choices=("validation", "training", "all"), default="validation", help="which part")
    parser.add_argument("--json", action="store_true", help="numbers for a program rather than a page for people")
    return parser.parse(arguments)


def features_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "features",
        "Write what a finished model makes of each image in front of its classifier, a row of numbers an image.",
        "examples:\n"
        "  coatnet features runs/mine/bundle --data labels.csv --out all.npy      # all.csv names the rows\n"
        "  coatnet features runs/mine/bundle --images holiday.jpg more/images --out found.parquet\n\n" + DATA_HELP,
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="X", help="images with labels, of any classes")
    source.add_argument("--images", nargs="+", metavar="PATH", help="or without: images, and folders of images")
    parser.add_argument("--out", required=True, metavar="FILE", help=".npy with a .csv beside it, or .parquet; new")
    parser.add_argument(
        "--split", choices=("validation", "training", "all"), default="all", help="which part of X (all)"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once (32)")
    given = parser.parse(arguments)
    if given.images and given.split != "all":
        parser.error("--split is for --data; of --images all are taken")
    return given


def probe_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "probe",
        "Judge a model's features: a linear probe and nearest neighbours, learned on the training split and measured\n"
        "on the validation split.",
        f"examples:\n  coatnet probe runs/mine/bundle --data other/images --k 10 --json\n\n{DATA_HELP}",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--data", required=True, metavar="X", help="training and validation images of any classes")
    parser.add_argument("--k", type=int, default=20, metavar="K", help="neighbours that vote (20)")
    parser.add_argument("--json", action="store_true", help="numbers for a program rather than lines for people")
    return parser.parse(arguments)


def push_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "push",
        "Publish a finished model on the Hugging Face hub: weights, config and model card in one commit.\n"
        "Log in first (`hf auth login`) or set HF_TOKEN.",
        "examples:\n"
        "  coatnet push runs/mine/bundle my-name/garments\n"
        "  coatnet predict my-name/garments image.jpg           # by anyone, anywhere",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of a finished model, such as RUN/bundle")
    parser.add_argument("repository", metavar="OWNER/NAME", help="made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make it private, if it is made")
    return parser.parse(arguments)
