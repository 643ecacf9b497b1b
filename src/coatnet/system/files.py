"""Files and folders that are written whole or not at all.

What is written goes to a hidden temporary name beside its target, is flushed to the disk, and is then renamed: a reader
never meets half of it, and a failure leaves nothing. A process that is killed may leave temporary files, which
`remove_leftovers` removes. Files that can be made or fetched again (graphs, blocks of remote shards, indexes,
downloads) are in one cache folder.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from coatnet.errors import UserError

# The last three are the temporary names of version 0.1.
_LEFTOVER = re.compile(r"\.tmp-[0-9a-f]{8}-.+|\.trash-[0-9a-f]{8}|.*\.tmp|.+\.tmp-[0-9a-f]{8}|.+\.[0-9a-f]{8}\.old")


@contextmanager
def atomic_files(*paths: str | Path, durable: bool = True) -> Iterator[tuple[Path, ...]]:
    """Give temporary files to fill, which take the names of `paths`, in this order, if the block succeeds.

    The temporary names keep the suffixes. Missing parent folders are made; existing files are replaced.

    Args:
        durable: flush to the disk before renaming. Leave it out only for what can be made again and is checked when
            it is read.

    Raises:
        OSError: from the block, or if the disk refuses; no temporary file is left then.
    """
    targets = [Path(path).absolute() for path in paths]
    staged = tuple(temporary_path(target) for target in targets)
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        yield staged
        commit_files(staged, targets, durable=durable)
    finally:
        for file in staged:
            with suppress(OSError):  # such as a parent that is not a folder
                file.unlink(missing_ok=True)


def commit_files(staged: Sequence[Path], targets: Sequence[Path], *, durable: bool = True) -> None:
    """Rename files to their targets in the same file system, flushed to the disk first. Raises OSError."""
    if durable:
        for file in staged:
            fsync_path(file)
    for file, target in zip(staged, targets, strict=True):
        os.replace(file, target)
    if durable:
        for folder in {target.parent for target in targets}:
            fsync_path(folder)


def atomic_write(path: str | Path, content: str | bytes, *, errors: str = "strict") -> None:
    """Write bytes, or text as UTF-8, whole or not at all; `errors` as in `str.encode`. Raises OSError."""
    with atomic_files(path) as (staged,):
        staged.write_bytes(content.encode(errors=errors) if isinstance(content, str) else content)


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Give an empty temporary folder to fill, which takes the name `path` if the block succeeds.

    Args:
        replace: a folder that is there already is replaced.

    Raises:
        FileExistsError: the folder is there already, perhaps made by another process meanwhile, and is not replaced.
        OSError: from the block, or if the disk refuses; nothing is left then, and an older folder is unchanged.
    """
    target = Path(path).absolute()
    staged = temporary_path(target)
    try:
        staged.mkdir(parents=True)
        yield staged
        for entry in staged.rglob("*"):
            fsync_path(entry)
        commit_folder(staged, target, replace=replace)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def commit_folder(staged: Path, target: Path, *, replace: bool = False) -> None:
    """Rename a folder whose files are already on the disk to `target`, durably. Raises as `atomic_folder`."""
    fsync_path(staged)
    trash = trash_path(target)
    if replace and target.exists():
        target.rename(trash)
    try:
        staged.rename(target)
    except OSError as error:
        if trash.exists():
            trash.rename(target)
        elif target.exists():
            raise FileExistsError(error.errno, error.strerror, str(target)) from error
        raise
    fsync_path(target.parent)
    shutil.rmtree(trash, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder in one visible step: it is renamed first, so that no reader meets a half-removed one."""
    if path.exists():
        trash = trash_path(path)
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def temporary_path(target: Path) -> Path:
    """A new hidden name beside `target`, with the same suffix, that `remove_leftovers` recognizes."""
    return target.with_name(f".tmp-{uuid4().hex[:8]}-{target.name}")


def trash_path(target: Path) -> Path:
    """A new hidden name beside `target` for what is being removed, that `remove_leftovers` recognizes."""
    return target.with_name(f".trash-{uuid4().hex[:8]}")


def is_leftover(name: str) -> bool:
    """Whether a file or folder has a temporary name."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(folder: Path, min_age_seconds: float = 0) -> None:
    """Remove temporary files and folders of writers that were killed.

    Args:
        min_age_seconds: leave younger ones alone, where other processes may be writing into the same folder.
    """
    for entry in list(os.scandir(folder)):
        with suppress(FileNotFoundError):
            if is_leftover(entry.name) and time.time() - entry.stat().st_mtime >= min_age_seconds:
                shutil.rmtree(entry.path, ignore_errors=True) if entry.is_dir() else os.unlink(entry.path)


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a file, which the system releases when the process ends.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    import fcntl

    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@contextmanager
def translate_write_errors(path: str | Path, advice: str = "") -> Iterator[None]:
    """Raise an OSError of the block as a UserError that names `path`, with the advice appended."""
    try:
        yield
    except OSError as error:
        advice = f"; {advice}" if advice else ""
        raise UserError(f"{path} could not be written: {error.strerror or error}{advice}") from error


def cache_folder() -> Path:
    """The folder that COATNET_CACHE_DIR names, else `$XDG_CACHE_HOME/coatnet`, else `~/.cache/coatnet`.

    Raises:
        UserError: neither variable is set and the user has no home folder.
    """
    if own := os.environ.get("COATNET_CACHE_DIR"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "coatnet"
    try:
        return Path.home() / ".cache" / "coatnet"
    except RuntimeError as error:
        raise UserError("there is no home folder for cached files; set COATNET_CACHE_DIR to a folder") from error
