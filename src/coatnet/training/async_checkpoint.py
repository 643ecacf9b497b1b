"""Saving beside the training: tensors are copied between two steps and written while the next ones are computed.

Every process writes its part; the checkpoint gets its name at a step at which all processes know that all parts are on
the disk. There is at most one on its way.
"""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from coatnet.errors import UserError
from coatnet.training.checkpoint import (
    Fingerprint,
    not_written,
    part_name,
    publish,
    retain,
    stage,
    staging_place,
    write_part,
)
from coatnet.training.distributed.processes import Processes
from coatnet.training.distributed.shards import num_parts, part_to_write


@dataclass(frozen=True)
class _OnItsWay:
    """A checkpoint that is being written; this process's part of it, if it has one."""

    target: Path
    staged: Path
    state: Mapping[str, Any]
    part: Future[Fingerprint] | None
    file: str


class Saver:
    """Puts checkpoints into a folder that all processes see, and removes older ones.

    Every method is called by all of them together. `last` is name and state of the last one published.
    """

    def __init__(self, folder: Path, processes: Processes, keep: int, keep_every_hours: float | None) -> None:
        self.folder, self.processes = folder, processes
        self.keep, self.keep_every_hours = keep, keep_every_hours
        self.last: tuple[str, Mapping[str, Any]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._on_its_way: _OnItsWay | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._on_its_way is not None

    @property
    def written(self) -> bool:
        """Whether this process's part of it is on the disk, or has failed."""
        return self._on_its_way is not None and (self._on_its_way.part is None or self._on_its_way.part.done())

    def begin(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy the tensors and go on; the checkpoint is there after `finish`. Raises UserError if it can not be."""
        assert not self.busy
        target, staged, error = self.folder / name, staging_place(self.folder, name), None
        if self.processes.is_main:
            try:
                stage(staged, tensors)
            except OSError as met:
                error = str(met)
        staged, error = self.processes.broadcast((staged, error))
        if error is not None:
            raise not_written(target, error)
        file = part_name(self.processes.rank, num_parts(tensors.values()))
        mine = part_to_write(tensors, leads=self.processes.is_main)
        part = self._thread.submit(write_part, staged / file, mine) if mine else None
        self._on_its_way = _OnItsWay(target, staged, state, part, file)

    def finish(self) -> None:
        """Wait for the parts of all processes and publish. Raises UserError; nothing of the checkpoint is left then."""
        if self._on_its_way is None:
            return
        ours, self._on_its_way = self._on_its_way, None
        parts, error = {}, None
        try:
            if ours.part is not None:
                parts[ours.file] = ours.part.result()
        except (OSError, SafetensorError) as met:
            error = str(met)
        told = self.processes.gather((parts, error))
        if self.processes.is_main:
            error = self._publish(ours, told)
        error = self.processes.broadcast(error)
        if error is not None:
            raise not_written(ours.target, error)
        self.last = (ours.target.name, ours.state)

    def finish_or_tell(self, say: Callable[[str], None]) -> None:
        """As `finish`, but one that can not be written is told: a later one will do."""
        try:
            self.finish()
        except UserError as error:
            say(f"warning: {error}; training goes on")

    def _publish(self, ours: _OnItsWay, told: list[tuple[dict[str, Fingerprint], str | None]]) -> str | None:
        """What went wrong with it, if anything did."""
        parts = {name: found for of_one, _ in told for name, found in of_one.items()}
        error = next((error for _, error in told if error is not None), None)
        try:
            if error is None:
                publish(ours.staged, ours.target, parts, ours.state)
                with suppress(OSError):  # what can not be removed now is tried again next time
                    retain(self.folder, self.keep, self.keep_every_hours)
        except OSError as met:
            error = str(met)
        finally:
            shutil.rmtree(ours.staged, ignore_errors=True)
        return error
