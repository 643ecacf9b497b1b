"""Memory of one GPU in an optimizer step, by a rehearsal: the step itself, on fake tensors of the right shapes.

The network, its copies or shards, the recomputation and the optimizer are those of the training. Sharded networks are
rehearsed as one of many processes whose group is fake: it exchanges nothing, and says that it has.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from coatnet.model.attention import MultiHeadProjection
from coatnet.model.network import CoAtNet, create_model
from coatnet.planning.memory_tracker import MemoryTracker
from coatnet.training.config import TrainingConfig
from coatnet.training.distributed.parallelize import Parallel, Single, compile_and_checkpoint
from coatnet.training.distributed.processes import Processes
from coatnet.training.distributed.shards import local_tensor
from coatnet.training.distributed.wrappers import Sharded, mesh_for
from coatnet.training.losses import build_loss
from coatnet.training.optimizer import ShardedAverage, WeightAverage, build_optimizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the moment of a step when they are most together. Activations: all that is no state."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Rehearsal:
    """What a step takes of one process: memory, and multiply-accumulates, those of recomputation included."""

    memory: Memory
    macs: int
    num_parameters: int


def rehearse(
    recipe: TrainingConfig, *, num_classes: int, share: int, processes: Processes, on_gpu: bool = True
) -> Rehearsal:
    """A step of one process, which sees `share` images in it.

    Args:
        recipe: with model, resolution, micro-batch, precision ("bf16" or "fp32"), average, recomputation and, where
            there are several processes, parallelism.
        on_gpu: whether to count what is kept on a GPU; else, what is kept on the CPU.
    """
    model, decay = build(recipe, num_classes), recipe.ema_decay
    sharded = not processes.alone and recipe.parallelism != "ddp"
    with ExitStack() as stack:
        mesh = stack.enter_context(fake_mesh(recipe.parallelism, processes)) if sharded else None
        parallel = (
            Sharded(model, processes, mesh, bf16=recipe.precision == "bf16") if mesh is not None else Single(model)
        )
        whole_average = None if sharded else WeightAverage(model, decay).model
        # Whatever lies on the meta device becomes fake when it is used.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if on_gpu:
            count_as_on_gpu(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # FSDP2 does, to compare two
            model.to_empty(device=CPU)
        if whole_average is None:
            with torch.no_grad():
                averages = ShardedAverage(model, decay).tensors()
        else:
            averages = (model if whole_average is model else whole_average.to_empty(device=CPU)).state_dict()
        compile_and_checkpoint(model, recipe, CPU)
        # Of DDP's buckets the gradients are views; they are there all the time.
        keep_gradients = not processes.alone and not sharded
        return _take_step(recipe, model, parallel, averages, share=share, keep_gradients=keep_gradients)


def build(recipe: TrainingConfig, num_classes: int) -> CoAtNet:
    """The network of a recipe, in training, on the meta device."""
    with torch.device("meta"):
        model = create_model(
            recipe.model,
            num_classes=num_classes,
            in_channels=recipe.channels,
            resolution=recipe.resolution,
            stochastic_depth=recipe.stochastic_depth,
            **recipe.variations,
        )
    return model.train()


def _take_step(
    recipe: TrainingConfig,
    model: CoAtNet,
    parallel: Parallel,
    averages: Mapping[str, Tensor],
    *,
    share: int,
    keep_gradients: bool,
) -> Rehearsal:
    side, micro, loss = recipe.resolution, recipe.micro_batch_size, build_loss(recipe.loss, None)
    parameters = list(model.parameters())
    state = optimizer_state(recipe, model)
    memory = MemoryTracker()
    with memory:
        memory.label("average", averages.values())
        memory.label("parameters", model.state_dict().values())  # they are their own average if there is none
        memory.label("optimizer", state)
        images = torch.empty(share, model.in_channels, side, side, memory_format=torch.channels_last)
        targets = torch.empty(share, model.num_classes)
        memory.label("activations", (images, targets))
        if keep_gradients:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            memory.label_rest("gradients")
        # Two passes show what many take: from the second on there are gradients already.
        passes = list(zip(images.split(micro), targets.split(micro), strict=True))[:2]
        for number, (part, part_targets) in enumerate(passes, start=1):
            with nullcontext() if number == len(passes) else parallel.accumulating():
                with torch.autocast(CPU.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    logits = parallel(part)
                (loss(logits, part_targets) / share).backward()
            del logits
            memory.label_rest("gradients")  # of shards, too, which keep them elsewhere until they are added up
    macs = memory.macs * -(-share // micro) // len(passes)
    return Rehearsal(Memory(**memory.at_peak()), macs, sum(each.numel() for each in parameters))


@torch.no_grad()
def optimizer_state(recipe: TrainingConfig, model: CoAtNet) -> list[Tensor]:
    """What the optimizer holds from the first step on, of what this process holds of the parameters."""
    optimizer = build_optimizer(model, recipe.optimizer)
    for group in optimizer.param_groups:
        group["params"] = [local_tensor(each).detach().requires_grad_() for each in group["params"]]
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return [value for state in optimizer.state.values() for value in state.values()]


@contextmanager
def fake_mesh(kind: str, processes: Processes) -> Iterator[DeviceMesh]:
    """The mesh of a process group of that size in which this process is the only one that exists."""
    # A private part of torch, as there is no public one that gives a process group without processes.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=processes.rank, world_size=processes.world_size, store=FakeStore())
    try:
        yield mesh_for(kind, processes, CPU)  # before tensors are fake: it looks into one
    finally:
        dist.destroy_process_group()


def count_as_on_gpu(model: CoAtNet) -> None:
    """Make a network of fake tensors on the CPU keep what it would keep on a GPU, in place.

    Fake tensors on a fake GPU would be simpler, but their backward pass needs a GPU driver.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # autocast runs it in float32 on GPUs but not on CPUs
            module.register_forward_pre_hook(lambda _, given: given[0].float())
        if isinstance(module, MultiHeadProjection):
            module.attention_kernel = _memory_efficient_attention


def _memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Torch's memory-efficient kernel: the one that `F.scaled_dot_product_attention` runs for a trainable bias."""
    if bias is not None:
        (batch, heads, queries, _), keys = q.shape, k.shape[2]
        bias = F.pad(bias, (0, -keys % 8))[..., :keys]  # it wants rows that begin at multiples of 16 bytes
        bias = bias.expand(batch, heads, queries, keys)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]
