"""Tensors of which each process holds some of the rows; whole tensors pass through every function unchanged.

FSDP2 gives process i of n the i-th of n equal runs of rows (the first dimension), the last ones shorter or empty.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Rows(NamedTuple):
    """The rows `first` to `first + count` of a tensor."""

    first: int
    count: int


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether several processes hold parts of it. Not by its class, which takes a single process long to import."""
    return hasattr(tensor, "device_mesh")


def local_tensor(tensor: Tensor) -> Tensor:
    """The part that this process holds, as an ordinary tensor that shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_rows(tensor: "DTensor") -> Rows:
    """The rows that this process holds."""
    rank, length = tensor.device_mesh.get_local_rank(_sharded_dimension(tensor)), tensor.shape[0]
    run = -(-length // num_shards(tensor))
    first = min(rank * run, length)
    return Rows(first, min(run, length - first))


def num_shards(tensor: Tensor) -> int:
    """The number of parts it is divided into, copies not counted."""
    return tensor.device_mesh.size(_sharded_dimension(tensor)) if is_sharded(tensor) else 1


def is_first_copy(tensor: Tensor) -> bool:
    """Whether no process of lower rank holds the same rows."""
    if not is_sharded(tensor):
        return True
    mesh, sharded = tensor.device_mesh, _sharded_dimension(tensor)
    return all(mesh.get_local_rank(i) == 0 for i in range(mesh.ndim) if i != sharded)


@torch.no_grad()
def fill(target: Tensor, read: Callable[[Rows | None], Tensor]) -> None:
    """Copy a tensor into `target`, of which this process may hold some rows; `read` gives those rows, all for None."""
    if is_sharded(target):
        local_tensor(target).copy_(read(local_rows(target)))
    else:
        target.copy_(read(None))


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on every process; all of them must call it together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def tensors_to_write(tensors: Mapping[str, Tensor], *, is_main: bool) -> dict[str, Tensor]:
    """What this process writes of them, copied to the CPU: the rows it holds, and whole tensors if it is rank 0."""
    own = {
        name: local_tensor(value)
        for name, value in tensors.items()
        if (is_sharded(value) or is_main) and is_first_copy(value)
    }
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in own.items() if value.numel()}


def num_parts(tensors: Iterable[Tensor]) -> int:
    """The number of processes that write a part of them."""
    return max(map(num_shards, tensors), default=1)


def _sharded_dimension(tensor: "DTensor") -> int:
    return next(i for i, placement in enumerate(tensor.placements) if placement.is_shard())
