"""Predict in forked child processes that are killed, until a file is complete; compare it with an undisturbed one.

    python killed_predictions.py BUNDLE IMAGES FOLDER random NUMBER     # killed at random moments
    python killed_predictions.py BUNDLE IMAGES FOLDER every             # killed before each step of writing

A run has one to three processes, each of which may be killed; the next run resumes with another number of them.
Prints, as JSON, the number of killed processes, and whether all rows of the two files are equal.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from pyarrow import parquet

from coatnet.inference.batch.run import predict_to_file
from coatnet.inference.batch.samples import open_samples
from coatnet.inference.predictor import Predictor


def child(predictor: Predictor, images: str, out: Path, rank: int, world_size: int, last_step: int) -> int:
    """Start a child, which kills itself before write operation `last_step`; return its process id."""
    number = os.fork()
    if number:
        return number
    steps = 0

    def counted(function):
        def step(*arguments, **named):
            nonlocal steps
            if steps == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
            return function(*arguments, **named)

        return step

    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "unlink")):
            setattr(owner, name, counted(getattr(owner, name)))
        predict_to_file(predictor, open_samples([images]), out, batch_size=16)
        os._exit(0)
    finally:
        os._exit(1)


def run_children(predictor: Predictor, images: str, out: Path, world_size: int, seconds: float, last_step: int) -> int:
    """Run and kill processes; return how many were killed. Raises if one fails otherwise."""
    running = [child(predictor, images, out, rank, world_size, last_step) for rank in range(world_size)]
    deadline = time.monotonic() + seconds
    killed = 0
    while running:
        for number in list(running):
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                running.remove(number)
                killed += os.WIFSIGNALED(status)
                assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"a child failed with {status}"
        if time.monotonic() > deadline and running:
            os.kill(running[-1], signal.SIGKILL)
            deadline += random.uniform(0, 0.05)
        time.sleep(0.002)
    return killed


def main(bundle: str, images: str, folder: Path, how: str, number: int) -> None:
    torch.set_num_threads(1)
    predictor = Predictor(bundle, "torch", "fp32")
    runs = disturbed(predictor, images, folder, how, number)
    undisturbed = folder / "undisturbed.parquet"
    run_children(predictor, images, undisturbed, 1, 1e9, -1)

    expected = parquet.read_table(undisturbed)
    killed, same, left = 0, True, []
    for out, killed_here in runs:
        killed += killed_here
        same = same and parquet.read_table(out).equals(expected)
        left += [path.name for path in out.parent.iterdir() if path != out]
    print(json.dumps({"killed": killed, "files": len(runs), "rows": len(expected), "same": same, "left": left}))


def disturbed(predictor: Predictor, images: str, folder: Path, how: str, number: int) -> list[tuple[Path, int]]:
    """Complete files, each with the number of processes killed while it was written."""
    if how == "every":
        out, step, killed = folder / "every" / "out.parquet", 0, 1
        runs = []
        while killed:  # until a run completes before that step
            shutil.rmtree(out.parent, ignore_errors=True)
            killed = run_children(predictor, images, out, 1, 1e9, step)
            run_children(predictor, images, out, 1, 1e9, -1)
            runs.append((Path(shutil.copytree(out.parent, folder / f"every-{step}")) / out.name, killed))
            step += 1
        return runs
    generator, killed, runs = random.Random(number), 0, []
    while killed < number:
        out, killed_here, seconds = folder / f"random-{len(runs)}" / "out.parquet", 0, 0.4
        while not out.exists() or (out.parent / f".{out.name}.parts").exists():
            killed_here += run_children(
                predictor, images, out, generator.randint(1, 3), generator.uniform(0, seconds), -1
            )
            seconds *= 1.05  # so that the loop ends
        runs.append((out, killed_here))
        killed += killed_here
    return runs


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]) if len(sys.argv) > 5 else 0)
