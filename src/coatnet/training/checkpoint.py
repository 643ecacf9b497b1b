"""Checkpoints as folders that are either whole or absent: staged, flushed to disk, then renamed into place.

A checkpoint is `step-000000123/` with `tensors.safetensors`, `state.json` and `manifest.json` (size and
CRC-32 of the others). There is no pointer to the latest one: it is found by looking for the highest step that
is whole.
"""

import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coatnet.bundle.folder import flush
from coatnet.errors import UserError

FORMAT = 1
KEEP = 2
_NAME = re.compile(r"step-(\d{9})$")


class CorruptCheckpoint(Exception):
    """A folder that is not a whole checkpoint; the text says why."""


@dataclass(frozen=True)
class Checkpoint:
    """What training needs to go on: tensors by name, and plain values."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, name: str, checkpoint: Checkpoint) -> Path:
    """Publish a checkpoint as `folder/name`; on any failure nothing of it is left.

    Raises UserError when the disk is too full or not writable; earlier checkpoints are untouched.
    """
    staged = folder / f"{name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(folder, checkpoint.tensors)
        staged.mkdir()
        tensors = {key: tensor.detach().contiguous() for key, tensor in checkpoint.tensors.items()}
        save_file(tensors, staged / "tensors.safetensors")
        (staged / "state.json").write_text(json.dumps(checkpoint.state))
        files = {path.name: _fingerprint(path) for path in sorted(staged.iterdir())}
        (staged / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}))
        for path in [*staged.iterdir(), staged]:
            flush(path)
        remove(folder / name)
        os.rename(staged, folder / name)
        flush(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint {folder / name} was not written: {error}; free some space there") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder / name


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`. Raises CorruptCheckpoint, before reading any tensor, if it is not whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise CorruptCheckpoint(f"format {manifest['format']} is not the format {FORMAT} of this version")
        for name in ("tensors.safetensors", "state.json"):
            if _fingerprint(path / name) != manifest["files"][name]:
                raise CorruptCheckpoint(f"{name} is not what was written")
        return Checkpoint(load_file(path / "tensors.safetensors"), json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{type(error).__name__}: {error}") from None


def latest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The whole checkpoint with the highest step, or None; each broken one met is told to `warn`."""
    for path in reversed(published(folder)):
        try:
            return load_checkpoint(path)
        except CorruptCheckpoint as reason:
            warn(f"checkpoint {path} is damaged and is skipped ({reason})")
    return None


def published(folder: Path) -> list[Path]:
    """The checkpoints `step-*` of a folder, oldest first, whole or not."""
    return sorted(path for path in folder.glob("step-*") if _NAME.match(path.name) and path.is_dir())


def retain(folder: Path, keep: int = KEEP) -> None:
    """Remove all but the last `keep` steps, and what interrupted saves have left."""
    leftovers = [path for path in folder.iterdir() if ".tmp-" in path.name or path.name.startswith(".trash-")]
    for path in [*published(folder)[:-keep], *leftovers]:
        remove(path)


def remove(path: Path) -> None:
    """Remove a folder in one visible step: renamed first, so that nobody meets a half-removed checkpoint."""
    if not path.exists():
        return
    trash = path.with_name(f".trash-{uuid.uuid4().hex[:8]}")
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    staged = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    staged.write_text(text)
    flush(staged)
    os.replace(staged, path)


def _fingerprint(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return [path.stat().st_size, checksum]


def _refuse_full_disk(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    needed = sum(tensor.nbytes for tensor in tensors.values()) + (1 << 16)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"disk full, it needs {needed / 1e6:.1f} MB and has {free / 1e6:.1f} MB")
