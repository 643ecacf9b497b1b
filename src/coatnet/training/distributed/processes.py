"""The processes of one run: ranks, collectives, and the part of each batch that a process takes.

`torchrun` starts them and writes each one's rank into its environment. Without it a run is one process, for which
every collective is the identity and costs nothing.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from coatnet.data.loader import MAX_WORKERS
from coatnet.data.mixing import Mixing
from coatnet.errors import UserError, first_line
from coatnet.system.hardware import num_cores
from coatnet.system.launcher import Launched, meeting_place, read_launcher
from coatnet.system.parents import stop_with_launcher
from coatnet.system.terminal import warn

Value = TypeVar("Value")

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # for a process that neither answers nor ends
WAITING_SECONDS = 20  # chosen: machines of a cluster start within seconds of each other
MAIN_ONLY_TIMEOUT = timedelta(days=2)  # for what rank 0 does while the others wait, at the end of a run
_connections = itertools.count()  # of this process: a program may train more than once
_LOST_PROCESS_MESSAGES = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL")


class ProcessLost(UserError):
    """Another process of the run has ended or does not answer."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; by default it is the only one.

    `rank` counts over all machines, `local_rank` on this one. Every method must be called by all processes, in the same
    order, and raises ProcessLost if one of them is gone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    slow_group: Any = field(default=None, repr=False, compare=False)

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.world_size > 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that prints, logs and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of a few numbers, added over the processes. They go over the CPU, so no GPU is waited for."""
        if not self.is_distributed:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with translate_errors():
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Value, *, slow: bool = False) -> list[Value]:
        """The values of all processes, by rank; `slow` if one of them may take hours to come."""
        values: list[Any] = [value] * self.world_size
        if self.is_distributed:
            with translate_errors():
                dist.all_gather_object(values, value, self.slow_group if slow else None)
        return values

    def broadcast(self, value: Value) -> Value:
        """The value of rank 0, on every process."""
        return self._from_main(value, None)

    def run_on_main(self, work: Callable[[], Value]) -> Value:
        """The result of `work`, done by rank 0 while the others wait, for hours if need be; on every process."""
        return self._from_main(work() if self.is_main else None, self.slow_group)

    def _from_main(self, value: Any, group: Any) -> Any:
        values = [value]
        if self.is_distributed:
            with translate_errors():
                dist.broadcast_object_list(values, group=group, device=torch.device("cpu"))
        return values[0]

    def error_on_main(self, error: UserError) -> BaseException:
        """The exception for an error that every process meets: rank 0 reports it, the others end quietly."""
        return error if self.is_main else SystemExit(2)

    @contextmanager
    def collective(self, *, slow: bool = False) -> Iterator[None]:
        """A UserError that any process meets in the block ends all of them; the lowest such rank reports it.

        Give `slow` if the block may take hours.
        """
        if not self.is_distributed:
            yield
            return
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        failed = self.gather(error is not None, slow=slow)
        if any(failed):
            raise error if error is not None and failed.index(True) == self.rank else SystemExit(2)


SINGLE_PROCESS = Processes()


class BatchShare(NamedTuple):
    """Positions in the batch, 0 to batch_size - 1, that a process takes. The first `num_extra` are only blended
    with."""

    positions: NDArray[np.int64]
    num_extra: int


def batch_share(batch_size: int, mixing: Mixing, processes: Processes) -> BatchShare:
    """Split a batch into equal runs, some longer by one if need be; the batch is the same for any number of processes.

    Images are blended with their neighbor in the batch. So that this is the same however the batch is split, a share
    begins with the last image of the one before.
    """
    rank, number = processes.rank, processes.world_size
    positions = np.arange(rank * batch_size // number, (rank + 1) * batch_size // number)
    blends = bool(mixing.mixup_alpha or mixing.cutmix_alpha)
    if not processes.is_distributed or not blends or not len(positions):
        return BatchShare(positions, 0)
    return BatchShare(np.concatenate(([(positions[0] - 1) % batch_size], positions)), 1)


class CoreShare(NamedTuple):
    """What a process does with its part of the cores of its machine."""

    workers: int
    threads: int


def share_cores(
    num_workers: int | Literal["auto"],
    processes: Processes,
    *,
    on_cpu: bool,
    images: Literal["files", "decoded", "arrays"] = "files",
) -> CoreShare:
    """Worker processes that load images, and threads that compute, of each process.

    Computing on a CPU, both together take no more than its part of the cores, since a thread that waits for its core
    keeps all others of a step waiting. Decoding and RandAugment take 5 to 20 ms an image, a step of a small network 30
    ms of all cores together, so a third of the cores load images. Those that are kept decoded take 1 to 3 ms, and fewer
    than eight cores lose less by loading them between two steps than by computing with one thread less.

    Args:
        num_workers: what the recipe asks for; a number is taken as it is.
        processes: of the run.
        on_cpu: whether the steps are computed there, and not on a GPU.
        images: what is read: files, images that are kept decoded, or arrays in memory, for which there are no workers.
    """
    cores, threads = max(1, num_cores() // processes.local_world_size), torch.get_num_threads()
    if num_workers != "auto":
        return CoreShare(num_workers, threads)
    if images == "arrays":
        return CoreShare(0, threads)
    if not on_cpu:
        return CoreShare(min(MAX_WORKERS, cores), threads)
    workers = min(MAX_WORKERS, cores // 8 if images == "decoded" else max(cores // 3, cores - threads))
    return CoreShare(workers, max(1, min(threads, cores - workers)))


def require_single_process(name: str) -> None:
    """Raises UserError if a launcher has started several processes."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{name} is for one process: give it without torchrun, and train with torchrun afterwards")


