"""The plan of a training on many GPUs: how it is laid out, what it takes in memory and days, and how it is started."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from coatnet.errors import UserError
from coatnet.model.registry import find_variant
from coatnet.planning.gpus import Gpu, find_gpu, gpu_with
from coatnet.planning.launchers import LAUNCHERS, Launch
from coatnet.planning.layout_search import Layout, LayoutSearch, describe_layout, why_no_shards
from coatnet.training.config import TrainingConfig
from coatnet.training.defaults import DataFacts, choose
from coatnet.training.distributed.parallelize import SHARDED_ABOVE
from coatnet.training.distributed.processes import Processes
from coatnet.training.recipes import RECIPES, NamedRecipe, find_recipe

GPUS_PER_NODE = 8
DEPENDED_ON = ("resolution", "epochs", "batch_size")  # memory and time do; may be other than the recipe's
# chosen: what is left for CUDA itself, the workspaces of cuDNN and NCCL, and holes between allocations.
RESERVE = 0.1
NUM_CLASSES = 1000  # where the recipe knows of no data
# The rate that the paper's Table 5 implies for its own runs: 14 epochs of 300 M images, six operations a
# multiply-accumulate, TPUv3 cores of 61.5 * 10^12 a second: coatnet-3 30 %, coatnet-4 30 %, coatnet-5 37 %.
MFU = 0.3


@dataclass(frozen=True)
class TrainingPlan:
    """What `plan_training` found; `describe` says it to a person, `to_dict` to a program."""

    row: NamedRecipe
    layout: Layout
    processes: Processes
    gpu: Gpu
    gpu_memory: float  # 10^9 bytes
    num_images: int
    mfu: float

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        recipe = self.layout.recipe
        return math.ceil(recipe.epochs * self.num_images / recipe.batch_size)

    @property
    def seconds_per_step(self) -> float:
        return 2 * self.layout.rehearsal.macs / (self.mfu * self.gpu.tflops * 1e12)

    @property
    def days(self) -> float:
        return self.steps * self.seconds_per_step / 86_400

    @property
    def _is_large(self) -> bool:
        return self.layout.rehearsal.num_parameters > SHARDED_ABOVE

    def launch(self, launcher: str) -> str:
        """The command, or the file for a scheduler, that starts it."""
        nodes = self.processes.world_size // self.processes.local_world_size
        name = self.layout.recipe.model.replace("_", "-")
        return LAUNCHERS[launcher](
            Launch(name, self._arguments(), nodes, self.processes.local_world_size, self.gpu.name)
        )

    def _arguments(self) -> tuple[str, ...]:
        """`train ...`: what differs from the named recipe, and what the plan has settled."""
        recipe, named = self.layout.recipe, self.row.recipe
        settled = ["micro_batch_size", "activation_checkpointing"]
        settled += [] if self.processes.alone else ["parallelism"]
        differing = [name for name in (*DEPENDED_ON, "precision") if getattr(recipe, name) != getattr(named, name)]
        options = [(name, getattr(recipe, name)) for name in ["model", *differing, *settled]]
        start = ("--init", "path/to/bundle") if self.row.needs_init else ()
        return ("train", recipe.name, *start, *(text for name, value in options for text in (f"--{name}", f"{value}")))

    def to_dict(self) -> dict[str, Any]:
        """Numbers for a program; bytes, seconds."""
        recipe = self.layout.recipe
        chosen = ("name", "model", "resolution", "epochs", "batch_size", "micro_batch_size", "parallelism")
        return {
            **{name: getattr(recipe, name) for name in (*chosen, "activation_checkpointing", "precision")},
            "gpus": self.processes.world_size,
            "parameters": self.layout.rehearsal.num_parameters,
            "memory": {**asdict(self.layout.rehearsal.memory), "total": self.layout.rehearsal.memory.total},
            "steps": self.steps,
            "seconds_per_step": self.seconds_per_step,
            "days": self.days,
            "mfu": self.mfu,
        }

    def describe(self) -> str:
        """The plan on a page."""
        recipe, memory, world = self.layout.recipe, self.layout.rehearsal.memory, self.processes.world_size
        nodes = world // self.processes.local_world_size
        machines = f" ({nodes} machines of {self.processes.local_world_size})" if nodes > 1 else ""
        rows = [(name, value) for name, value in asdict(memory).items() if value]
        share = memory.total / (self.gpu_memory * 1e9)
        days = f"{self.days:,.{0 if self.days >= 100 else 2}f} days"
        lines = [
            f"{recipe.model}, {self.layout.rehearsal.num_parameters / 1e6:,.1f} M parameters, by recipe {recipe.name}: "
            f"{recipe.epochs:g} epochs of {self.num_images:,} images at {recipe.resolution} pixels",
            "",
            f"on {world} GPU{'s' * (world > 1)} of {self.gpu_memory:g} GB{machines}:",
            f"  {describe_layout(recipe, self.processes)}; {recipe.batch_size:,} images a step, {recipe.precision}",
            *([f"  {remedy}"] if (remedy := why_no_shards(recipe, self.processes)) and self._is_large else []),
            "",
            "memory of a GPU at the peak of a step, GB",
            *(f"  {name if name != 'average' else 'average (EMA)':15}{value / 1e9:8.2f}" for name, value in rows),
            f"  {'together':15}{memory.total / 1e9:8.2f}   {share:.0%} of what it has",
            "",
            f"{self.steps:,} steps of {self.seconds_per_step:.2g} s: {days}",
            f"  at {self.mfu:.0%} of {self.gpu.tflops:g} TFLOPS (MFU on {self.gpu.name}; --mfu, --gpu)",
        ]
        return "\n".join([*lines, *self._score()])

    def _score(self) -> list[str]:
        row, recipe, lines = self.row, self.layout.recipe, []
        as_published = (
            all(getattr(recipe, name) == getattr(row.recipe, name) for name in DEPENDED_ON)
            and row.data is not None
            and row.data.num_images == self.num_images
        )
        if as_published and recipe.model in row.published_top1:
            lines.append(f"the paper reports {row.published_top1[recipe.model]:.2%} top-1 on ImageNet-1K")
        if row.silent:
            lines.append(f"the paper is silent here: {row.silent}")
        if recipe.model in row.remarks:
            lines.append(row.remarks[recipe.model])
        return ["", *lines] if lines else []


def plan_training(
    model: str,
    *,
    gpus: int,
    gpu_memory: float,
    recipe: str | None = None,
    num_images: int | None = None,
    resolution: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    gpus_per_node: int | None = None,
    gpu: str | None = None,
    mfu: float = MFU,
    reserve: float = RESERVE,
) -> TrainingPlan:
    """Lay a training out over GPUs: the fastest way that fits into all but `reserve` of their memory.

    Args:
        gpu_memory: of one GPU, 10^9 bytes.
        recipe: a named one; by default the paper's for as many images, or else for the model.
        num_images: of an epoch; the recipe's by default.
        gpus_per_node: of a machine; 8, or all if there are fewer.
        gpu: a row of `gpus.GPUS`; by default the first with that much memory.
        mfu: share of the GPU's arithmetic by its data sheet that is used.

    Raises:
        UserError: a name is unknown, a number makes no sense, or nothing fits; the message says what would be right.
    """
    for name, value in (("gpus", gpus), ("gpu-memory", gpu_memory), ("data", num_images), ("epochs", epochs)):
        if value is not None and not value > 0:
            raise UserError(f"{name} must be above 0, got {value:g}")
    for name, value in (("mfu", mfu), ("reserve", reserve)):
        if not 0 < value < 1:
            raise UserError(f"{name} is a share between 0 and 1, such as {MFU}, got {value:g}")
    find_variant(model)
    processes, kind = processes_of(gpus, gpus_per_node), find_gpu(gpu) if gpu else gpu_with(gpu_memory)
    row = find_recipe(recipe) if recipe else recipe_for(model, num_images)
    wanted = {"resolution": resolution, "epochs": epochs, "batch_size": batch_size}
    num_images = num_images or (row.data.num_images if row.data else 0)
    whole = settled(row, model, {name: value for name, value in wanted.items() if value is not None}, gpus, num_images)
    num_classes = row.data.num_classes if row.data else NUM_CLASSES
    layout = LayoutSearch(whole, num_classes, processes, gpu_memory * 1e9 * (1 - reserve)).best()
    return TrainingPlan(row, layout, processes, kind, gpu_memory, num_images, mfu)


def recipe_for(model: str, num_images: int | None) -> NamedRecipe:
    """The paper's recipe for about as many images, or else for that model."""
    rows = [(row, row.data.num_images) for row in RECIPES.values() if row.data and not row.needs_init]
    if num_images is None:
        return next((row for row, _ in rows if model in row.by_model), rows[0][0])
    return min(rows, key=lambda each: abs(math.log(num_images / each[1])))[0]


