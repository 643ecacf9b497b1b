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
from tests.training.trainers import trainer_for

import coatnet
from coatnet import Bundle, Recipe, train
from coatnet.data.transforms import Preprocessing
from coatnet.errors import NotFinite
from coatnet.training.distributed.processes import Processes, distributed_processes
from coatnet.training.distributed.shards import full_tensor
from coatnet.training.trainer import Trainer

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
MUON = {"algorithm": "muon"}
FOLLOWED = {"feature_weight": 0.5}  # the accumulating runs follow a teacher too
RECIPES = {
    "ddp": RECIPE,
    "ddp-accumulating": replace(
        RECIPE, micro_batch_size=6, activation_checkpointing="all", optimizer=MUON, distillation=FOLLOWED
    ),
    "fsdp": replace(RECIPE, parallelism="fsdp"),
    "fsdp-accumulating": replace(
        RECIPE,
        parallelism="fsdp",
        micro_batch_size=6,
        activation_checkpointing="transformer",
        optimizer=MUON,
        distillation=FOLLOWED | {"weight": 0.5},
    ),
    "ddp-fixed-views": replace(RECIPE, distillation={"views": "fixed"}),
}
STOPPED_AFTER = 3


@contextlib.contextmanager
def signal_at(step: int, rank: int, number: signal.Signals):
    """Send process `rank` a signal in the middle of step `step` (1 is the first)."""
    original = Trainer.prepare_batch

    def prepare_batch(self, *batch):
        if self.state.step == step - 1 and self.processes.rank == rank:
            signal.raise_signal(number)
        return original(self, *batch)

    Trainer.prepare_batch = prepare_batch
    yield
    Trainer.prepare_batch = original


def stopped(recipe: Recipe, out: Path, rank: int) -> int:
    """Exit code of a run in which process `rank` receives a stop signal."""
    with signal_at(STOPPED_AFTER, rank, signal.SIGTERM):
        try:
            train(recipe, out)
        except SystemExit as end:
            return int(end.code)
    return 0


def spoiled_step(out: Path, processes: Processes, parallelism: str) -> dict:
    """A step in which an image of one process is NaN: what it raises here, and whether any weight moved."""
    trainer = trainer_for(replace(RECIPE, parallelism=parallelism, mixing={}), processes=processes)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    trainer.step(images, labels)
    if processes.rank == 1:
        images[3, 0, 2, 2] = float("nan")
    parameters = [p.detach() for p in trainer.model.parameters()]
    before = [full_tensor(p).clone() for p in parameters]
    raised = ""
    try:
        trainer.step(images, labels)
    except NotFinite as error:
        raised = f"{type(error).__name__}: {error}"
    same = all(torch.equal(one, full_tensor(other)) for one, other in zip(before, parameters, strict=True))
    return {"raised": raised, "same": same}


def main(folder: Path) -> None:
    with distributed_processes() as processes:
        found = {}
        if processes.is_main:
            classes = coatnet.open_dataset("digits").classes
            teacher = coatnet.create_model("coatnet-femto-16", num_classes=10, in_channels=1).eval()
            Bundle(teacher, classes[::-1], Preprocessing(8, mean=(0.3,), std=(0.4,))).save(folder / "teacher")
        processes.gather("saved")
        for name, recipe in RECIPES.items():
            if recipe.distillation:
                recipe = replace(recipe, teacher=str(folder / "teacher"))
            report = train(recipe, folder / name / "whole")
            codes = [stopped(recipe, folder / name / "cut", rank=len(found) % 2)]
            again = train(recipe, folder / name / "cut")
            found[name] = {"codes": codes, "same_report": report == again, "n": report.figures["n"]}
        found["nan"] = {kind: spoiled_step(folder, processes, kind) for kind in ("ddp", "fsdp")}
        # begun by one process, gone on with by two
        found["grown"] = {"n": train(RECIPE, folder / "grown").figures["n"]} if (folder / "grown").exists() else {}
        time.sleep(2 * processes.rank)  # the first one's clock begins earlier
        timed = train(replace(RECIPE, epochs=1000.0, max_minutes=0.2), folder / "timed")
        found["timed"] = {"figures": timed.figures}
        stopped(RECIPE, folder / "shrinking", rank=1)
        stopped(RECIPES["fsdp"], folder / "shrinking-fsdp", rank=1)
        (folder / f"found-{processes.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main(Path(sys.argv[1]))
