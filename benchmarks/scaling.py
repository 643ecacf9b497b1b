"""Two processes against one with the same global batch: images a second, and how much of twice the speed is reached.

    python benchmarks/scaling.py [--model coatnet-femto-64] [--batch-size 64] [--parallelism ddp fsdp]

Whole optimizer steps (forward, backward, gradients added up, AdamW, average) on random images. One process on one
core, one process on two cores and two processes on one core each take turns; medians over the rounds, with the range.
Two processes apart, each with half the batch and nothing to tell the other, show what two cores give at the most.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rounds import alternate, spread

WARMING = 5
ROUNDS = 5


def measure(model: str, batch_size: int, parallelism: str, num_steps: int) -> float | None:
    """Images a second of all processes together, reported by the first."""
    import torch

    from coatnet import Recipe, open_dataset
    from coatnet.training.defaults import resolve
    from coatnet.training.distributed.processes import distributed_processes
    from coatnet.training.run_folder import RunFolder
    from coatnet.training.trainer import Trainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with distributed_processes() as processes:
        splits = open_dataset("fashion-mnist-small")
        recipe = Recipe(
            data="fashion-mnist-small",
            model=model,
            batch_size=batch_size,
            parallelism=parallelism,
            ema_decay=0.99,
            optimizer={"algorithm": "adamw"},
        )
        config = resolve(recipe, splits)
        # The folder is never written.
        trainer = Trainer(config, splits, RunFolder("benchmark", recipe), processes=processes)
        share, side, channels = len(trainer.share.positions), config.resolution, config.channels
        images, labels = torch.randn(share, channels, side, side), torch.arange(share) % 10
        for step in range(WARMING + num_steps):
            if step == WARMING:
                processes.sum([0.0])
                began = time.perf_counter()
            trainer.step(images, labels)
        processes.sum([0.0])
        return num_steps * batch_size / (time.perf_counter() - began) if processes.is_main else None


def apart(given: argparse.Namespace) -> float:
    """Images a second of two processes at once that know nothing of each other, half the batch each."""
    half = argparse.Namespace(**vars(given) | {"batch_size": given.batch_size // 2})
    with ThreadPoolExecutor(2) as both:
        return sum(both.map(lambda _: measured(1, 1, half, "ddp"), range(2)))


def measured(processes: int, threads: int, given: argparse.Namespace, parallelism: str) -> float:
    """The same in processes of their own."""
    program = [str(Path(__file__)), "--inside", "--model", given.model, "--batch-size", str(given.batch_size)]
    program += ["--steps", str(given.steps), "--parallelism", parallelism]
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run([*launch, *program], env=environment, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        raise SystemExit(f"{processes} processes of {threads} threads, {parallelism}: failed with {ran.returncode}")
    return json.loads(ran.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coatnet-femto-64")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--parallelism", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        speed = measure(given.model, given.batch_size, given.parallelism[0], given.steps)
        if speed is not None:
            print(json.dumps(speed))
        return
    ways = {
        "one process, one core": lambda: measured(1, 1, given, "ddp"),
        "one process, two cores": lambda: measured(1, 2, given, "ddp"),
        "two processes apart, one core each": lambda: apart(given),
    }
    for kind in given.parallelism:
        ways[f"two processes, one core each, {kind}"] = partial(measured, 2, 1, given, kind)
    speeds = alternate(ways, given.rounds, warming=0)
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    one_core, two_cores, most = list(medians.values())[:3]
    print(f"{given.model}, {given.batch_size} images a step, medians of {given.rounds} (range)")
    for name, each in speeds.items():
        speed = medians[name]
        line = f"{spread(each, '8.1f', ' images/s')}  {name}"
        if name.startswith("two"):
            line += f": {speed / (2 * one_core):.0%} of twice one core, {speed / two_cores:.2f} x one process on two"
            line += f", {speed / most:.0%} of two apart"
        print(line)


if __name__ == "__main__":
    main()
