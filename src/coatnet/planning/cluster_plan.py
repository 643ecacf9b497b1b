"""The plan of a training on many GPUs: its layout, memory, duration and launch command."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from coatnet.errors import UserError, counted, nearest
from coatnet.model.registry import find_variant
from coatnet.planning.launchers import LAUNCHERS, Launch
from coatnet.planning.layout_search import Layout, LayoutSearch, describe_layout, why_not_sharded
from coatnet.training.config import TrainingConfig
from coatnet.training.defaults import DataFacts, resolve_for
from coatnet.training.distributed.parallelize import MAX_REPLICATED_PARAMETERS
from coatnet.training.distributed.processes import Processes
from coatnet.training.recipes import RECIPES, NamedRecipe, find_recipe

GPUS_PER_NODE = 8
COST_FIELDS = ("resolution", "epochs", "batch_size")  # memory and time depend on them; they may override the recipe
# chosen: share of the memory left for CUDA itself, the workspaces of cuDNN and NCCL, and fragmentation.
RESERVE = 0.1
NUM_CLASSES = 1000  # of a recipe without data
MOST = 1e15  # chosen: of GPUs, 10^9 bytes, images and epochs
# Model FLOPs utilization. paper: Table 5 implies this rate for its own runs: 14 epochs of 300 M images, six operations
# per multiply-accumulate, TPUv3 cores of 61.5 * 10^12 per second: coatnet-3 30 %, coatnet-4 30 %, coatnet-5 37 %.
MFU = 0.3


@dataclass(frozen=True)
class Gpu:
    """A GPU that people train on, by its data sheet."""

    name: str  # in SkyPilot's spelling
    memory: float  # 10^9 bytes
    tflops: float  # dense bf16 matrix products, 10^12 operations per second


_BY_MEMORY = (
    Gpu("L4", 24, 121),
    Gpu("A100", 40, 312),
    Gpu("L40S", 48, 362),
    Gpu("A100-80GB", 80, 312),
    Gpu("H100", 80, 989),
    Gpu("H200", 141, 989),
    Gpu("B200", 180, 2250),
)
GPUS = {gpu.name: gpu for gpu in _BY_MEMORY}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name. Raises UserError with the nearest name if it is unknown."""
    if name not in GPUS:
        raise UserError(f"GPU {name!r} is unknown{nearest(name, GPUS)}; there are {', '.join(GPUS)}")
    return GPUS[name]


def gpu_with(memory: float) -> Gpu:
    """The smallest GPU of the table with that much memory (10^9 bytes), or the largest one."""
    return next((gpu for gpu in _BY_MEMORY if gpu.memory >= memory), _BY_MEMORY[-1])


