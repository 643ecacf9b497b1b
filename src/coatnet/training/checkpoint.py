"""Checkpoints: folders that are complete or absent, since they are written under a temporary name and then renamed.

A checkpoint is `step-000000123/` with `tensors.safetensors` (or, of a sharded run, `tensors-00000-of-00008.safetensors`
and so on), `state.json` and `manifest.json` (size and CRC-32 of the others). There is no pointer to the latest one: it
is the complete one with the highest step. Reading a checkpoint executes nothing.
"""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, FiniteFloat, Strict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coatnet.errors import UserError, cut, one_line, shorten
from coatnet.system.files import (
    check_regular,
    commit_folder,
    fsync_path,
    open_regular,
    remove_folder,
    remove_leftovers,
    temporary_path,
)
from coatnet.system.json_reader import Count, Counts, read_json, require_object, validate
from coatnet.training.distributed.shards import Rows

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{9})$")
_PART = re.compile(r"tensors(-\d{5}-of-\d{5})?\.safetensors")

Fingerprint = list[int]  # size and CRC-32 of a file


_Counter = Annotated[Count, Strict()]
_Number = Annotated[FiniteFloat, Strict()]


@dataclass
class TrainState:
    """Counters of a run: all that resuming needs beside tensors. The names are keys of a checkpoint's `state.json`.

    Attributes:
        step: optimizer steps so far.
        seconds: duration of the run so far, over all resumptions.
        loss_sum: sum of the losses since the last log line.
        norm_sum: sum of the gradient norms since the last log line.
        since_log: number of steps in these sums.
        best: best score of all evaluations so far.
        evaluations_since_best: evaluations after the best one.
        measured: step of the last evaluation.
        left_out: steps that were skipped because their loss or gradient was not finite.
    """

    step: _Counter = 0
    seconds: Annotated[_Number, Field(ge=0)] = 0.0
    loss_sum: _Number = 0.0
    norm_sum: _Number = 0.0
    since_log: _Counter = 0
    best: _Number = -1.0
    evaluations_since_best: _Counter = 0
    measured: _Counter = 0
    left_out: _Counter = 0


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files, each read when it is asked for.

    A tensor that lies in several files is their rows one after the other.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises SafetensorError or OSError if a file is not readable safetensors."""
        self._parts: dict[str, list[Any]] = {}
        for path in sorted(files):
            check_regular(path)
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118  # no mapping: it cannot be iterated
                self._parts.setdefault(name, []).append(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.get_tensor(name) for file in self._parts[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """Some rows of a tensor, without reading the others; all for None."""
        if rows is None:
            return self[name]
        found, start, (first, count) = [], 0, rows
        for file in self._parts[name]:
            part = file.get_slice(name)
            length = part.get_shape()[0]
            begin, end = max(first - start, 0), min(first + count - start, length)
            if begin < end:
                found.append(part[begin:end])
            start += length
        if not found:
            return self._parts[name][0].get_slice(name)[0:1][:0]
        return found[0] if len(found) == 1 else torch.cat(found)


class CorruptCheckpoint(Exception):
    """A folder is not a complete checkpoint; the text gives the reason, in one line of bounded length."""

    def __init__(self, reason: str) -> None:
        super().__init__(cut(one_line(reason)))


@dataclass(frozen=True)
class Checkpoint:
    """What a run resumes from: tensors by name, and plain values."""

    tensors: StoredTensors
    state: Mapping[str, Any]
    path: Path


def stage(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Path:
    """Make the temporary folder of a checkpoint. Raises OSError, also if the disk has too little room for the
    tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    _require_space(folder, tensors)
    staged = temporary_path(folder / name)
    staged.mkdir()
    return staged


def part_name(part: int, num_parts: int) -> str:
    """Name of the file that one of several processes writes its tensors to."""
    return "tensors.safetensors" if num_parts == 1 else f"tensors-{part:05d}-of-{num_parts:05d}.safetensors"


def write_part(path: Path, tensors: Mapping[str, Tensor]) -> Fingerprint:
    """Write tensors and flush them to the disk. Raises OSError or SafetensorError."""
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
    fsync_path(path)
    return _fingerprint(path)


def publish(staged: Path, target: Path, parts: Mapping[str, Fingerprint], state: Mapping[str, Any]) -> None:
    """Complete a staged checkpoint, whose parts are on the disk, and rename it to its place. Raises OSError."""
    (staged / "state.json").write_text(json.dumps(state))
    files = {**parts, "state.json": _fingerprint(staged / "state.json")}
    (staged / "manifest.json").write_text(json.dumps({"format": FORMAT_VERSION, "files": files}))
    for name in ("state.json", "manifest.json"):
        fsync_path(staged / name)
    commit_folder(staged, target, replace=True)


