"""`coatnet pack`: write a data source as tar shards."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import DATA_HELP, Parser, print_unreadable
from coatnet.data.shards.storage import parse_bytes
from coatnet.errors import UserError, counted
from coatnet.system.terminal import echo_summary


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "pack",
        "Write images as tar shards (WebDataset layout) with an index beside them, for `--data OUT`: as a folder, or\n"
        "behind s3://, gs:// or http:// once it is copied there. Each image is decoded once; unreadable ones are\n"
        "named and left out (exit code 1). Each shard is read back and checked. The same command resumes.",
        "examples:\n"
        "  coatnet pack path/to/folder packed\n"
        "  coatnet pack labels.csv packed --shard-size 1GB --workers 16\n"
        "  coatnet train --data s3://bucket/packed --out runs/mine        # after copying the folder there\n\n"
        + DATA_HELP,
    )
    parser.add_argument("data", metavar="DATA", help="a data source, see below")
    parser.add_argument("out", metavar="OUT", help="new folder to write")
    parser.add_argument(
        "--shard-size", type=_size, default=_size("256MB"), metavar="SIZE", help="approximate size of a tar (256MB)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="worker processes (one per CPU core)")
    parser.add_max_megapixels()
    return parser.parse(arguments)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(arguments: Sequence[str]) -> int:
    """Write a data source as tar shards and print their number and size."""
    given = parse_arguments(arguments)
    from coatnet.data.shards.pack import pack

    packed = pack(given.data, given.out, shard_bytes=given.shard_size, num_workers=given.workers)
    size = f"{counted(packed.num_shards, 'shard')}, {packed.num_bytes / 1e6:,.1f} MB"
    echo_summary(f"{given.out}: {counted(packed.num_images, 'image')} in {size}, each read back and checked")
    return print_unreadable(packed.bad_images)
