"""`coatnet plan`: estimate memory, days and the launch command of a training on many GPUs."""

import argparse
import json
from collections.abc import Sequence

from coatnet.cli.parser import Parser
from coatnet.system.terminal import echo, report_wait


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "plan",
        "Estimate a training on many GPUs: the fastest layout that fits, memory per GPU, steps, days, and the command\n"
        "that starts it. Memory is counted by simulating one step, without any GPU; this takes a minute at most.",
        "examples:\n"
        "  coatnet plan coatnet-0 --gpus 8 --gpu-memory 24\n"
        "  coatnet plan coatnet-7 --gpus 256 --gpu-memory 80 --data 3e9 --launcher slurm\n"
        "  coatnet plan coatnet-4 --gpus 32 --gpu-memory 80 --gpu H100 --recipe imagenet-21k-to-1k-512 --json",
    )
    parser.add_argument("model", metavar="MODEL", help="a name of `coatnet models`")
    parser.add_argument("--gpus", type=_whole, required=True, metavar="N", help="number of GPUs in all")
    parser.add_argument(
        "--gpu-memory", type=float, required=True, metavar="GB", help="memory of one GPU, in 10^9 bytes"
    )
    parser.add_argument(
        "--data", type=_whole, metavar="N", help="images of one epoch, such as 3e9 (those of the recipe)"
    )
    parser.add_argument(
        "--resolution", metavar="R", help="side of the input images, or height x width, such as 192x320 (the recipe's)"
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="a recipe of `coatnet train --help` (the paper's for this number of images, or else for the model)",
    )
    parser.add_argument("--epochs", type=float, metavar="E", help="passes over the images (the recipe's)")
    parser.add_argument("--batch-size", type=_whole, metavar="N", help="images of one optimizer step (the recipe's)")
    parser.add_argument("--gpus-per-node", type=_whole, metavar="N", help="GPUs of one machine (8, or all if fewer)")
    parser.add_argument(
        "--gpu", metavar="NAME", help="GPU model, for its speed: A100-80GB, H100, ... (guessed from its memory)"
    )
    parser.add_argument(
        "--mfu", type=float, metavar="U", help="model FLOPs utilization: share of the GPU's bf16 peak rate (0.3)"
    )
    parser.add_argument("--reserve", type=float, metavar="S", help="share of the memory to leave free (0.1)")
    parser.add_argument(
        "--launcher",
        choices=("torchrun", "slurm", "kubernetes", "skypilot"),
        default="torchrun",
        help="what starts it: the form of the launch command (torchrun)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, for a program")
    return parser.parse(arguments)


def _whole(text: str) -> int:
    """Parse a whole number, such as 3000000000 or 3e9."""
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, such as 64 or 3e9")
    return int(number)


def run(arguments: Sequence[str]) -> int:
    """Plan a training and print the plan and the launch command."""
    given = parse_arguments(arguments)
    from coatnet.planning.cluster_plan import plan_training

    shown = ("launcher", "json", "data")
    wanted = {name: value for name, value in vars(given).items() if value is not None and name not in shown}
    with report_wait("simulating a step"):
        plan = plan_training(**wanted, num_images=given.data)
    command = plan.launch(given.launcher)
    if given.json:
        echo(json.dumps({**plan.to_dict(), "command": command}, indent=1), is_json=True)
    else:
        echo(f"{plan.describe()}\n\n{command}", end="")
    return 0
