"""Worker processes that make batches, shielded and bounded.

They are shielded from the signals that launchers and schedulers send to every process of a run, since the main process
needs them to finish its step and save; they do not outlive the run, nor fill a shared memory that is too small.
"""

import functools
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from coatnet.data.datasets import Dataset
from coatnet.errors import UserError, first_line
from coatnet.system.parents import end_with_parent
from coatnet.system.terminal import warn

Item = TypeVar("Item")

CHECK_SECONDS = 5.0  # between two checks that all workers are alive; a forkserver does not report their death
SHARED_MEMORY = "/dev/shm"
PREFETCHED_BATCHES = 2  # per worker, as in torch
BATCH_TIMEOUT_SECONDS = 900.0  # chosen: far above what slow storage takes, far below a night


@contextmanager
def block_signals() -> Iterator[None]:
    """Processes started in the block ignore SIGTERM and SIGUSR1. This one handles them after the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # where Python starts it later, it unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerReaper:
    """Kills the processes that were started inside `starting`."""

    def __init__(self) -> None:
        self._processes: set[multiprocessing.process.BaseProcess] = set()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Register the processes that are started in the block."""
        before = set(multiprocessing.active_children())
        try:
            yield
        finally:
            self._processes |= set(multiprocessing.active_children()) - before

    def kill(self) -> None:
        """Kill them without waiting: one that hangs would never end, and they hold nothing but batches."""
        for process in self._processes:
            process.kill()


def with_timeout(produced: Iterator[Item], seconds: float) -> Iterator[Item]:
    """Yield the items of a DataLoader with `timeout=CHECK_SECONDS`, waiting up to `seconds` for each.

    With one long timeout, the DataLoader would notice dead workers only at its end.
    """
    while True:
        began = time.monotonic()
        while True:
            try:
                item = next(produced)
                break
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" not in str(error) or time.monotonic() - began >= seconds:
                    raise
        yield item


def may_start_processes() -> bool:
    """Whether Python lets this process start others; if not, as in a worker of Celery or of a Pool, a line says so."""
    return not multiprocessing.current_process().daemon or _told_that_none_start(os.getpid())


@functools.cache
def _told_that_none_start(_: int) -> Literal[False]:
    """Tell it once in a process."""
    warn("this process is daemonic and cannot start workers: it decodes by itself")
    return False


def free_shared_memory() -> float:
    """Bytes that are left of shared memory; infinite where it is no file system of its own."""
    return shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else math.inf


def workers_that_fit(bytes_per_batch: int) -> float:
    """The number of workers whose batches fit into shared memory."""
    return free_shared_memory() // max(1, PREFETCHED_BATCHES * bytes_per_batch)


def require_shared_memory(num_workers: int, bytes_per_batch: int) -> None:
    """Raise a UserError if the batches that workers prefetch do not fit into shared memory: a worker would crash."""
    needed, free = num_workers * PREFETCHED_BATCHES * bytes_per_batch, free_shared_memory()
    if needed > free:
        raise UserError(
            f"{SHARED_MEMORY} has room for {free / 1e6:.0f} MB, but the batches of {num_workers} worker processes "
            f"take {needed / 1e6:.0f} MB: give fewer num_workers or a smaller batch_size, or more shared memory "
            "(docker run --shm-size 2g)"
        )


class Batches(Protocol):
    """Batches by their number, made of the images of a dataset."""

    @property
    def dataset(self) -> Dataset:
        """The images."""
        ...

    def first_index(self, number: int) -> int:
        """The place in the dataset of the first image of a batch."""
        ...

    def __getitem__(self, number: int) -> Any: ...


def load_in_workers(
    batches: Batches, numbers: range, num_workers: int, *, bytes_per_batch: int, pin_memory: bool
) -> Iterator[Any]:
    """The batches with these numbers, in order, made by worker processes.

    Raises UserError if a worker dies or hangs, raises one, or the batches do not fit into shared memory.
    """
    # Fork would copy the locks of threads that do not exist in the child; a forkserver has no threads.
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "coatnet.data.loader"])
    loader: Any = DataLoader(
        batches,  # pyrefly: ignore[bad-argument-type]  # a class with __getitem__ is all it needs
        batch_size=None,  # an item is a whole batch
        sampler=numbers,
        num_workers=num_workers,
        prefetch_factor=PREFETCHED_BATCHES,
        timeout=CHECK_SECONDS,
        multiprocessing_context=context,
        worker_init_fn=_start_worker,
        collate_fn=_identity,
        pin_memory=pin_memory,
    )
    require_shared_memory(num_workers, bytes_per_batch)
    workers, num_received = WorkerReaper(), 0
    try:
        with hide_main_script(unless_it_defines=type(batches.dataset)), block_signals(), workers.starting():
            produced = iter(loader)
        for batch in with_timeout(produced, BATCH_TIMEOUT_SECONDS):
            num_received += 1
            yield batch
    except UserError as error:  # without the traceback that torch puts around a worker's message
        own = str(error).rpartition("UserError: ")[2]
        raise UserError(re.split(r"\n|\\nwhile reading image ", own)[0]) from error
    except (RuntimeError, OSError, EOFError) as error:  # which one depends on what the worker did when it was killed
        if str(error).startswith("Caught "):  # raised in a worker that is alive
            raise
        reason = first_line(error)
        name = batches.dataset.describe(batches.first_index(numbers[min(num_received, len(numbers) - 1)]))
        if "timed out" in reason:
            raise UserError(
                f"no batch for {BATCH_TIMEOUT_SECONDS:g} s: a worker process hangs, or reads too slowly ({name})"
            ) from error
        raise UserError(f"a worker process stopped, perhaps for lack of memory: {reason} (near {name})") from error
    finally:
        workers.kill()


@contextmanager
def hide_main_script(unless_it_defines: type) -> Iterator[None]:
    """Keep processes that are started in the block from running the user's script again.

    Without a `__main__` guard the script would train again. The workers need nothing from it, unless it defines the
    class of the dataset.
    """
    names = vars(sys.modules["__main__"])
    shown = {name: names[name] for name in ("__spec__", "__file__") if name in names}
    if unless_it_defines.__module__ != "__main__":
        names.update(dict.fromkeys(shown))
    try:
        yield
    finally:
        names.update(shown)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # The terminal sends Ctrl-C to the workers too; the main process finishes its step and stops them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _identity(batch: Any) -> Any:
    return batch