def checkpoint_error(target: Path, reason: object) -> UserError:
    """The error for a checkpoint that could not be written."""
    full = any(text in str(reason) for text in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "disk full"))
    return UserError(f"the checkpoint {target} was not written: {reason}" + "; free some space there" * full)


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`. Raises CorruptCheckpoint, before reading any tensor, if it is incomplete."""
    verify(path)
    return open_checkpoint(path)


def verify(path: Path) -> None:
    """Raises CorruptCheckpoint unless every file has the size and checksum with which it was written."""
    files = _read_manifest(path)
    try:
        with ThreadPoolExecutor(8) as threads:
            for name, found in zip(files, threads.map(lambda name: _fingerprint(path / name), files), strict=True):
                if found != files[name]:
                    raise CorruptCheckpoint(f"{name} is not what was written")
    except OSError as error:
        raise CorruptCheckpoint(f"{type(error).__name__}: {error}") from None


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint that is known to be complete; its tensors are read when they are used."""
    parts = [path / name for name in _read_manifest(path) if name != "state.json"]
    try:
        return Checkpoint(StoredTensors(parts), _read_state(path), path)
    except (OSError, UserError, SafetensorError) as error:
        raise CorruptCheckpoint(f"{type(error).__name__}: {error}") from None


RUN_STATE = ("position", "bad_images")  # what a training has in the state of its checkpoints


def latest_checkpoint(
    folder: Path, warn: Callable[[str], None], *, state_has: Collection[str] = ()
) -> Checkpoint | None:
    """The complete checkpoint with the highest step, or None; `warn` gets a line for each damaged one.

    Args:
        state_has: the keys of a state that is not damaged.
    """
    for path in reversed(published(folder)):
        try:
            checkpoint = load_checkpoint(path)
            if missing := [key for key in state_has if checkpoint.state.get(key) is None]:
                raise CorruptCheckpoint(f"state.json: {missing[0]} is missing")
            return checkpoint
        except CorruptCheckpoint as reason:
            warn(f"checkpoint {path} is damaged and is skipped ({reason})")
    return None


def step_name(step: int) -> str:
    """Name of the checkpoint after so many optimizer steps."""
    return f"step-{step:09d}"


def published(folder: Path) -> list[Path]:
    """The checkpoints `step-*` of a folder, oldest first, complete or not."""
    return sorted(path for path in folder.glob("step-*") if _NAME.match(path.name) and path.is_dir())


def remove_old_checkpoints(folder: Path, keep: int, keep_every_hours: float = 0.0, *, step: int | None = None) -> None:
    """Remove all but the last `keep` checkpoints and the first of every so many hours of training (0: none), and what
    interrupted saves have left.

    Args:
        step: where the run is. Later checkpoints are damaged, as it has not resumed from them: they are not counted,
            and stay until the run has passed them.
    """
    steps = [path for path in published(folder) if step is None or path.name <= step_name(step)]
    lasting = milestones(steps, keep_every_hours) if keep_every_hours else set()
    for path in steps[:-keep]:
        if path not in lasting:
            remove_folder(path)
    remove_leftovers(folder)


def milestones(steps: list[Path], hours: float) -> set[Path]:
    """The first checkpoint after each `hours` hours of training, by the clock of the run."""
    found: dict[int, Path] = {}
    for path in steps:
        try:
            seconds = _read_state(path)["position"]["seconds"]
            found.setdefault(int(seconds / 3600 / hours), path)
        except (UserError, KeyError, TypeError):
            continue  # damaged
    found.pop(0, None)
    return set(found.values())


class _Manifest(BaseModel, strict=True):
    """manifest.json: size and CRC-32 of each file."""

    format: Literal[1]
    files: dict[str, Annotated[Counts, Field(min_length=2, max_length=2)]]


class _State(BaseModel):
    """state.json: of a training, both are there."""

    position: TrainState | None = None
    bad_images: dict[str, str] | None = None


def _read_manifest(path: Path) -> dict[str, Fingerprint]:
    """Sizes and checksums of the files of a checkpoint. Raises CorruptCheckpoint."""
    try:
        files = validate(_Manifest, read_json(path / "manifest.json"), "manifest.json").files
    except UserError as error:
        raise CorruptCheckpoint(str(error)) from None
    parts = [name for name in files if _PART.fullmatch(name)]
    if not parts or {*parts, "state.json"} != set(files):
        raise CorruptCheckpoint(f"the manifest names {shorten(sorted(files))}, not tensors and a state")
    return files


def _read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors. Raises UserError."""
    state = require_object(read_json(path / "state.json"), "state.json")
    validate(_State, state, "state.json")
    return dict(state)


def _fingerprint(path: Path) -> Fingerprint:
    """Size and CRC-32 of a file."""
    checksum = 0
    with open(path, "rb", opener=open_regular) as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return [path.stat().st_size, checksum]


def _require_space(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    needed = sum(tensor.nbytes for tensor in tensors.values()) + (1 << 16)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"disk full, it needs {needed / 1e6:.1f} MB and has {free / 1e6:.1f} MB")
