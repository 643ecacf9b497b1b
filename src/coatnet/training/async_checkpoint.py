"""Saving while training goes on: tensors are copied between two steps and written during the next ones.

Every process writes its part; the checkpoint gets its name at a step at which all processes know that all parts are on
the disk. At most one is in progress.
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
    checkpoint_error,
    part_name,
    publish,
    remove_old_checkpoints,
    stage,
    write_part,
)
from coatnet.training.distributed.processes import Processes
from coatnet.training.distributed.shards import num_parts, tensors_to_write


@dataclass(frozen=True)
class _InProgress:
    """A checkpoint that is being written, and this process's part of it, if it has one."""

    target: Path
    staged: Path
    state: Mapping[str, Any]
    part: Future[Fingerprint] | None
    file: str


class CheckpointWriter:
    """Writes checkpoints into a folder that all processes share, and removes older ones.

    Every method is called by all processes together.

    Attributes:
        last: name and state of the last checkpoint that was published.
    """

    def __init__(self, folder: Path, processes: Processes, keep: int, keep_every_hours: float = 0.0) -> None:
        """Keep the last `keep` checkpoints, and the first of every `keep_every_hours` hours of training (0: none)."""
        self.folder, self.processes = folder, processes
        self.keep, self.keep_every_hours = keep, keep_every_hours
        self.last: tuple[str, Mapping[str, Any]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_progress: _InProgress | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is in progress."""
        return self._in_progress is not None

    @property
    def written(self) -> bool:
        """Whether this process's part of it is on the disk, or has failed."""
        current = self._in_progress
        return current is not None and (current.part is None or current.part.done())

    def start(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy the tensors and begin to write them; `finish` publishes the checkpoint.

        Raises:
            UserError: the disk is too full or not writable; earlier checkpoints are untouched.
        """
        assert not self.busy
        staged, error = None, None
        if self.processes.is_main:
            try:
                staged = stage(self.folder, name, tensors)
            except OSError as raised:
                error = str(raised)
        staged, error = self.processes.broadcast((staged, error))
        if staged is None:
            raise checkpoint_error(self.folder / name, error)
        file = part_name(self.processes.rank, num_parts(tensors.values()))
        own = tensors_to_write(tensors, is_main=self.processes.is_main)
        part = self._thread.submit(write_part, staged / file, own) if own else None
        self._in_progress = _InProgress(self.folder / name, staged, state, part, file)

    def finish(self) -> None:
        """Wait for the parts of all processes and publish. Raises UserError; nothing of the checkpoint is left then."""
        if self._in_progress is None:
            return
        current, self._in_progress = self._in_progress, None
        parts, error = {}, None
        try:
            if current.part is not None:
                parts[current.file] = current.part.result()
        except (OSError, SafetensorError) as raised:
            error = str(raised)
        results = self.processes.gather((parts, error))
        if self.processes.is_main:
            error = self._publish(current, results)
        error = self.processes.broadcast(error)
        if error is not None:
            raise checkpoint_error(current.target, error)
        self.last = (current.target.name, current.state)

    def finish_or_warn(self, warn: Callable[[str], None]) -> None:
        """As `finish`, but a failure is passed to `warn`: a later checkpoint will do."""
        try:
            self.finish()
        except UserError as error:
            warn(f"warning: {error}; training goes on")

    def _publish(self, current: _InProgress, results: list[tuple[dict[str, Fingerprint], str | None]]) -> str | None:
        """Give the checkpoint its name; the error, if there is one."""
        parts = {name: fingerprint for of_process, _ in results for name, fingerprint in of_process.items()}
        error = next((error for _, error in results if error is not None), None)
        try:
            if error is None:
                publish(current.staged, current.target, parts, current.state)
                with suppress(OSError):  # what cannot be removed now is tried again next time
                    step = current.state.get("position", {}).get("step")
                    remove_old_checkpoints(self.folder, self.keep, self.keep_every_hours, step=step)
        except OSError as raised:
            error = str(raised)
        finally:
            shutil.rmtree(current.staged, ignore_errors=True)
        return error
