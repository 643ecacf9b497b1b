"""The network replicated on the processes of a run (DDP), or sharded over them (FSDP2, HSDP).

Both average the gradients over the processes. Each process divides the summed loss of its images by the mean number of
images of a process, so that the average is the gradient of the mean loss over the whole batch, whatever the shares.
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
    """A copy on every process; gradients are averaged during the backward pass (DistributedDataParallel).

    BatchNorm normalizes with the images of its process. Its running statistics are averaged at every step, so that they
    are the same on all processes and in any checkpoint.
    """

    def __init__(self, model: CoAtNet, processes: Processes, device: torch.device) -> None:
        self.model, self.processes, self.device = model, processes, device
        self._trainable: list[bool] = []
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
        trainable = [parameter.requires_grad for parameter in self.model.parameters()]
        if trainable == self._trainable:
            return
        # DDP reads once which parameters learn. The hooks of the old one go with it.
        self._trainable, self._copies = trainable, None
        gpus = [self.processes.local_rank] if self.device.type == "cuda" else None
        self._copies = DistributedDataParallel(self.model, device_ids=gpus, gradient_as_bucket_view=True)
        self._copies.broadcast_buffers = False  # as an argument it has another name from one release to the next
        self._build_buckets()

    def _build_buckets(self) -> None:
        """Make a pass whose gradients are discarded: DDP adds gradients in one order in its first pass and in another
        from the second on, so with three processes or more a resumed run would differ in the last bit."""
        model, training = self.model, self.model.training
        model.eval()  # or BatchNorm would count it
        images = torch.zeros(2, model.in_channels, model.resolution, model.resolution, device=self.device)
        self(images).sum().backward()
        model.zero_grad(set_to_none=True)
        model.train(training)


class Sharded:
    """Some rows of each parameter on every process, which gather a block when it is computed (fully_shard).

    On a mesh of two dimensions the first holds copies, the second shards (HSDP). BatchNorm as in `Replicated`; its
    weights stay in fp32, as its buffers must.
    """

    def __init__(self, model: CoAtNet, processes: Processes, mesh: DeviceMesh, *, bf16: bool) -> None:
        """Shard in place. Parameters on the meta device stay there until `materialize`.

        Raises:
            UserError: the mesh is one of CPUs, and torch is older than 2.7.
        """
        if mesh.device_type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise UserError(f"shards on CPUs, or plans of them, need torch 2.7 or newer, this is {torch.__version__}")
        self.model, self.processes = model, processes
        self.num_shards = mesh.size(mesh.ndim - 1)
        model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other; the maps stay channels-last
        # Autocast would keep a bf16 copy of every weight for the backward pass, which sharding is meant to save.
        reduced = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        full = MixedPrecisionPolicy()
        for number, stage in enumerate(model.stages, start=1):
            for block in stage.children():
                policy = reduced if bf16 and not batch_norms(block) else full
                # The backward pass begins with the last stage, which therefore stays gathered.
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=number < len(model.stages))
        fully_shard(model, mesh=mesh, mp_policy=full)

    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images)

    def accumulating(self) -> AbstractContextManager[object]:
        return _Unreduced(self.model)

    def reduce(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        loss, squared = average(torch.stack((loss, norm.square())), self.model, self.processes)
        return loss, (squared * self.num_shards).sqrt()

    def prepare(self) -> None:
        """Do nothing: FSDP2 follows which parameters learn by itself."""


class _Unreduced:
    """While entered, FSDP2 does not reduce gradients over the processes."""

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, FSDPModule)
        self._model = model

    def __enter__(self) -> None:
        self._model.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self._model.set_requires_gradient_sync(True)


def mesh_for(kind: str, processes: Processes, device: torch.device) -> DeviceMesh:
    """The mesh of all processes: one dimension for "fsdp"; machines by processes for "hsdp".

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
    """The BatchNorms that take statistics over the images of one process; SyncBatchNorm is another class."""
    return [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]


@torch.no_grad()
def average(values: Tensor, model: nn.Module, processes: Processes) -> Tensor:
    """The mean over the processes of `values` (N,) and, in place and in the same message, of the running statistics of
    every BatchNorm in training mode."""
    training = [norm for norm in batch_norms(model) if norm.training]
    statistics = [each for norm in training for each in (norm.running_mean, norm.running_var) if each is not None]
    message = torch.cat([values, *(each.flatten() for each in statistics)])
    dist.all_reduce(message)
    message /= processes.world_size
    values, *means = message.split([len(values), *(each.numel() for each in statistics)])
    if statistics:
        torch._foreach_copy_(statistics, means)
    return values
