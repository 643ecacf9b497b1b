"""Shield worker processes from signals, from outliving the run, and from a shared memory that is too small.

Launchers and schedulers send a signal to every process of a run. The main process finishes its step and saves; it
needs its workers until then.
"""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TypeVar

from coatnet.errors import UserError

Item = TypeVar("Item")

CHECK_SECONDS = 5.0  # between two checks that all workers are alive; a forkserver does not report their death
SHARED_MEMORY = "/dev/shm"
PREFETCHED_BATCHES = 2  # per worker, as in torch


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


def require_shared_memory(num_workers: int, bytes_per_batch: int) -> None:
    """Raise a UserError if the batches that workers prefetch do not fit into shared memory: a worker would crash."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    needed, free = num_workers * PREFETCHED_BATCHES * bytes_per_batch, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"{SHARED_MEMORY} has room for {free / 1e6:.0f} MB, but the batches of {num_workers} worker processes "
            f"take {needed / 1e6:.0f} MB: give fewer num_workers or a smaller batch_size, or more shared memory "
            "(docker run --shm-size 2g)"
        )
