"""Images a second of a CoAtNet beside timm's, alternately in one process.

    python benchmarks/model.py                                # all of it, about half an hour on two cores
    python benchmarks/model.py --mode eager --task inference
    python benchmarks/model.py --downsample expand

Both run channels-last with the same allocator and the same images, and are the same network: the stride of a stage is
in the depthwise convolution, as timm has it. With `--downsample expand` ours has it in the 1x1 convolution before, as
in equation 5 and by default, which is less work. The floor of a row is the time that the multiply-accumulates of ours
would take at the rate of a large matrix product of the same dtype, measured in the same process; "share of floor" is
that time over ours.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from floor import product_rate
from rich.console import Console
from rich.table import Table
from rounds import alternate, timed

import coatnet
from coatnet.model.complexity import complexity
from coatnet.system.hardware import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINING_COST = 3  # forward, and two products of the same size backward
WARMING_ROUNDS = 4  # not counted: compilation, and the heap takes a few steps to reach its size


def main() -> None:
    arguments = parse()
    keep_freed_memory()
    torch.manual_seed(0)
    images = torch.randn(arguments.batch_size, 3, arguments.resolution, arguments.resolution)
    images = images.contiguous(memory_format=torch.channels_last)
    macs = (
        complexity(arguments.model, arguments.resolution, downsample=arguments.downsample).macs * arguments.batch_size
    )
    table = Table("dtype", "mode", "task", "ours img/s", "timm img/s", "ratio", "ratios", "share of floor")
    for task, mode, dtype in itertools.product(arguments.task, arguments.mode, arguments.dtype):
        run = inference if task == "inference" else training
        networks = contenders(arguments, mode)
        works = {name: timed(run(network, images, DTYPES[dtype])) for name, network in networks.items()}
        seconds = alternate(works, arguments.rounds, WARMING_ROUNDS)
        ratios = sorted(theirs / own for own, theirs in zip(*seconds.values(), strict=True))
        own, theirs = (arguments.batch_size / statistics.median(each) for each in seconds.values())
        cost = TRAINING_COST if task == "training" else 1
        floor = 2 * macs * cost / product_rate(DTYPES[dtype])
        share = floor / statistics.median(seconds["ours"])
        row = (dtype, mode, task, f"{own:.1f}", f"{theirs:.1f}", f"{statistics.median(ratios):.2f}")
        table.add_row(*row, f"{ratios[0]:.2f} - {ratios[-1]:.2f}", f"{share:.0%}")
        print(" ".join(row), flush=True)
        torch.compiler.reset()
    Console(width=120).print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {arguments.batch_size}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coatnet-0", help="a row that timm has too: coatnet-0 to -4")
    parser.add_argument("--downsample", choices=["depthwise", "expand"], default="depthwise", help="of ours")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds; the medians are printed")
    parser.add_argument("--mode", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--task", nargs="+", choices=["inference", "training"], default=["inference", "training"])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    return parser.parse_args()


def contenders(arguments: argparse.Namespace, mode: str) -> dict[str, Callable]:
    import timm

    theirs = timm.create_model(f"{arguments.model.replace('-', '_')}_224", img_size=arguments.resolution)
    networks = {
        "ours": coatnet.create_model(arguments.model, resolution=arguments.resolution, downsample=arguments.downsample),
        "timm": theirs.to(memory_format=torch.channels_last),
    }
    return {name: torch.compile(each) if mode == "compiled" else each for name, each in networks.items()}


def inference(network: torch.nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    network.eval()

    def work() -> None:
        with torch.no_grad(), autocast(dtype):
            network(images)

    return work


def training(network: torch.nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    labels = torch.arange(len(images))

    def work() -> None:
        with autocast(dtype):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


if __name__ == "__main__":
    main()
