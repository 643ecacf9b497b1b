"""A network as the processes of a run compute it together: as copies (DDP), or in shards (FSDP2, HSDP).

Both leave on every process the gradient of the *mean over processes* of what they called `backward` on. So each
divides the summed loss of its images by the mean number of images a process, and the gradient is that of the mean
loss over the whole batch, whatever the shares.
"""

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from coatnet.errors import UserError
from coatnet.model.network import CoAtNet
from coatnet.training.distributed.processes import Processes


class Replicated:
    """A copy on every process, gradients averaged while the backward pass goes on (DistributedDataParallel).

    BatchNorm normalises with the images of its process; its running statistics become their average at every step,
    so that they are the same everywhere and no checkpoint depends on whose they are.
    """

    def __init__(self, model: CoAtNet, processes: Processes, device: torch.device) -> None:
        self.model, self.processes, self.device = model, processes, device
        self._learning: list[bool] = []
        self._copies: DistributedDataParallel | None = None

    def __call__(self, images: Tensor) -> Tensor:
        assert self._copies is not None
        return self._copies(images)

    def accumulating(self) -> AbstractContextManager[object]:
        assert self._copies is not None
        return self._copies.no_sync()

    def reduce(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = average(loss[None], self.model, self.processes)
        return loss, norm

    def prepare(self) -> None:
        learning = [parameter.requires_grad for parameter in self.model.parameters()]
        if learning == self._learning:
            return
        # DDP is told once what learns. The old one's hooks go with it.
        self._learning, self._copies = learning, None
        gpus = [self.processes.local_rank] if self.device.type == "cuda" else None
        self._copies = DistributedDataParallel(self.model, device_ids=gpus, gradient_as_bucket_view=True)
        self._copies.broadcast_buffers = False  # as an argument it has another name from one release to the next
        self._settle_buckets()

    def _settle_buckets(self) -> None:
        """One pass that counts for nothing: DDP adds up gradients in one order in its first pass and in another from
        the second on, so with three processes or more a resumed run would differ in the last bit."""
        model, training = self.model, self.model.training
        model.eval()  # or BatchNorm would count it
        images = torch.zeros(2, model.in_channels, model.resolution, model.resolution, device=self.device)
        self(images).sum().backward()
        model.zero_grad(set_to_none=True)
        model.train(training)


class Sharded:
    """Every process holds some rows of each parameter and gathers a block when it is computed (fully_shard).

    On a mesh of two dimensions the first holds copies, the second shards (HSDP). BatchNorm as in `Replicated`; its
    weights stay in fp32, as its buffers must.
    """

    def __init__(self, model: CoAtNet, processes: Processes, mesh: DeviceMesh, *, bf16: bool) -> None:
        """In place. What lies on the meta device stays there, to be materialised.

        Raises:
            UserError: the mesh is one of CPUs, and torch is older than 2.7.
        """
        if mesh.device_type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise UserError(
                f"shards on CPUs need torch 2.7 or newer, this is {torch.__version__}: give parallelism ddp"
            )
        self.model, self.processes = model, processes
        self.num_shards = mesh.size(mesh.ndim - 1)
        model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other; the maps stay channels-last
        # Autocast would keep a bf16 copy of every weight for the backward pass, which is what sharding is to spare.
        halved = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        whole = MixedPrecisionPolicy()
        for number, stage in enumerate(model.stages, start=1):
            for block in stage.children():
                policy = halved if bf16 and not batch_norms(block) else whole
                # The backward pass begins with the last stage: to gather it twice would be in vain.
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=number < len(model.stages))
        fully_shard(model, mesh=mesh, mp_policy=whole)

    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images)

    def accumulating(self) -> AbstractContextManager[object]:
        return _Unreduced(self.model)

    def reduce(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        loss, squared = average(torch.stack((loss, norm.square())), self.model, self.processes)
        return loss, (squared * self.num_shards).sqrt()

    def prepare(self) -> None:
        """Nothing: shards follow by themselves what learns."""


class _Unreduced:
    """While entered, FSDP2 keeps the gradients of a backward pass to itself."""

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, FSDPModule)
        self._model = model

    def __enter__(self) -> None:
        self._model.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self._model.set_requires_gradient_sync(True)


def mesh_for(kind: str, processes: Processes, device: torch.device) -> DeviceMesh:
    """All processes in a row for "fsdp"; for "hsdp" a row for each machine.

    Raises UserError if the machines have different numbers of processes.
    """
    num_shards = processes.local_world_size if kind == "hsdp" else processes.world_size
    num_copies, rest = divmod(processes.world_size, num_shards)
    if rest:
        raise UserError(
            f"parallelism hsdp needs the same number of processes on every machine, but {processes.world_size} are "
            f"not a multiple of the {num_shards} of this one: start equally many, or give parallelism fsdp"
        )
    if num_copies == 1:
        return init_device_mesh(device.type, (num_shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (num_copies, num_shards), mesh_dim_names=("replicate", "shard"))


def batch_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    """The BatchNorms whose statistics are those of one process (SyncBatchNorm is of another class)."""
    return [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]


@torch.no_grad()
def average(values: Tensor, model: nn.Module, processes: Processes) -> Tensor:
    """The mean over the processes of `values` (N,) and, in place and in the same message, of the running statistics of
    every BatchNorm that takes them at present."""
    learning = [norm for norm in batch_norms(model) if norm.training]
    statistics = [each for norm in learning for each in (norm.running_mean, norm.running_var) if each is not None]
    message = torch.cat([values, *(each.flatten() for each in statistics)])
    dist.all_reduce(message)
    message /= processes.world_size
    values, *means = message.split([len(values), *(each.numel() for each in statistics)])
    if statistics:
        torch._foreach_copy_(statistics, means)
    return values
