"""What one GPU computes a second: our networks beside timm's, eager and compiled, and the time to an accuracy.

    python benchmarks/gpu.py                              # the table, ten to twenty minutes
    python benchmarks/gpu.py --networks coatnet_0 --mode eager
    python benchmarks/gpu.py --accuracy 94                # then minutes to 94 % on Fashion-MNIST too
    python benchmarks/gpu.py --networks --files 4096      # whether loading image files keeps up with training

All networks run in bf16 and channels-last, alternately, and the median of the rounds is printed. "of the matrix rate"
is the rate of the multiply-accumulates of timm's or our network over that of a large matrix product in bf16, "of the
bandwidth" that of the bytes of the outputs of all its layers, each written and read once, over that of a large copy,
both measured in the same process. `--device cpu` runs it without a GPU, to try it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from images import write_photographs
from rich.console import Console
from rich.table import Table
from rounds import alternate, timed
from torch.utils.flop_counter import FlopCounterMode

import coatnet
from coatnet.data.worker_processes import PREFETCHED_BATCHES
from coatnet.errors import first_line
from coatnet.training.defaults import resolve
from coatnet.training.distributed.processes import SINGLE_PROCESS, share_cores
from coatnet.training.run_folder import RunFolder
from coatnet.training.trainer import Trainer

NETWORKS = ("coatnet_0_224", "coatnet_0_rw_224", "coatnet_2_rw_224", "convnext_tiny", "vit_small_patch16_224")
# Ours of the same architecture, by timm's name.
OURS: dict[str, tuple[str, dict[str, str]]] = {
    "coatnet_0_224": ("coatnet-0", {"downsample": "depthwise"}),
    "coatnet_0_rw_224": ("coatnet_0_rw_224", {}),
    "coatnet_2_rw_224": ("coatnet_2_rw_224", {}),
}


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    matrix_rate, bandwidth = peak_rates(device)
    table = Table(
        "network", "task", "mode", "timm images/s", "ours images/s", "ours / timm", "of matrix rate", "of bandwidth"
    )
    for name in arguments.networks:
        for task in ("inference", "training"):
            for mode in arguments.mode:
                row = compare(name, task, mode, arguments, matrix_rate, bandwidth)
                table.add_row(name, task, mode, *row)
                print(" | ".join((name, task, mode, *row)), file=sys.stderr, flush=True)  # compiling takes minutes
                torch.compiler.reset()
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if arguments.networks:
        Console(width=140).print(table)
    print(f"{card}, torch {torch.__version__}, batch {arguments.batch_size}, {arguments.resolution} pixels, bf16")
    print(f"matrix product {matrix_rate / 1e12:.1f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s")
    if arguments.files:
        print(loading(arguments))
    if arguments.accuracy:
        print(time_to_accuracy(arguments.accuracy, arguments.device))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), metavar="NAME", help="names of timm")
    parser.add_argument("--mode", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds; the medians are printed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--files", type=int, metavar="N", help="also train coatnet-0 on so many JPEG files")
    parser.add_argument("--accuracy", type=float, metavar="PERCENT", help="also the minutes to this top-1")
    given = parser.parse_args()
    least = prefetched(given.device) + 3
    if given.files is not None and given.files < least * given.batch_size:
        parser.error(f"--files {given.files}: at least {least} batches, {least * given.batch_size}")
    return given


def compare(
    name: str, task: str, mode: str, arguments: argparse.Namespace, matrix_rate: float, bandwidth: float
) -> list[str]:
    """Images a second of timm's network and of ours, their ratio, and the shares of the peaks of the faster one."""
    device = torch.device(arguments.device)
    side = arguments.resolution
    sized = {} if name.startswith("convnext") else {"img_size": side}
    networks = [timm.create_model(name, **sized)]
    if name in OURS:
        ours, variations = OURS[name]
        networks.append(coatnet.create_model(ours, resolution=side, **variations))
    images = torch.randn(arguments.batch_size, 3, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    networks = [each.to(device, memory_format=torch.channels_last) for each in networks]
    macs, moved = cost(networks[0], images[:1], training=task == "training")
    works = [work(torch.compile(each) if mode == "compiled" else each, images, task) for each in networks]
    able = [runs(each) for each in works]
    running = [each for each, can in zip(works, able, strict=True) if can]
    taken = iter(seconds_of_rounds(running, arguments.rounds, device))
    seconds = [next(taken) if can else [] for can in able]
    rates = [arguments.batch_size / statistics.median(each) if each else 0.0 for each in seconds]
    ratios = [a / b for a, b in zip(seconds[0], seconds[-1], strict=False)]
    return [
        f"{rates[0]:.0f}" if able[0] else "fails",
        "" if name not in OURS else f"{rates[1]:.0f}" if able[1] else "fails",
        f"{statistics.median(ratios):.2f}" if name in OURS and ratios else "",
        f"{max(rates) * 2 * macs / matrix_rate:.0%}",
        f"{max(rates) * moved / bandwidth:.0%}",
    ]


def runs(each: Callable[[], None]) -> bool:
    """Whether it can be computed; if not, its error is printed."""
    try:
        each()
    except RuntimeError as error:
        print(first_line(error), file=sys.stderr)
        return False
    return True


def cost(network: torch.nn.Module, image: torch.Tensor, *, training: bool) -> tuple[float, float]:
    """Multiply-accumulates and bytes an image: outputs of all layers in bf16, written once and read once."""
    moved = 0

    def count(module: torch.nn.Module, given: object, output: object) -> None:
        nonlocal moved
        if isinstance(output, torch.Tensor) and not list(module.children()):
            moved += 2 * 2 * output.numel()

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    for hook in hooks:
        hook.remove()
    times = 3 if training else 1  # the backward pass has two products of the size of each forward one
    return times * counter.get_total_flops() / 2, times * moved


def work(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, task: str) -> Callable[[], None]:
    """One inference or one training step."""
    module = getattr(network, "_orig_mod", network)
    if task == "inference":
        module.eval()

        def infer() -> None:
            with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
                network(images)

        return infer
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    labels = torch.arange(len(images), device=images.device) % 1000

    def train() -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def seconds_of_rounds(works: list[Callable[[], object]], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of each counted round of each of them, in turn; the first three rounds compile and warm up."""

    def finish(each: Callable[[], object]) -> None:
        each()
        synchronize(device)

    timers = {number: timed(partial(finish, each)) for number, each in enumerate(works)}
    return list(alternate(timers, rounds, warming=3).values())


def peak_rates(device: torch.device) -> tuple[float, float]:
    """Operations a second of a large product in bf16, and bytes a second of a large copy, read and written."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    (products,), (copies,) = (seconds_of_rounds([each], 10, device) for each in (lambda: a @ a, lambda: a.clone()))
    return 2 * side**3 / min(products), 2 * a.nbytes / min(copies)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prefetched(device: str) -> int:
    """The batches that worker processes may have loaded ahead, and one."""
    on_cpu = torch.device(device).type == "cpu"
    return PREFETCHED_BATCHES * share_cores("auto", SINGLE_PROCESS, on_cpu=on_cpu).workers + 1


def loading(arguments: argparse.Namespace) -> str:
    """Images a second of training `coatnet-0` on JPEG files of 500 x 375, and on one batch that is there."""
    ahead = prefetched(arguments.device)
    steps = arguments.files // arguments.batch_size - ahead - 2
    with tempfile.TemporaryDirectory() as folder:
        names = (f"class {number % 10}/{number}.jpg" for number in range(arguments.files))
        write_photographs((Path(folder) / "images" / name for name in names), 500, 375)
        recipe = coatnet.Recipe(
            data=str(Path(folder) / "images"),
            model="coatnet-0",
            resolution=arguments.resolution,
            batch_size=arguments.batch_size,
            device=arguments.device,
            cache="none",
        )
        splits = coatnet.open_dataset(recipe.data, validation_fraction=0.01)
        trainer = Trainer(resolve(recipe, splits), splits, RunFolder(Path(folder) / "run", recipe))
        seconds = []
        with closing(trainer.batches()) as batches:
            batch = next(batches)
            for source in (repeat(batch), batches):
                for _ in islice(source, ahead):  # so that none is there when the time begins
                    pass
                trainer.step(*batch)
                synchronize(trainer.device)
                began = time.perf_counter()
                for each in islice(source, steps):
                    trainer.step(*each)
                synchronize(trainer.device)
                seconds.append((time.perf_counter() - began) / steps)
    at_hand, from_files = (arguments.batch_size / each for each in seconds)
    workers = trainer.cores.workers
    return (
        f"coatnet-0, eager, from JPEG files of 500 x 375, {workers} worker processes: {from_files:.0f} images/s, "
        f"{from_files / at_hand:.0%} of the {at_hand:.0f} of a batch that is there"
    )


def time_to_accuracy(percent: float, device: str) -> str:
    """Minutes of training until the held-out top-1 of Fashion-MNIST reaches it, with the recipe of that name."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = coatnet.named_recipe("fashion-mnist", {"data": "fashion-mnist", "device": device, "batch_size": 256})
        coatnet.train(recipe, Path(folder) / "run")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    seconds = 0.0
    for record in map(json.loads, lines):
        seconds = record.get("seconds", seconds)  # a record of an evaluation has no time
        if record.get("top1", 0) >= percent / 100:
            return f"{percent:g} % on Fashion-MNIST after {seconds / 60:.1f} minutes"
    return f"{percent:g} % on Fashion-MNIST was not reached"


if __name__ == "__main__":
    main()
