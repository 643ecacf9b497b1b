"""Everything that lets a network train on several processes, or in less memory, applied around it from outside.

In this order: BatchNorm over all GPUs, copies or shards, compilation, activation checkpointing. The network itself is
written for one device.
"""

import copy
import inspect
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
from coatnet.system.hardware import require_compiler
from coatnet.training.config import TrainingConfig
from coatnet.training.distributed.processes import Processes
from coatnet.training.distributed.shards import Rows, fill
from coatnet.training.initialization import build_model
from coatnet.training.optimizer import ShardedAverage, WeightAverage

MAX_REPLICATED_PARAMETERS = 1_000_000_000  # chosen: 20 bytes each with AdamW and an average make 20 GB
# chosen: with as many images per GPU and pass, its own BatchNorm statistics are as good, and nothing is waited for.
MIN_IMAGES_FOR_LOCAL_STATISTICS = 32
MAX_COMPILED_BLOCKS = 256  # CoAtNet-7 has 58


class Parallel(Protocol):
    """A network as the processes of a run compute it together."""

    def prepare(self) -> None:
        """Follow a change of which parameters learn; called before every step."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of this process's images."""

    def accumulating(self) -> AbstractContextManager[object]:
        """Passes within add to the local gradients; the next one outside averages them over the processes."""

    def reduce(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm of the whole batch from those of this process; called before the update."""


class SingleProcess:
    """A network that one process computes."""

    def __init__(self, model: CoAtNet) -> None:
        self._model = model

    def prepare(self) -> None:
        """Do nothing."""

    def __call__(self, images: Tensor) -> Tensor:
        return self._model(images)

    def accumulating(self) -> AbstractContextManager[object]:
        return nullcontext()

    def reduce(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        return loss, norm


def choose_parallelism(
    config: TrainingConfig, init: Bundle | None, processes: Processes
) -> Literal["ddp", "fsdp", "hsdp"]:
    """The configured one, or for auto by size: copies, and above 10^9 parameters shards, within a machine if possible.

    Whether it is sharded at all does not depend on the processes, as the untrained weights follow from it.
    """
    if config.parallelism != "auto":
        return config.parallelism
    if init is None:
        with torch.device("meta"):
            network = create_model(config.model, **config.variations)
    else:
        network = init.model
    if sum(parameter.numel() for parameter in network.parameters()) <= MAX_REPLICATED_PARAMETERS:
        return "ddp"
    return "hsdp" if processes.world_size % processes.local_world_size == 0 else "fsdp"


def build_network(config: TrainingConfig, dataset: Dataset, init: Bundle | None, parallelism: str) -> CoAtNet:
    """The network of the configuration; if it is to be sharded and untrained, without weights on the meta device.

    timm's networks have layers without `reset_parameters`. They are small enough to be built whole.
    """
    on_meta = parallelism != "ddp" and init is None and isinstance(find_variant(config.model), Variant)
    with torch.device("meta") if on_meta else nullcontext():
        return build_model(config, dataset, init)


def parallelize(
    model: CoAtNet, config: TrainingConfig, processes: Processes, device: torch.device, *, parallelism: str, bf16: bool
) -> tuple[Parallel, WeightAverage[CoAtNet] | ShardedAverage]:
    """The network as these processes compute it, in place on `device`, and its averaged weights.

    Raises UserError if the processes cannot share the batch, or a compiler is asked for and there is none.
    """
    check_batch_size(config, processes, parallelism)
    on_meta = next(model.parameters()).is_meta
    average: WeightAverage[CoAtNet] | ShardedAverage
    parallel: Parallel
    if processes.is_distributed:
        # Slow to import, so only where there are several processes.
        from coatnet.training.distributed.wrappers import Replicated, Sharded, mesh_for

        if parallelism == "ddp":
            average = WeightAverage(model.to(device), config.ema_decay)  # before SyncBatchNorm, which is for training
            use_sync_batch_norm(model, config, processes, device)
            parallel = Replicated(model, processes, device)
        else:
            use_sync_batch_norm(model, config, processes, device)
            parallel = Sharded(model, processes, mesh_for(parallelism, processes, device), bf16=bf16)
            if on_meta:
                materialize(model, config.seed, device)
            average = ShardedAverage(model, config.ema_decay)
    else:
        if on_meta:
            materialize(model, config.seed, device)
        average = WeightAverage(model.to(device), config.ema_decay)
        parallel = SingleProcess(model)
    compile_and_checkpoint(model, config, device)
    return parallel, average


def compile_and_checkpoint(model: CoAtNet, config: TrainingConfig, device: torch.device) -> None:
    """Compile the blocks, one by one, and recompute their activations in the backward pass, as configured."""
    if config.compile:
        require_compiler(device, "set compile to false")
        # The compiler looks for the gradients of what comes from the block before, and warns of itself.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        for block in (block for stage in model.stages for block in stage.children()):
            compile_in_training(block)
    if config.activation_checkpointing != "none":
        model.set_grad_checkpointing(batch_norm=config.activation_checkpointing == "all")


def compile_in_training(block: nn.Module) -> None:
    """Compile a block for training; evaluation, whose batches vary in size, computes it as before."""
    # One by one, since blocks differ in their rate of stochastic depth, and eight kinds are the default limit.
    options: dict[str, Any] = {"isolate_recompiles": True}
    if options.keys() - inspect.signature(torch.compile).parameters:  # an older torch: one limit for all blocks
        options = {}
        torch._dynamo.config.cache_size_limit = MAX_COMPILED_BLOCKS
    plain, compiled = block.forward, torch.compile(block.forward, **options)

    def forward(x: Tensor) -> Tensor:
        return compiled(x) if block.training else plain(x)

    block.forward = forward


def check_batch_size(config: TrainingConfig, processes: Processes, parallelism: str) -> None:
    """Raises UserError if the processes cannot share a batch."""
    if config.batch_size < processes.world_size:
        raise UserError(
            f"batch_size {config.batch_size} leaves nothing to do for some of {processes.world_size} processes: "
            "give a larger one, or start fewer"
        )
    if parallelism != "ddp" and config.batch_size % processes.world_size:
        raise UserError(
            f"batch_size {config.batch_size} is not a multiple of {processes.world_size} processes, and those that "
            f"share weights ({parallelism}) must take equal steps: give a multiple, or start another number"
        )


def use_sync_batch_norm(model: CoAtNet, config: TrainingConfig, processes: Processes, device: torch.device) -> None:
    """Take BatchNorm's statistics over the images of all GPUs, where each has few.

    A network with frozen parts keeps the ordinary class, whose statistics it freezes with the weights. So does one
    whose shares of a batch take different numbers of passes: a GPU would wait for statistics that no other computes.
    """
    smallest, largest = config.batch_size // processes.world_size, -(-config.batch_size // processes.world_size)
    images_per_pass = min(config.micro_batch_size, smallest)
    same_passes = -(-smallest // images_per_pass) == -(-largest // images_per_pass)
    freezes = bool(config.freeze or config.head_first_epochs)
    if device.type == "cuda" and images_per_pass < MIN_IMAGES_FOR_LOCAL_STATISTICS and same_passes and not freezes:
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