@dataclass(frozen=True)
class TrainingPlan:
    """The result of `plan_training`: as text with `describe`, as numbers with `to_dict`."""

    named_recipe: NamedRecipe
    layout: Layout
    processes: Processes
    gpu: Gpu
    gpu_memory: float  # 10^9 bytes
    num_images: int
    mfu: float

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        config = self.layout.config
        return math.ceil(config.epochs * self.num_images / config.batch_size)

    @property
    def seconds_per_step(self) -> float:
        return 2 * self.layout.cost.macs / (self.mfu * self.gpu.tflops * 1e12)

    @property
    def days(self) -> float:
        return self.steps * self.seconds_per_step / 86_400

    @property
    def _is_large(self) -> bool:
        return self.layout.cost.num_parameters > MAX_REPLICATED_PARAMETERS

    def launch(self, launcher: str) -> str:
        """The launch command, or the job file for a scheduler."""
        nodes = self.processes.world_size // self.processes.local_world_size
        name = self.layout.config.model.replace("_", "-")
        return LAUNCHERS[launcher](
            Launch(name, self._arguments(), nodes, self.processes.local_world_size, self.gpu.name)
        )

    def _arguments(self) -> tuple[str, ...]:
        """`train ...`: the options that differ from the named recipe, and those that the plan chooses."""
        config, named = self.layout.config, self.named_recipe.recipe
        chosen = ["micro_batch_size", "activation_checkpointing"]
        chosen += ["parallelism"] if self.processes.is_distributed else []
        differing = [name for name in (*COST_FIELDS, "precision") if getattr(config, name) != getattr(named, name)]
        options = [(name, getattr(config, name)) for name in ["model", *differing, *chosen]]
        start = ("--init", "path/to/bundle") if self.named_recipe.needs_init else ()
        written = [(name, "x".join(map(str, value)) if isinstance(value, tuple) else value) for name, value in options]
        return ("train", config.name, *start, *(text for name, value in written for text in (f"--{name}", f"{value}")))

    def to_dict(self) -> dict[str, Any]:
        """The plan as numbers, in bytes and seconds."""
        config = self.layout.config
        fields = ("name", "model", "resolution", "epochs", "batch_size", "micro_batch_size", "parallelism")
        return {
            **{name: getattr(config, name) for name in (*fields, "activation_checkpointing", "precision")},
            "gpus": self.processes.world_size,
            "parameters": self.layout.cost.num_parameters,
            "memory": {**asdict(self.layout.cost.memory), "total": self.layout.cost.memory.total},
            "steps": self.steps,
            "seconds_per_step": self.seconds_per_step,
            "days": self.days,
            "mfu": self.mfu,
        }

    def describe(self) -> str:
        """The plan as text."""
        config, memory, world = self.layout.config, self.layout.cost.memory, self.processes.world_size
        nodes = world // self.processes.local_world_size
        machines = f" ({nodes} machines of {self.processes.local_world_size})" if nodes > 1 else ""
        rows = [(name, value) for name, value in asdict(memory).items() if value]
        used = memory.total / (self.gpu_memory * 1e9)
        days = f"{self.days:,.{0 if self.days >= 100 else 2}f} days"
        lines = [
            f"{config.model}, {self.layout.cost.num_parameters / 1e6:,.1f} M parameters, by recipe {config.name}: "
            f"{config.epochs:g} epochs of {self.num_images:,} images at {config.preprocessing.shown_size} pixels",
            "",
            f"on {counted(world, 'GPU')} of {self.gpu_memory:g} GB{machines}:",
            f"  {describe_layout(config, self.processes)}; {config.batch_size:,} images per step, {config.precision}",
            *([f"  {remedy}"] if (remedy := why_not_sharded(config, self.processes)) and self._is_large else []),
            "",
            "memory per GPU at the peak of a step, GB",
            *(f"  {name if name != 'average' else 'average (EMA)':15}{value / 1e9:8.2f}" for name, value in rows),
            f"  {'total':15}{memory.total / 1e9:8.2f}   {used:.0%} of its memory",
            "",
            f"{self.steps:,} steps of {self.seconds_per_step:.2g} s: {days}",
            f"  at {self.mfu:.0%} of {self.gpu.tflops:g} TFLOPS (MFU on {self.gpu.name}; --mfu, --gpu)",
        ]
        return "\n".join([*lines, *self._remarks()])

    def _remarks(self) -> list[str]:
        """What the paper reports for this training, or does not say."""
        named, config, lines = self.named_recipe, self.layout.config, []
        as_published = (
            all(getattr(config, name) == getattr(named.recipe, name) for name in COST_FIELDS)
            and named.data is not None
            and named.data.num_images == self.num_images
        )
        if as_published and config.model in named.published_top1:
            lines.append(f"the paper reports {named.published_top1[config.model]:.2%} top-1 on ImageNet-1K")
        if named.silent:
            lines.append(f"the paper is silent here: {named.silent}")
        if config.model in named.remarks:
            lines.append(named.remarks[config.model])
        return ["", *lines] if lines else []


