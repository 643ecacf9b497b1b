"""`coatnet suggest`: rank images without labels by what a label would teach a model."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import BUNDLE_HELP, Parser, print_unreadable
from coatnet.errors import counted
from coatnet.system.files import require_absent
from coatnet.system.terminal import echo_summary


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "suggest",
        "Rank images without labels: first those to label next, of which the model is unsure and which differ from\n"
        "each other, then the others by how unsure it is. The table has the columns path, label (empty: fill it in),\n"
        "suggested (what the model says) and score (how sure it is); its labeled rows are data for `coatnet train`.",
        "examples:\n  coatnet suggest runs/mine --images unlabeled --out ranked.csv",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--images", nargs="+", required=True, metavar="PATH", help="files and folders of images")
    parser.add_argument(
        "--out", required=True, metavar="FILE.csv", help="new table, in a folder of which the images are below"
    )
    parser.add_argument("--count", type=int, default=100, metavar="N", help="how many will be labeled next (100)")
    parser.add_batch_size()
    parser.add_max_megapixels()
    parser.add_device()
    given = parser.parse(arguments)
    if not given.out.lower().endswith(".csv"):
        parser.error(f"--out {given.out} is no .csv")
    require_absent(given.out)
    return given


def run(arguments: Sequence[str]) -> int:
    """Rank images and write the table."""
    given = parse_arguments(arguments)
    from coatnet.data.folder import open_images
    from coatnet.data.manifest import require_below_table
    from coatnet.evaluation.suggest import suggest

    images = open_images(given.images)
    require_below_table(given.out, [images.path(index) for index in range(len(images))])
    found = suggest(given.bundle, images, count=given.count, batch_size=given.batch_size, device=given.device)
    found.write(given.out)
    echo_summary(
        f"{given.out}: {counted(len(found.paths), 'image')}; the first {found.num_picked:,} are those to label next"
    )
    return print_unreadable(found.bad_images)
