"""All that makes a network train on more machines, or in less memory, put around it from outside.

In this order: BatchNorm over all GPUs, copies or shards, compilation, recomputation. The network does not notice.
"""

import copy
import inspect
import os
import shutil
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.sampler import hash_words
from coatnet.errors import UserError
from coatnet.model.build import init_weights
from coatnet.model.config import Variant
from coatnet.model.network import CoAtNet, create_model
from coatnet.model.registry import find_variant
from coatnet.training.config import TrainingConfig
from coatnet.training.distributed.processes import Processes
from coatnet.training.distributed.shards import Rows, fill
from coatnet.training.initialization import build_model
from coatnet.training.optimizer import ShardedAverage, WeightAverage

SHARDED_ABOVE = 1_000_000_000  # chosen: parameters; copies take 20 bytes each with AdamW and an average, 20 GB
# chosen: images a GPU and pass. From here on a GPU's own statistics are as good, and nothing is waited for.
SYNCHRONISED_BELOW = 32
MOST_COMPILED_BLOCKS = 256  # CoAtNet-7 has 58


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


def parallelism_of(recipe: TrainingConfig, init: Bundle | None, processes: Processes) -> Literal["ddp", "fsdp", "hsdp"]:
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


def build_network(recipe: TrainingConfig, dataset: Dataset, init: Bundle | None, parallelism: str) -> CoAtNet:
    """The network of the recipe; one that is to be sharded without weights, on the meta device, if they are untrained.

    timm's networks hold parts that do not know how to begin by themselves. They are small enough to be built whole.
    """
    on_meta = parallelism != "ddp" and init is None and isinstance(find_variant(recipe.model), Variant)
    with torch.device("meta") if on_meta else nullcontext():
        return build_model(recipe, dataset, init)


def scale(
    model: CoAtNet, recipe: TrainingConfig, processes: Processes, device: torch.device, *, parallelism: str, bf16: bool
) -> tuple[Parallel, WeightAverage[CoAtNet] | ShardedAverage]:
    """The network as these processes compute it, in place on `device`, and its averaged weights.

    Raises UserError if the processes can not share the recipe's batch, or there is no compiler that it asks for.
    """
    check_shares(recipe, processes, parallelism)
    decay, on_meta = recipe.ema_decay, next(model.parameters()).is_meta
    if parallelism == "ddp" or processes.alone:
        if on_meta:
            materialize(model, recipe.seed, device)
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
            materialize(model, recipe.seed, device)
        average = ShardedAverage(model, decay)
    compile_and_checkpoint(model, recipe, device)
    return parallel, average


def replicated(model: CoAtNet, recipe: TrainingConfig, processes: Processes, device: torch.device) -> Parallel:
    """A copy on every process."""
    from coatnet.training.distributed.wrappers import Replicated

    synchronise(model, recipe, processes)
    return Replicated(model, processes, device)


def compile_and_checkpoint(model: CoAtNet, recipe: TrainingConfig, device: torch.device) -> None:
    """Compile the blocks, one by one, and recompute their activations in the backward pass, as the recipe says."""
    if recipe.compile:
        refuse_without_compiler(device)
        # The compiler looks for the gradients of what comes from the block before, and warns of itself.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        for block in (block for stage in model.stages for block in stage.children()):
            compile_in_training(block)
    if recipe.activation_checkpointing != "none":
        model.set_grad_checkpointing(batch_norm=recipe.activation_checkpointing == "all")


def compile_in_training(block: nn.Module) -> None:
    """Compile a block for training; evaluation, whose batches vary in size, computes it as before."""
    # One by one, since blocks differ in their rate of stochastic depth, and eight kinds are the default limit.
    options: dict[str, Any] = {"isolate_recompiles": True}
    if options.keys() - inspect.signature(torch.compile).parameters:  # an older torch: one limit for all blocks
        options = {}
        torch._dynamo.config.cache_size_limit = MOST_COMPILED_BLOCKS
    plain, compiled = block.forward, torch.compile(block.forward, **options)

    def forward(x: Tensor) -> Tensor:
        return compiled(x) if block.training else plain(x)

    block.forward = forward


def refuse_without_compiler(device: torch.device) -> None:
    """Raises UserError where there is no compiler for torch.compile."""
    compilers = (os.environ["CXX"],) if os.environ.get("CXX") else ("g++", "c++", "clang++")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError("compile needs a C++ compiler (g++) on the PATH: install one, or set compile to false")


def check_shares(recipe: TrainingConfig, processes: Processes, parallelism: str) -> None:
    """Raises UserError if the processes can not share the recipe's batch."""
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


def synchronise(model: CoAtNet, recipe: TrainingConfig, processes: Processes) -> None:
    """BatchNorm over the images of all GPUs, where one has few. What is frozen keeps BatchNorm's own class, which the
    network knows how to freeze."""
    at_once = min(recipe.micro_batch_size, recipe.batch_size // processes.world_size)
    frozen = bool(recipe.freeze or recipe.head_first_epochs)
    if torch.cuda.is_available() and at_once < SYNCHRONISED_BELOW and not frozen:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


@torch.no_grad()
def materialize(model: nn.Module, seed: int, device: torch.device) -> None:
    """Give a network on the meta device memory on `device` and untrained weights, one module after the other.

    The weights are a function of the seed and their names: the same on any number of processes, which hold any rows.
    """
    model.to_empty(device=device)
    for name, module in model.named_modules():
        targets = own_tensors(module)
        if targets:
            values = own_tensors(untrained(module, module_seed(seed, name)))
            for key, target in targets.items():
                fill(target, partial(rows_of, values[key]))


def untrained(module: nn.Module, seed: int) -> nn.Module:
    """A whole module like this one on the CPU, initialized from the seed; its own tensors only, not its children's."""
    twin = copy.copy(module)
    twin._parameters = {
        name: None if value is None else nn.Parameter(torch.empty(value.shape))
        for name, value in module._parameters.items()
    }
    twin._buffers = {
        name: None if value is None else torch.empty(value.shape, dtype=value.dtype)
        for name, value in module._buffers.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        twin.reset_parameters()  # pyrefly: ignore[not-callable]  # every layer of the family has it
        init_weights(twin)
    return twin


def rows_of(tensor: Tensor, rows: Rows | None) -> Tensor:
    """Some rows of a tensor, all for None."""
    return tensor if rows is None else tensor.narrow(0, *rows)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, without its children's."""
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: value.detach() for name, value in named}


def module_seed(seed: int, name: str) -> int:
    """A seed for the weights of one module."""
    return int(hash_words(seed, *name.encode())[0] >> 1)
