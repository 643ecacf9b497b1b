"""Memory of one GPU in an optimizer step, by simulation: the step itself, on fake tensors of the right shapes.

The network, its replicas or shards, the recomputation and the optimizer are those of the training. Sharded networks are
simulated as one process of a fake process group, in which collectives are no-ops.

Fake tensors have shapes, devices and storages like real ones, but no bytes: a step of any network can be tracked on any
machine. What libraries allocate inside an operation is no tensor and is not counted.
"""

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from coatnet.model.attention import MultiHeadProjection
from coatnet.model.network import CoAtNet, create_model
from coatnet.training.config import TrainingConfig
from coatnet.training.distributed.parallelize import Parallel, SingleProcess, compile_and_checkpoint
from coatnet.training.distributed.processes import Processes
from coatnet.training.distributed.shards import local_tensor
from coatnet.training.distributed.wrappers import Sharded, mesh_for
from coatnet.training.optimizer import ShardedAverage, WeightAverage, build_loss, build_optimizers

OTHER = "activations"  # the kind of tensors without a label


class MemoryTracker(TorchDispatchMode):
    """While entered, record the allocation, resizing and release of storages, and count multiply-accumulates."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self._tape: list[tuple[int, int]] = []  # (number of a storage, change in bytes), in order
        self._sizes: list[int] = []  # by number
        self._kinds: dict[int, str] = {}
        self._numbers: dict[int, int] = {}  # of storages that are alive, by address
        self._watchers: dict[int, Any] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "MemoryTracker":
        # FSDP2 allocates and frees memory by resizing storages, which is no operation on tensors; torch's own memory
        # tracker intercepts it in the same way.
        resize = self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            number = self._watch(storage)
            result = resize(storage, size)
            self._resized(number, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it is dispatched again, as operations on the local tensor
        if func is torch.ops.prim.device.default:  # three of five calls, from FSDP2
            return func(*args)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        self.macs += _macs(func, args, kwargs or {}, result)
        return result

    @torch.no_grad()  # the local tensor of a DTensor is then ten times faster to get
    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Set the kind of tensors, from their allocation on; one that was allocated before counts from now on."""
        for tensor in tensors:
            self._kinds[self._watch(local_tensor(tensor).untyped_storage())] = kind

    def label_rest(self, kind: str) -> None:
        """Set the kind of all tensors that are alive and have no label."""
        for number, size in enumerate(self._sizes):
            if size:
                self._kinds.setdefault(number, kind)

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind at the moment when their sum was largest."""
        current: dict[str, int] = {}
        peak: dict[str, int] = {}
        total = highest = 0
        for number, change in self._tape:
            kind = self._kinds.get(number, OTHER)
            current[kind] = current.get(kind, 0) + change
            total += change
            if total > highest:
                highest, peak = total, dict(current)
        return peak

    def _watch(self, storage: torch.UntypedStorage) -> int:
        """The number of a storage; a new one is recorded from now on."""
        address = storage._cdata
        number = self._numbers.get(address)
        if number is None:
            number = self._numbers[address] = len(self._sizes)
            self._sizes.append(0)
            self._resized(number, storage.nbytes())
            self._watchers[number] = weakref.ref(storage, lambda _: self._gone(address, number))
        return number

    def _gone(self, address: int, number: int) -> None:
        del self._numbers[address], self._watchers[number]
        self._resized(number, 0)

    def _resized(self, number: int, size: int) -> None:
        if size != self._sizes[number]:
            self._tape.append((number, size - self._sizes[number]))
            self._sizes[number] = size


def _macs(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Multiply-accumulates of a matrix product or convolution; 0 for any other operation."""
    if func is torch.ops.aten.convolution_backward.default:
        # As many for the input and for the weights as in the forward pass; torch's own count ignores groups.
        outputs, _, weight, *_, (wants_input, wants_weight, _) = args
        return outputs.numel() * weight[0].numel() * (wants_input + wants_weight)
    count = flop_registry.get(func.overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=result) // 2


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by kind; activations are all that is no state of the training."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class StepCost:
    """What a step takes on one GPU."""

    memory: Memory
    macs: int  # multiply-accumulates, with those of recomputation
    num_parameters: int  # of the whole model


