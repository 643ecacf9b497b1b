"""The processes of a packing: each takes a shard after the other, and none outlives the process that started it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from coatnet.data.datasets import Dataset
from coatnet.data.loader import num_cores, script_hidden
from coatnet.data.sampler import EpochSampler
from coatnet.data.shards.write import Written, write_shard
from coatnet.errors import UserError

_SHUFFLE_SEED = 0


class Piece(NamedTuple):
    """A shard to be written: the places `start` to `stop` of the shuffled split."""

    split: str
    name: str
    start: int
    stop: int


class _Work(NamedTuple):
    datasets: Mapping[str, Dataset]
    folder: Path
    records: Path

    def write(self, piece: Piece) -> Written:
        dataset = self.datasets[piece.split]
        indices = EpochSampler(len(dataset), _SHUFFLE_SEED).indices(np.arange(piece.start, piece.stop)).tolist()
        path = self.folder / piece.name
        return write_shard(dataset, indices, piece.start, path, self.records / f"{piece.name}.json")


def write_pieces(
    datasets: Mapping[str, Dataset], pieces: Sequence[Piece], folder: Path, records: Path, num_workers: int | None
) -> Iterator[tuple[Piece, Written]]:
    """Each piece when it is finished, in any order. One worker means: no process but this.

    Raises `UserError` if a process dies; what a process raises is raised here.
    """
    work = _Work(datasets, folder, records)
    num_workers = min(num_workers or num_cores(), len(pieces))
    if num_workers == 1:
        yield from ((piece, work.write(piece)) for piece in pieces)
        return
    # Fork would copy the locks of threads that do not exist in the child; a forkserver has no threads.
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "coatnet.data.shards.pack_processes"])
    executor = ProcessPoolExecutor(num_workers, context, _start, (work,))
    try:
        with script_hidden(unless_it_defines=type(datasets[pieces[0].split])):
            futures = {executor.submit(_write, piece): piece for piece in pieces}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        reason = "a process that was packing stopped, perhaps for lack of memory"
        raise UserError(f"{reason}; the same command goes on from there, --workers takes fewer") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start(work: _Work) -> None:
    global _own_work
    _own_work = work
    torch.set_num_threads(1)
    # The terminal sends Ctrl-C to every process; the first one stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _write(piece: Piece) -> Written:
    return _own_work.write(piece)


_own_work: _Work  # of a process that `_start` has set up