def settled(row: NamedRecipe, model: str, wanted: Mapping[str, Any], gpus: int, num_images: int) -> TrainingConfig:
    """The configuration of the training. Raises UserError if it depends on the images themselves."""
    recipe = replace(row.recipe, model=model, precision="bf16", **wanted)
    for name in DEPENDED_ON:
        if getattr(recipe, name) is None:
            raise UserError(f"recipe {recipe.name!r} takes {name} from the images: give it here")
    if not num_images:
        raise UserError(f"recipe {recipe.name!r} is for images of any number: give data, how many there are")
    side = recipe.resolution or 0
    config = choose(recipe, DataFacts(num_images, side, shorter_side=side, largest_side=side))
    if config.batch_size < gpus:
        raise UserError(
            f"batch-size {config.batch_size} leaves nothing to do for some of {gpus} GPUs: give a larger one"
        )
    return config


def processes_of(gpus: int, gpus_per_node: int | None) -> Processes:
    """The first of as many processes as GPUs. Raises UserError if the machines would not be alike."""
    local = min(gpus, GPUS_PER_NODE) if gpus_per_node is None else gpus_per_node
    if not local > 0 or gpus % local:
        raise UserError(f"{gpus} GPUs do not make machines of {local}: give another gpus-per-node, or other gpus")
    return Processes(world_size=gpus, local_world_size=local)