def simulate_step(
    config: TrainingConfig, *, num_classes: int, images_per_gpu: int, processes: Processes, on_gpu: bool = True
) -> StepCost:
    """The cost of one optimizer step for one process.

    Args:
        config: of the training.
        num_classes: of the classifier.
        images_per_gpu: images that this process computes in the step.
        processes: all of them; simulated are the collectives, not the others.
        on_gpu: count what is kept on a GPU; otherwise, what is kept on the CPU.
    """
    model, decay = build_on_meta(config, num_classes), config.ema_decay
    sharded = processes.is_distributed and config.parallelism != "ddp"
    with ExitStack() as stack:
        mesh = stack.enter_context(fake_mesh(config.parallelism, processes)) if sharded else None
        parallel = (
            Sharded(model, processes, mesh, bf16=config.precision == "bf16")
            if mesh is not None
            else SingleProcess(model)
        )
        whole_average = None if sharded else WeightAverage(model, decay).model
        # Tensors on the meta device become fake tensors when they are used.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if on_gpu:
            count_as_on_gpu(model)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Accessing the data pointer of FakeTensor"
            )  # by FSDP2, which compares two
            model.to_empty(device=CPU)
        if whole_average is None:
            with torch.no_grad():
                averages = ShardedAverage(model, decay).tensors()
        else:
            averages = (model if whole_average is model else whole_average.to_empty(device=CPU)).state_dict()
        compile_and_checkpoint(model, config, CPU)
        # Gradients are views of the buckets of DDP, which exist all the time.
        keep_gradients = processes.is_distributed and not sharded
        return _take_step(
            config, model, parallel, averages, images_per_gpu=images_per_gpu, keep_gradients=keep_gradients
        )


def build_on_meta(config: TrainingConfig, num_classes: int) -> CoAtNet:
    """The network of a training, in training mode, on the meta device."""
    with torch.device("meta"):
        model = create_model(
            config.model,
            num_classes=num_classes,
            in_channels=config.channels,
            resolution=config.preprocessing.side,
            stochastic_depth=config.stochastic_depth,
            **config.variations,
        )
    return model.train()


def _take_step(
    config: TrainingConfig,
    model: CoAtNet,
    parallel: Parallel,
    averages: Mapping[str, Tensor],
    *,
    images_per_gpu: int,
    keep_gradients: bool,
) -> StepCost:
    size, micro, loss = config.preprocessing.size, config.micro_batch_size, build_loss(config.loss, None)
    parameters = list(model.parameters())
    state = optimizer_state(config, model)
    memory = MemoryTracker()
    with memory:
        memory.label("average", averages.values())
        memory.label("parameters", model.state_dict().values())  # without averaging, the average is the parameters
        memory.label("optimizer", state)
        images = torch.empty(images_per_gpu, model.in_channels, *size, memory_format=torch.channels_last)
        targets = torch.empty(images_per_gpu, model.num_classes)
        memory.label("activations", (images, targets))
        if keep_gradients:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            memory.label_rest("gradients")
        # Two passes stand for many: from the second one on, there are gradients already.
        passes = list(zip(images.split(micro), targets.split(micro), strict=True))[:2]
        for number, (part, part_targets) in enumerate(passes, start=1):
            with nullcontext() if number == len(passes) else parallel.accumulating():
                with torch.autocast(CPU.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    logits = parallel(part)
                (loss(logits, part_targets) / images_per_gpu).backward()
            del logits
            memory.label_rest("gradients")  # with FSDP2, also the unsharded ones, until they are reduced
    macs = memory.macs * -(-images_per_gpu // micro) // len(passes)
    return StepCost(Memory(**memory.at_peak()), macs, sum(each.numel() for each in parameters))


@torch.no_grad()
def optimizer_state(config: TrainingConfig, model: CoAtNet) -> list[Tensor]:
    """The state that the optimizers have after the first step, for this process's shards of the parameters."""
    optimizers = build_optimizers(model, config.optimizer)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["matrices"] = 1  # of Muon: rows of a shard need not be whole matrices
            group["params"] = [local_tensor(each).detach().requires_grad_() for each in group["params"]]
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return [value for each in optimizers for state in each.state.values() for value in state.values()]


@contextmanager
def fake_mesh(kind: str, processes: Processes) -> Iterator[DeviceMesh]:
    """The device mesh of a fake process group: this process is the only one that exists."""
    # Private: torch has no public process group without processes.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=processes.rank, world_size=processes.world_size, store=FakeStore())
    try:
        yield mesh_for(kind, processes, CPU)  # before fake tensors, since it reads the values of one
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
        bias = F.pad(bias, (0, -keys % 8))[..., :keys]  # rows must be aligned to 16 bytes
        bias = bias.expand(batch, heads, queries, keys)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]
