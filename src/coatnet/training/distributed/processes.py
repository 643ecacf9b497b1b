"""The processes of one run: which is the first, what they add up, what they tell each other.

`torchrun` starts them and writes each one's place into its environment. Without it a run is one process, for which
everything here is the identity and costs nothing.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from coatnet.errors import UserError

Value = TypeVar("Value")

PATIENCE = timedelta(minutes=10)  # with a process that neither answers nor ends
LONG = timedelta(days=2)  # for what the first process does alone at the end of a run
_SIGNS_OF_LOSS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL")


class ProcessLost(UserError):
    """Another process of the run has ended or does not answer."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; by default there is no other.

    `rank` counts over all machines, `local_rank` on this one. Every method must be called by all processes, in the same
    order, and raises ProcessLost when one of them is gone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    patient_group: Any = field(default=None, repr=False, compare=False)

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints, logs and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of a few numbers, added over the processes. They go over the CPU, so no GPU is waited for."""
        if self.alone:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with translate_errors():
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank."""
        values: list[Any] = [value] * self.world_size
        if not self.alone:
            with translate_errors():
                dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """The first process's value."""
        return self._from_first(value, None)

    def first_does(self, work: Callable[[], Value]) -> Value:
        """What `work` gives the first process, which may take it hours; the others wait."""
        return self._from_first(work() if self.is_main else None, self.patient_group)

    def _from_first(self, value: Any, group: Any) -> Any:
        values = [value]
        if not self.alone:
            with translate_errors():
                dist.broadcast_object_list(values, group=group, device=torch.device("cpu"))
        return values[0]

    def error_on_main(self, error: UserError) -> BaseException:
        """What to raise for an error that every process meets: the first says it, the others end quietly."""
        return error if self.is_main else SystemExit(2)

    @contextmanager
    def collective(self) -> Iterator[None]:
        """A user's mistake that any process meets in the block ends all of them; the first to meet it says it."""
        if self.alone:
            yield
            return
        error = None
        try:
            yield
        except UserError as met:
            error = met
        told = self.gather(error is not None)
        if any(told):
            raise error if error is not None and told.index(True) == self.rank else SystemExit(2)


SINGLE_PROCESS = Processes()


@contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """The processes that a launcher has started, connected while the block runs, if the program has not connected them.

    Raises UserError if there are more of them on a machine than GPUs.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    if world_size == 1 or "RANK" not in environment:
        yield Processes()
        return
    rank, local_rank = int(environment["RANK"]), int(environment.get("LOCAL_RANK", "0"))
    ours = not dist.is_initialized()
    if ours:
        connect(environment)
    patient_group = dist.new_group(backend="gloo", timeout=LONG)
    local_world_size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    orderly = False
    try:
        yield Processes(rank, world_size, local_rank, local_world_size, patient_group)
        orderly = True
    except SystemExit:  # all of them leave at the same point
        orderly = True
        raise
    finally:
        if ours and orderly:  # else the others may be gone, and their answer would be waited for
            dist.destroy_process_group()


def connect(environment: Mapping[str, str]) -> None:
    """Meet the other processes: over gloo for what is on the CPU, over NCCL for what is on GPUs."""
    local_rank, gpus = int(environment.get("LOCAL_RANK", "0")), torch.cuda.is_available()
    if gpus and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: "
            "start at most one process a GPU (--nproc-per-node)"
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=PATIENCE))
    if environment["WORLD_SIZE"] == environment.get("LOCAL_WORLD_SIZE"):
        # After a restart torchrun hands out the same store, with the addresses of the dead still in it. On several
        # machines their counts of restarts differ, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the remedy.
        store = dist.PrefixStore(f"restart-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turns what the backends raise when a process is gone into ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS_OF_LOSS)):
            raise
        raise ProcessLost(
            "another process of this run has ended or does not answer; what it says itself is the reason. "
            "The same command resumes from the last checkpoint"
        ) from error