@contextmanager
def distributed_processes() -> Iterator[Processes]:
    """The processes that a launcher has started; connects them for the block unless the program has connected them.

    Raises UserError if a machine has more processes than GPUs, the variables of the launcher do not fit together, or
    the other processes do not come.
    """
    launched = read_launcher()
    if launched.world_size == 1:
        yield Processes()
        return
    connected_here = not dist.is_initialized()
    if connected_here:
        stop_with_launcher(os.environ)
        connect(os.environ, launched)
    slow_group = dist.new_group(backend="gloo", timeout=MAIN_ONLY_TIMEOUT)
    orderly = False
    try:
        yield Processes(*launched, slow_group)
        orderly = True
    except SystemExit:  # all of them leave at the same point
        orderly = True
        raise
    finally:
        if connected_here and orderly:  # else the others may be gone, and this would wait for them
            dist.destroy_process_group()


def connect(environment: Mapping[str, str], launched: Launched) -> None:
    """Connect to the other processes: over gloo for what is on the CPU, over NCCL for what is on GPUs."""
    local_rank, gpus = launched.local_rank, torch.cuda.is_available()
    if gpus and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: "
            "start at most one process a GPU (--nproc-per-node)"
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    store, rank, world_size = meet(environment, launched)
    if environment["WORLD_SIZE"] == environment.get("LOCAL_WORLD_SIZE"):
        # After a restart torchrun reuses the store, with the addresses of the dead processes still in it. On several
        # machines their counts of restarts differ, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the remedy.
        store = dist.PrefixStore(f"restart-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store = dist.PrefixStore(f"connection-{next(_connections)}", store)  # the addresses of those before are still in it
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)


def meet(environment: Mapping[str, str], launched: Launched) -> tuple[dist.Store, int, int]:
    """Wait for the other processes, in a thread: torch's own wait says nothing, and hears no Ctrl-C."""
    place = meeting_place(environment)
    found: Future[tuple[dist.Store, int, int]] = Future()

    def wait() -> None:
        try:
            found.set_result(next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT)))
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    while True:
        try:
            return found.result(WAITING_SECONDS)
        except TimeoutError:
            if not found.done():
                warn(f"process {launched.rank} of {launched.world_size} waits at {place} for the others to start")
                continue
            raise
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"process {launched.rank} of {launched.world_size} could not meet the others at {place}: "
                f"{first_line(error)}; start all of them with torchrun"
            ) from error


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raise ProcessLost for what the backends raise when a process is gone."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(text in str(error) for text in _LOST_PROCESS_MESSAGES)
        if not lost:
            raise
        raise ProcessLost(
            "another process of this run has ended or does not answer; its own output gives the reason. "
            "The same command resumes from the last checkpoint"
        ) from error
