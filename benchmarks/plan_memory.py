"""Memory of an optimizer step: what `coatnet plan` says before it, beside what real steps of the same network take.

    python benchmarks/plan_memory.py
    torchrun --nproc-per-node 2 benchmarks/plan_memory.py     # in shards (FSDP2)

Real: the second step of a trainer on random images, on the CPU. Its split is counted by storages. The allocator's
figure is what it had given out at most, from the making of the trainer to the end of that step.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from coatnet.data.datasets import ArrayDataset
from coatnet.data.mixing import Mixing
from coatnet.data.splits import Splits
from coatnet.planning.memory import Memory, MemoryTracker, simulate_step
from coatnet.system.launcher import is_main_process
from coatnet.training.config import Recipe, TrainingConfig
from coatnet.training.defaults import DataFacts, resolve_for
from coatnet.training.distributed.processes import Processes, distributed_processes
from coatnet.training.run_folder import RunFolder
from coatnet.training.trainer import Trainer

NUM_CLASSES = 10


@dataclass(frozen=True)
class Comparison:
    """Bytes: planned, counted in a real step, and given out by the allocator in another."""

    planned: Memory
    counted: Memory
    allocated: int

    @property
    def error(self) -> float:
        """Of the plan's total, as a share of the allocator's."""
        return self.planned.total / self.allocated - 1


def recipe_of(model: str, resolution: int, batch_size: int, **changes: object) -> TrainingConfig:
    """A configuration with all that memory depends on."""
    given = {"model": model, "resolution": resolution, "batch_size": batch_size, "micro_batch_size": batch_size}
    given |= {"precision": "fp32", "ema_decay": 0.99, "stochastic_depth": 0.1, "parallelism": "fsdp", "channels": 3}
    given |= {"preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}, "mixing": asdict(Mixing())}
    facts = DataFacts(batch_size, side=resolution, shorter_side=resolution, largest_side=resolution)
    return resolve_for(Recipe.from_dict({"data": "digits", "loss": "softmax", **given, **changes}), facts)


# As many images as make a step take some hundred megabytes.
RECIPES = (
    recipe_of("coatnet-femto-64", 32, 128),
    recipe_of("coatnet-femto", 128, 16, precision="bf16"),
    recipe_of("coatnet-pico", 128, 16, activation_checkpointing="transformer", micro_batch_size=8),
)


def compare(recipes: Sequence[TrainingConfig], num_processes: int = 1) -> list[Comparison]:
    """The plan of a step of one of the processes, and two real ones of this process among them."""
    # Before the processes meet: the plan's are of a group that does not exist, and torch has one group at a time.
    imagined = Processes(world_size=num_processes, local_world_size=num_processes)
    shares = [recipe.batch_size // num_processes for recipe in recipes]
    planned = [
        simulate_step(recipe, num_classes=NUM_CLASSES, images_per_gpu=share, processes=imagined, on_gpu=False).memory
        for recipe, share in zip(recipes, shares, strict=True)
    ]
    with distributed_processes() as processes:
        return [
            Comparison(plan, counted(recipe, processes), allocated(recipe, processes))
            for recipe, plan in zip(recipes, planned, strict=True)
        ]


def counted(recipe: TrainingConfig, processes: Processes) -> Memory:
    """What is alive at the peak of a real step, by kind."""
    trainer, images, labels = beginning(recipe, processes)
    trainer.step(images, labels)
    memory = MemoryTracker()
    with memory:
        memory.label("average", trainer.average.tensors().values())
        memory.label("parameters", trainer.model.state_dict().values())
        for state in (state for optimizer in trainer.optimizers for state in optimizer.state.values()):
            memory.label("optimizer", state.values())
        # Before the first pass the rest is the batch, before the second one the gradients of the first.
        rest = iter(("activations", "gradients"))
        trainer.model.register_forward_pre_hook(lambda *_: memory.label_rest(next(rest, "gradients")))
        for parameter in trainer.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda each: memory.label("gradients", [each.grad]))
        trainer.step(images, labels)
    return Memory(**memory.at_peak())


def allocated(recipe: TrainingConfig, processes: Processes) -> int:
    """What the allocator of the CPU has given out at most, from the making of a trainer to its second step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer, images, labels = beginning(recipe, processes)
        for _ in range(2):
            trainer.step(images, labels)
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def beginning(recipe: TrainingConfig, processes: Processes) -> tuple[Trainer, Tensor, Tensor]:
    """A trainer, and the pixels and labels of its share of a batch."""
    side, number = recipe.resolution, recipe.batch_size
    # Of the data set only the labels count; its pixels would be memory that a training of files does not hold.
    labels = torch.arange(number).remainder(NUM_CLASSES)
    pixels = torch.zeros(number, 1, 1, 3, dtype=torch.uint8)
    dataset = ArrayDataset("pixels", [f"class {k}" for k in range(NUM_CLASSES)], pixels.numpy(), labels.numpy())
    share = number // processes.world_size
    images = torch.randn(share, 3, side, side).contiguous(memory_format=torch.channels_last)
    splits, folder = Splits("pixels", dataset, dataset), RunFolder("benchmark", Recipe(data="digits"))  # never written
    return Trainer(recipe, splits, folder, processes=processes), images, labels[:share]


def show(recipe: TrainingConfig, found: Comparison, console: Console) -> None:
    """A table of one network."""
    about = f"{recipe.model}, {recipe.batch_size} images of {recipe.resolution} pixels, {recipe.precision}"
    if recipe.micro_batch_size != recipe.batch_size:
        about += f", {recipe.micro_batch_size} a pass, {recipe.activation_checkpointing} blocks recomputed"
    console.print(about)
    table = Table("MB", "planned", "real")
    for kind in (field.name for field in fields(Memory)):
        table.add_row(kind, *(f"{getattr(each, kind) / 1e6:.1f}" for each in (found.planned, found.counted)))
    table.add_row("together", *(f"{each.total / 1e6:.1f}" for each in (found.planned, found.counted)))
    table.add_row("allocator", "", f"{found.allocated / 1e6:.1f}")
    table.add_row("error", f"{found.error:+.1%}", "")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [each.model for each in RECIPES]
    parser.add_argument("models", nargs="*", default=known, metavar="MODEL", help=f"only these of {', '.join(known)}")
    given = parser.parse_args()
    if unknown := sorted({*given.models} - {*known}):  # choices refuse no value at all before Python 3.12
        parser.error(f"{', '.join(unknown)}: the models are {', '.join(known)}")
    recipes = [recipe for recipe in RECIPES if recipe.model in given.models]
    found = compare(recipes, int(os.environ.get("WORLD_SIZE", "1")))
    if is_main_process():
        for recipe, each in zip(recipes, found, strict=True):
            show(recipe, each, Console())


if __name__ == "__main__":
    main()
