"""Writing a folder whole or not at all: staged beside its place, flushed to disk, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from coatnet.errors import UserError

_FILES = {"model.safetensors", "config.json", "README.md"}


@contextmanager
def publish(folder: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the name of `folder` if the block ends well and vanishes if not.

    Raises:
        UserError: `folder` holds something else than an older bundle, or the disk refuses.
    """
    target = Path(folder).absolute()
    if target.exists() and not (target.is_dir() and {entry.name for entry in target.iterdir()} <= _FILES):
        raise UserError(f"{folder} holds something else than a bundle; give a new folder, or remove it first")
    staged = target.with_name(f".{target.name}.{uuid4().hex[:8]}.tmp")
    replaced = staged.with_suffix(".old")
    try:
        staged.mkdir(parents=True)
        yield staged
        for file in staged.rglob("*"):
            flush(file)
        flush(staged)
        if target.exists():
            target.rename(replaced)
        staged.rename(target)
        flush(target.parent)
    except OSError as error:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the operating system put a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