def plan_training(
    model: str,
    *,
    gpus: int,
    gpu_memory: float,
    recipe: str | None = None,
    num_images: int | None = None,
    resolution: int | str | tuple[int, int] | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    gpus_per_node: int | None = None,
    gpu: str | None = None,
    mfu: float = MFU,
    reserve: float = RESERVE,
) -> TrainingPlan:
    """Plan a training on GPUs: find the fastest layout that fits into all but a `reserve` of their memory.

    Args:
        model: a name of `list_variants`.
        gpus: number of GPUs in all.
        gpu_memory: memory of one GPU, 10^9 bytes.
        recipe: name of a recipe; by default the paper's for this number of images, or else for the model.
        num_images: images of one epoch; by default those of the recipe.
        resolution: side of the input images in pixels, or their height and width; by default the recipe's.
        epochs: passes over the images; by default the recipe's.
        batch_size: images of one optimizer step; by default the recipe's.
        gpus_per_node: GPUs of one machine; by default 8, or all if there are fewer.
        gpu: a name of `GPUS`, for its speed; by default the smallest with that much memory.
        mfu: model FLOPs utilization, the share of the GPU's peak bf16 rate that is used.
        reserve: share of the memory that is left free.

    Raises:
        UserError: a name is unknown, a number is out of range, or no layout fits; the message says what would be right.
    """
    for name, value in (("gpus", gpus), ("gpu-memory", gpu_memory), ("data", num_images), ("epochs", epochs)):
        if value is not None and not value > 0:
            raise UserError(f"{name} must be above 0, got {value:g}")
        if value is not None and value > MOST:
            raise UserError(f"{name} must be at most {MOST:g}, got {value:g}")
    for name, value in (("mfu", mfu), ("reserve", reserve)):
        if not 0 < value < 1:
            raise UserError(f"{name} is a share between 0 and 1, such as {MFU}, got {value:g}")
    find_variant(model)
    processes, kind = first_process(gpus, gpus_per_node), find_gpu(gpu) if gpu else gpu_with(gpu_memory)
    named = find_recipe(recipe) if recipe else recipe_for(model, num_images)
    wanted = {"resolution": resolution, "epochs": epochs, "batch_size": batch_size}
    num_images = num_images or (named.data.num_images if named.data else 0)
    config = resolve_config(
        named, model, {name: value for name, value in wanted.items() if value is not None}, gpus, num_images
    )
    num_classes = named.data.num_classes if named.data else NUM_CLASSES
    layout = LayoutSearch(config, num_classes, processes, gpu_memory * 1e9 * (1 - reserve)).best()
    return TrainingPlan(named, layout, processes, kind, gpu_memory, num_images, mfu)


def recipe_for(model: str, num_images: int | None) -> NamedRecipe:
    """The paper's recipe for the nearest number of images, or without a number, for the model."""
    rows = [(row, row.data.num_images) for row in RECIPES.values() if row.data and not row.needs_init]
    if num_images is None:
        return next((row for row, _ in rows if model in row.by_model), rows[0][0])
    return min(rows, key=lambda each: abs(math.log(num_images / each[1])))[0]


def resolve_config(
    named: NamedRecipe, model: str, wanted: Mapping[str, Any], gpus: int, num_images: int
) -> TrainingConfig:
    """The configuration of the training. Raises UserError if it depends on images that are not given."""
    recipe = replace(named.recipe, model=model, precision="bf16", **wanted)
    for name in COST_FIELDS:
        if getattr(recipe, name) is None:
            raise UserError(f"recipe {recipe.name!r} takes {name} from the images: give {name}")
    if not num_images:
        raise UserError(f"recipe {recipe.name!r} has no number of images: give data, the number of images")
    given = recipe.resolution
    sides = [int(side) for side in (given if isinstance(given, tuple) else (given or 0,))]
    facts = DataFacts(num_images, max(sides), shorter_side=min(sides), largest_side=max(sides))
    config = resolve_for(recipe, facts)
    if named.needs_init and "algorithm" not in recipe.to_dict().get("optimizer", {}):
        # As for a network that has learned, which is not at hand here.
        config = replace(config, optimizer=replace(config.optimizer, algorithm="adamw"))
    if config.batch_size < gpus:
        raise UserError(f"batch-size {config.batch_size} is below the number of GPUs, {gpus}: give a larger one")
    return config


def first_process(gpus: int, gpus_per_node: int | None) -> Processes:
    """The first of as many processes as GPUs. Raises UserError if they do not fill whole machines."""
    local = min(gpus, GPUS_PER_NODE) if gpus_per_node is None else gpus_per_node
    if not local > 0 or gpus % local:
        raise UserError(f"{gpus} GPUs do not fill machines of {local}: give another gpus-per-node, or other gpus")
    return Processes(world_size=gpus, local_world_size=local)
