"""Tensors of which each process holds some of the rows; whole tensors pass through everything here unchanged.

FSDP2 gives process i of n the i-th of n equal runs of rows (the first dimension), the last ones shorter or empty.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Rows(NamedTuple):
    """The rows `first` to `first + count` of a tensor."""

    first: int
    count: int


class Stored(Protocol):
    """Tensors by name that can be read in part."""

    def __getitem__(self, name: str) -> Tensor: ...
    def rows(self, name: str, rows: Rows) -> Tensor: ...


def is_shared(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it lies on several processes. Not by its class, which takes a run on one process too long to import."""
    return hasattr(tensor, "device_mesh")


def here(tensor: Tensor) -> Tensor:
    """What this process holds, as an ordinary tensor that shares its memory."""
    return tensor.to_local() if is_shared(tensor) else tensor


def rows_here(tensor: "DTensor") -> Rows:
    """Which rows this process holds."""
    place, length = tensor.device_mesh.get_local_rank(_sharded_dimension(tensor)), tensor.shape[0]
    run = -(-length // num_holders(tensor))
    first = min(place * run, length)
    return Rows(first, min(run, length - first))


def num_holders(tensor: Tensor) -> int:
    """How many processes hold a part of it, copies not counted."""
    return tensor.device_mesh.size(_sharded_dimension(tensor)) if is_shared(tensor) else 1


def is_first_copy(tensor: Tensor) -> bool:
    """Whether no process of lower rank holds the same rows."""
    if not is_shared(tensor):
        return True
    mesh, sharded = tensor.device_mesh, _sharded_dimension(tensor)
    return all(mesh.get_local_rank(i) == 0 for i in range(mesh.ndim) if i != sharded)


@torch.no_grad()
def fill(target: Tensor, stored: Stored, name: str) -> None:
    """Copy a stored tensor into `target`, of which this process may hold some rows."""
    if is_shared(target):
        here(target).copy_(stored.rows(name, rows_here(target)))
    else:
        target.copy_(stored[name])


@torch.no_grad()
def completed(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process; all of them must ask for it."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def part_to_write(tensors: Mapping[str, Tensor], *, leads: bool) -> dict[str, Tensor]:
    """What this process is to write of them, copied to the CPU: its rows, and whole tensors if it is the first."""
    mine = {
        name: here(value) for name, value in tensors.items() if (is_shared(value) or leads) and is_first_copy(value)
    }
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in mine.items() if value.numel()}


def num_parts(tensors: Iterable[Tensor]) -> int:
    """The number of processes that have something to write."""
    return max(map(num_holders, tensors), default=1)


def _sharded_dimension(tensor: "DTensor") -> int:
    return next(i for i, placement in enumerate(tensor.placements) if placement.is_shard())
