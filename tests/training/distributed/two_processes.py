"""What test_processes.py has two processes do: runs that are never stopped, runs that are, and steps that fail."""

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from coatnet import Recipe, open_dataset, train
from coatnet.training.defaults import resolve
from coatnet.training.distributed.processes import Processes, joined
from coatnet.training.distributed.shards import full_tensor
from coatnet.training.learner import Learner, NotFinite

# Six steps, an evaluation after every second, and everything on that could make a difference.
RECIPE = Recipe(
    data="digits",
    model="coatnet-femto-16",
    epochs=0.118,
    batch_size=32,
    evaluate_every=0.039,
    stochastic_depth=0.3,
    ema_decay=0.9,
    mixing={"mixup_alpha": 0.8, "cutmix_alpha": 0.8},
    augmentation={"shift": 1, "flip_rate": 0.5, "erasing_rate": 0.3},
)
RECIPES = {
    "ddp": RECIPE,
    "ddp-accumulating": replace(RECIPE, micro_batch_size=6, activation_checkpointing="all"),
    "fsdp": replace(RECIPE, parallelism="fsdp"),
    "fsdp-accumulating": replace(
        RECIPE, parallelism="fsdp", micro_batch_size=6, activation_checkpointing="transformer"
    ),
}
STOPPED_AFTER = 3


@contextlib.contextmanager
def told_at(step: int, rank: int, number: signal.Signals):
    """Process `rank` gets a signal in the middle of step `step` (1 is the first)."""
    original = Learner._accumulate

    def accumulate(self, images, labels, at):
        if at == step - 1 and self.processes.rank == rank:
            signal.raise_signal(number)
        return original(self, images, labels, at)

    Learner._accumulate = accumulate
    yield
    Learner._accumulate = original


def stopped(recipe: Recipe, out: Path, rank: int) -> int:
    """Exit code of a run that process `rank` was told to stop."""
    with told_at(STOPPED_AFTER, rank, signal.SIGTERM):
        try:
            train(recipe, out)
        except SystemExit as end:
            return int(end.code)
    return 0


def spoiled_step(out: Path, processes: Processes, parallelism: str) -> dict:
    """A step in which an image of one process is NaN: what it raises here, and whether any weight moved."""
    splits = open_dataset("digits")
    recipe = resolve(replace(RECIPE, parallelism=parallelism, mixing={}), splits)
    learner = Learner(recipe, splits.training, None, processes)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    learner.step(images, labels, step=0, learning_rate=1e-3)
    if processes.rank == 1:
        images[3, 0, 2, 2] = float("nan")
    parameters = [p.detach() for p in learner.model.parameters()]
    before = [full_tensor(p).clone() for p in parameters]
    raised = ""
    try:
        learner.step(images, labels, step=1, learning_rate=1e-3)
    except NotFinite as error:
        raised = f"{type(error).__name__}: {error}"
    same = all(torch.equal(one, full_tensor(other)) for one, other in zip(before, parameters, strict=True))
    return {"raised": raised, "same": same}


def main(folder: Path) -> None:
    with joined() as processes:
        found = {}
        for name, recipe in RECIPES.items():
            report = train(recipe, folder / name / "whole")
            codes = [stopped(recipe, folder / name / "cut", rank=len(found) % 2)]
            again = train(recipe, folder / name / "cut")
            found[name] = {"codes": codes, "same_report": report == again, "n": report.figures["n"]}
        found["nan"] = {kind: spoiled_step(folder, processes, kind) for kind in ("ddp", "fsdp")}
        # begun by one process, gone on with by two
        found["grown"] = {"n": train(RECIPE, folder / "grown").figures["n"]} if (folder / "grown").exists() else {}
        time.sleep(2 * processes.rank)  # the first one's clock begins earlier
        timed = train(replace(RECIPE, epochs=1000.0, max_minutes=0.1), folder / "timed")
        found["timed"] = {"figures": timed.figures}
        stopped(RECIPE, folder / "shrinking", rank=1)
        stopped(RECIPES["fsdp"], folder / "shrinking-fsdp", rank=1)
        (folder / f"found-{processes.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main(Path(sys.argv[1]))
