"""What worker processes are kept from: hearing signals meant for the run, outliving it, and a shared memory too small.

Launchers and schedulers send a signal to every process of a run. The one that trains finishes its step and saves; its
workers are needed until then.
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

CHECK_SECONDS = 5.0  # between two looks whether all workers live; a forkserver's do not tell when they die
SHARED_MEMORY = "/dev/shm"
BATCHES_ON_THE_WAY = 2  # a worker, as torch has it


@contextmanager
def signals_held() -> Iterator[None]:
    """Processes started within never hear SIGTERM and SIGUSR1. One that arrives meanwhile is heard afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # where Python starts it later, it lets SIGTERM through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerReaper:
    """Processes that are started while `starting` is entered, and killed, if they still live, by `kill`."""

    def __init__(self) -> None:
        self._processes: set[multiprocessing.process.BaseProcess] = set()

    @contextmanager
    def starting(self) -> Iterator[None]:
        before = set(multiprocessing.active_children())
        try:
            yield
        finally:
            self._processes |= set(multiprocessing.active_children()) - before

    def kill(self) -> None:
        """Not to be waited for: one that hangs would never end, and none holds anything but batches."""
        for process in self._processes:
            process.kill()


def with_timeout(produced: Iterator[Item], patience: float) -> Iterator[Item]:
    """What a DataLoader with `timeout=CHECK_SECONDS` gives, waited for `patience` seconds each.

    By itself it would look after dead workers only once its whole timeout is over.
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
                if "timed out" not in str(error) or time.monotonic() - began >= patience:
                    raise
        yield item


def refuse_small_shared_memory(num_workers: int, bytes_a_batch: int) -> None:
    """Raises UserError if batches on their way from the workers do not fit where they lie; else a worker would die."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    needed, there = num_workers * BATCHES_ON_THE_WAY * bytes_a_batch, shutil.disk_usage(SHARED_MEMORY).free
    if needed > there:
        raise UserError(
            f"{SHARED_MEMORY} has room for {there / 1e6:.0f} MB, but the batches of {num_workers} worker processes "
            f"take {needed / 1e6:.0f} MB: give fewer num_workers or a smaller batch_size, or more shared memory "
            "(docker run --shm-size 2g)"
        )
