"""All that makes a network train on more machines, or in less memory, put around it from outside.

In this order: BatchNorm over all GPUs, copies or shards, compilation, recomputation. The network does not notice.
"""

import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.errors import UserError
from coatnet.model.config import Variant
from coatnet.model.network import CoAtNet, create_model
from coatnet.model.registry import find_variant
from coatnet.training.config import Recipe
from coatnet.training.distributed.materialize import materialise
from coatnet.training.distributed.processes import Processes
from coatnet.training.distributed.sharded_average import ShardedAverage
from coatnet.training.initialization import build_model
from coatnet.training.optimizer import WeightAverage

SHARDED_ABOVE = 1_000_000_000  # chosen: parameters; copies take 20 bytes each with AdamW and an average, 20 GB
# chosen: images a GPU and pass. From here on a GPU's own statistics are as good, and nothing is waited for.
SYNCHRONISED_BELOW = 32

Forward = Callable[[Tensor], Tensor]


class Parallel(Protocol):
    """A network as the processes of a run compute it together."""

    def prepare(self) -> None:
        """Be ready for a step, in which other parameters may learn than in the one before."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, of this process's images."""

    def accumulating(self) -> AbstractContextManager[object]:
        """Forward and backward passes within add to the gradients here; the next one outside adds up all processes'."""

    def agree(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm of the whole batch, from those of this process; to be called before the update."""


class Single:
    """One process; nothing to agree on."""

    def __init__(self, model: CoAtNet) -> None:
        self._model = model

    def prepare(self) -> None:
        """Nothing."""

    def __call__(self, images: Tensor) -> Tensor:
        return self._model(images)

    def accumulating(self) -> AbstractContextManager[object]:
        return nullcontext()

    def agree(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        return loss, norm


def parallelism_of(recipe: Recipe, init: Bundle | None, processes: Processes) -> Literal["ddp", "fsdp", "hsdp"]:
    """The recipe's, or what fits the size: copies, and above 10^9 parameters shards, within each machine if possible.

    Whether it is sharded at all does not depend on the processes, as the untrained weights follow from it.
    """
    if recipe.parallelism != "auto":
        return recipe.parallelism
    if init is None:
        with torch.device("meta"):
            network = create_model(recipe.model, **recipe.variations)
    else:
        network = init.model
    if sum(parameter.numel() for parameter in network.parameters()) <= SHARDED_ABOVE:
        return "ddp"
    return "hsdp" if processes.world_size % processes.local_world_size == 0 else "fsdp"


def build_network(recipe: Recipe, dataset: Dataset, init: Bundle | None, parallelism: str) -> CoAtNet:
    """The network of the recipe; one that is to be sharded without weights, on the meta device, if they are untrained.

    timm's networks hold parts that do not know how to begin by themselves. They are small enough to be built whole.
    """
    on_meta = parallelism != "ddp" and init is None and isinstance(find_variant(recipe.model), Variant)
    with torch.device("meta") if on_meta else nullcontext():
        return build_model(recipe, dataset, init)


def scale(
    model: CoAtNet, recipe: Recipe, processes: Processes, device: torch.device, *, parallelism: str, bf16: bool
) -> tuple[Parallel, WeightAverage[CoAtNet] | ShardedAverage]:
    """The network as these processes compute it, in place on `device`, and its averaged weights.

    Raises UserError if the processes can not share the recipe's batch, or there is no compiler that it asks for.
    """
    check_shares(recipe, processes, parallelism)
    decay, on_meta = recipe.ema_decay or 0.0, next(model.parameters()).is_meta
    if parallelism == "ddp" or processes.alone:
        if on_meta:
            materialise(model, recipe.seed, device)
        average: WeightAverage[CoAtNet] | ShardedAverage = WeightAverage(model.to(device), decay)
        parallel: Parallel = Single(model) if processes.alone else replicated(model, recipe, processes, device)
    else:
        from coatnet.training.distributed.wrappers import (  # slow to import, so only where there are translate_errors
            Sharded,
            mesh_for,
        )

        synchronise(model, recipe, processes)
        parallel = Sharded(model, processes, mesh_for(parallelism, processes, device), bf16=bf16)
        if on_meta:
            materialise(model, recipe.seed, device)
        average = ShardedAverage(model, decay)
    rework_blocks(model, recipe, device)
    return parallel, average


def replicated(model: CoAtNet, recipe: Recipe, processes: Processes, device: torch.device) -> Parallel:
    """A copy on every process."""
    from coatnet.training.distributed.wrappers import Replicated

    synchronise(model, recipe, processes)
    return Replicated(model, processes, device)


def rework_blocks(model: CoAtNet, recipe: Recipe, device: torch.device) -> None:
    """Have the blocks compiled, one by one, and computed twice, as the recipe says."""
    if recipe.compile:
        refuse_without_compiler(device)
        # The compiler looks for the gradients of what comes from the block before, and warns of itself.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    for block in (block for stage in model.stages for block in stage.children()):
        if recipe.compile:
            # One by one, since blocks differ in their rate of stochastic depth, and eight kinds are the default limit.
            separate: dict[str, Any] = {"isolate_recompiles": True}
            in_training(block, torch.compile(block.forward, **separate))
        if recipe.activation_checkpointing == "all" or (
            recipe.activation_checkpointing == "transformer" and not holds_batch_norm(block)
        ):
            in_training(block, partial(recomputed, block, block.forward))


def refuse_without_compiler(device: torch.device) -> None:
    """Raises UserError where there is no compiler for torch.compile."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise UserError("compile needs a C++ compiler (g++) on the PATH: install one, or set compile to false")


def check_shares(recipe: Recipe, processes: Processes, parallelism: str) -> None:
    """Raises UserError if the processes can not share the recipe's batch."""
    assert recipe.batch_size is not None
    if recipe.batch_size < processes.world_size:
        raise UserError(
            f"batch_size {recipe.batch_size} leaves nothing to do for some of {processes.world_size} processes: "
            "give a larger one, or start fewer"
        )
    if parallelism != "ddp" and recipe.batch_size % processes.world_size:
        raise UserError(
            f"batch_size {recipe.batch_size} is not a multiple of {processes.world_size} processes, and those that "
            f"share weights ({parallelism}) must take equal steps: give a multiple, or start another number"
        )


def synchronise(model: CoAtNet, recipe: Recipe, processes: Processes) -> None:
    """BatchNorm over the images of all GPUs, where one has few. What is frozen keeps BatchNorm's own class, which the
    network knows how to freeze."""
    assert recipe.batch_size is not None
    at_once = min(recipe.micro_batch_size or recipe.batch_size, recipe.batch_size // processes.world_size)
    frozen = bool(recipe.freeze or recipe.head_first_epochs)
    if torch.cuda.is_available() and at_once < SYNCHRONISED_BELOW and not frozen:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def in_training(block: nn.Module, forward: Forward) -> None:
    """Have a block compute by `forward` in training, and as before in evaluation, whose batches vary in size."""
    before = block.forward

    def either(x: Tensor) -> Tensor:
        return forward(x) if block.training else before(x)

    block.forward = either


def recomputed(block: nn.Module, forward: Forward, x: Tensor) -> Tensor:
    """`forward(x)`, keeping only x for the backward pass, in which it is computed a second time."""
    return checkpoint(forward, x, use_reentrant=False, context_fn=partial(_contexts, block))


def holds_batch_norm(block: nn.Module) -> bool:
    """Whether a block has a BatchNorm of either class."""
    return any(isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) for module in block.modules())


class UncountedStatistics:
    """While entered, the BatchNorms of a block write running statistics and counter to copies that are thrown away."""

    def __init__(self, block: nn.Module) -> None:
        self._norms = [each for each in block.modules() if isinstance(each, nn.BatchNorm2d | nn.SyncBatchNorm)]
        self._kept: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self._kept = [norm._buffers for norm in self._norms]
        for norm in self._norms:
            norm._buffers = {name: each if each is None else each.clone() for name, each in norm._buffers.items()}

    def __exit__(self, *_: object) -> None:
        for norm, kept in zip(self._norms, self._kept, strict=True):
            norm._buffers = kept


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """For the first computation and for the second."""
    return nullcontext(), UncountedStatistics(block)
