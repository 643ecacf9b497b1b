"""`coatnet features`: write the features that a trained model computes from images to a file."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import BUNDLE_HELP, DATA_HELP, Parser, print_unreadable
from coatnet.errors import counted
from coatnet.system.terminal import echo_summary


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "features",
        "Write the features of images: the vector that a trained model feeds to its classifier, one row per image.\n"
        "They serve search, clustering and classifiers of your own. An unreadable image is named, left out, and\n"
        "makes the exit code 1.",
        "examples:\n"
        "  coatnet features runs/mine --data labels.csv --out all.npy      # all.csv names the rows\n"
        "  coatnet features runs/mine --images holiday.jpg more/images --out found.parquet\n\n" + DATA_HELP,
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DATA", help="images with labels, of any classes, see below")
    source.add_argument("--images", nargs="+", metavar="PATH", help="images without labels: files and folders")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="new file: .npy (with a .csv beside it) or .parquet"
    )
    parser.add_argument(
        "--split",
        choices=("validation", "training", "test", "all"),
        default="all",
        help="which part of the data; all is training and validation (all)",
    )
    parser.add_batch_size(32)
    parser.add_max_megapixels()
    parser.add_device()
    parser.rename_option("--pictures", "--images", since="0.2", removed_in="0.3")
    given = parser.parse(arguments)
    if given.images and given.split != "all":
        parser.error("--split is for --data; --images are all taken")
    return given


def run(arguments: Sequence[str]) -> int:
    """Write the features of images to a file."""
    given = parse_arguments(arguments)
    from coatnet.data.folder import open_images
    from coatnet.evaluation import extract_features, write_features

    data = open_images(given.images) if given.data is None else given.data
    features = extract_features(given.bundle, data, split=given.split, batch_size=given.batch_size, device=given.device)
    num_images = write_features(features, given.out)
    echo_summary(f"{given.out}: {counted(num_images, 'image')}, {features.num_features:,} features each")
    return print_unreadable(features.bad_images)
