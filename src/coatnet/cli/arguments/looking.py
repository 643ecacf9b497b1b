"""Arguments of the verbs that look things over: the family, data, and what a training will take."""

import argparse
from collections.abc import Sequence

from coatnet.cli.arguments.parser import DATA_HELP, Parser
from coatnet.data.shards.block_cache import sized
from coatnet.errors import UserError


def models_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "models",
        "The family: parameters, and multiply-accumulates of one image at 224, 384 and 512 pixels (in the\n"
        "table rows for small images at their own size), counted as you wait, with the paper's figures beside them.",
        "examples:\n  coatnet models\n  coatnet models coatnet-0 coatnet-1 --json",
    )
    parser.add_argument("names", nargs="*", metavar="MODEL", help="only these")
    parser.add_argument("--json", action="store_true", help="numbers for a program rather than a table for people")
    return parser.parse(arguments)


def doctor_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "doctor",
        "Read every image and say what is there: which files are bad and why, and which images stand\n"
        "both in training and in validation. Exit code 1 if something is wrong.",
        f"examples:\n  coatnet doctor path/to/folder\n  coatnet doctor labels.csv --strict\n\n{DATA_HELP}",
    )
    parser.add_argument("data", metavar="DATA", help="a data source, see below")
    parser.add_argument("--strict", action="store_true", help="also name files that decode only with a warning")
    return parser.parse(arguments)


def pack_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "pack",
        "Write images as tar shards (WebDataset layout) with a side index, which --data then takes: from a folder,\n"
        "or from s3://, gs:// and http:// once the folder is copied there. Each image is decoded once, those that\n"
        "fail are left out and named (exit code 1), and each shard is read back. Stopped, it goes on from there.",
        "examples:\n"
        "  coatnet pack path/to/folder packed\n"
        "  coatnet pack labels.csv packed --shard-size 1GB --workers 16\n"
        "  coatnet train --data s3://bucket/packed --out runs/mine        # after copying the folder there\n\n"
        + DATA_HELP,
    )
    parser.add_argument("data", metavar="DATA", help="a data source, see below")
    parser.add_argument("out", metavar="OUT", help="folder to write, new")
    parser.add_argument("--shard-size", type=_size, default=_size("256MB"), metavar="S", help="of a tar, about (256MB)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one a core)")
    return parser.parse(arguments)


def _size(text: str) -> int:
    try:
        return sized(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def plan_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "plan",
        "What a training on many GPUs will take: the fastest layout that fits, memory of a GPU, steps, days, and the\n"
        "command that starts it. Memory is counted in a rehearsal of one step without any GPU; a minute at most.",
        "examples:\n"
        "  coatnet plan coatnet-0 --gpus 8 --gpu-memory 24\n"
        "  coatnet plan coatnet-7 --gpus 256 --gpu-memory 80 --data 3e9 --launcher slurm\n"
        "  coatnet plan coatnet-4 --gpus 32 --gpu-memory 80 --gpu H100 --recipe imagenet-21k-to-1k-512 --json",
    )
    parser.add_argument("model", metavar="MODEL", help="a name of `coatnet models`")
    parser.add_argument("--gpus", type=_whole, required=True, metavar="N", help="how many in all")
    parser.add_argument("--gpu-memory", type=float, required=True, metavar="G", help="of one of them, GB (10^9 bytes)")
    parser.add_argument("--data", type=_whole, metavar="P", help="images of an epoch, such as 3e9 (the recipe's)")
    parser.add_argument("--resolution", type=_whole, metavar="R", help="side of the images, pixels (the recipe's)")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="a recipe of `coatnet train --help`; by default the paper's for so\nmany images, or for the model",
    )
    parser.add_argument("--epochs", type=float, metavar="E", help="passes over the images (the recipe's)")
    parser.add_argument("--batch-size", type=_whole, metavar="B", help="images of one optimizer step (the recipe's)")
    parser.add_argument("--gpus-per-node", type=_whole, metavar="N", help="GPUs of one machine (8, or all if fewer)")
    parser.add_argument("--gpu", metavar="NAME", help="its name, for its speed: A100-80GB, H100, ... (by its memory)")
    parser.add_argument("--mfu", type=float, metavar="U", help="share of the GPU's bf16 rate that is used (0.3)")
    parser.add_argument("--reserve", type=float, metavar="S", help="share of the memory to leave free (0.1)")
    parser.add_argument(
        "--launcher", choices=("torchrun", "slurm", "kubernetes", "skypilot"), default="torchrun", help="what starts it"
    )
    parser.add_argument("--json", action="store_true", help="numbers for a program rather than a page for people")
    return parser.parse(arguments)


def _whole(text: str) -> int:
    """3000000000, or 3e9."""
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, such as 64 or 3e9")
    return int(number)
