"""Files that are read without waiting and within bounds; files and folders that are written whole or not at all.

What is written goes to a hidden temporary name beside its target, is flushed to the disk, and is then renamed: a reader
never meets half of it, and a failure leaves nothing. A process that is killed may leave temporary files; their names
hold its machine and number, and the next one that writes into the folder removes those of the dead.
"""

import ctypes
import errno
import functools
import os
import re
import shutil
import socket
import stat
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from coatnet.errors import UserError, without_credentials

# Machine, process, a random number, and the name of the target.
_OWNED = re.compile(r"\.(?:tmp|trash)-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}(?:-.+)?", re.DOTALL)
# The others are the temporary names of earlier versions.
_LEFTOVER = re.compile(
    _OWNED.pattern + r"|\.tmp-[0-9a-f]{8}-.+|\.trash-[0-9a-f]{8}|.*\.tmp|.+\.tmp-[0-9a-f]{8}|.+\.[0-9a-f]{8}\.old",
    re.DOTALL,
)
# chosen: whether a process of another machine lives, or one of this machine before its last start, cannot be found out;
# what was not written to for a day is taken as abandoned.
_ABANDONED_SECONDS = 86_400
_LONGEST_NAME = 200  # bytes; file systems take 255, and a temporary name has 32 more than its target


MAX_SMALL_FILE_BYTES = 64_000_000  # chosen: for settings, records and lists, which are read as a whole
MAX_LOG_BYTES = 1 << 28  # chosen: a million lines
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file without ever waiting, and return its descriptor: `open(path, opener=open_regular)`.

    Named pipes, sockets and devices, which may never end, are refused, also behind links.

    Raises:
        OSError: it is not there, not readable, or no regular file.
    """
    if not flags & os.O_CREAT:
        check_regular(path)  # before opening, which alone makes some devices act
    # Without blocking, as a pipe may take the file's place meanwhile.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0), 0o666)
    try:
        _check_mode(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(path: str | Path) -> None:
    """Raise OSError unless a path leads to a regular file: for libraries that take the path, not a descriptor."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # NUL, or surrogates that stand for no byte
        raise OSError(errno.EINVAL, f"no name of a file ({error})", str(path)) from None
    _check_mode(mode, path)


def _check_mode(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, f"{kind}, not a regular file", str(path))


def read_regular(path: str | Path, max_bytes: int = MAX_SMALL_FILE_BYTES) -> bytes:
    """Read a regular file as a whole.

    Raises:
        OSError: as `open_regular`; or the file has more than `max_bytes` bytes, which are then not read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= max_bytes:
            data = file.read(size + 1) or b""  # None from a file of the kernel that would make a reader wait
            if len(data) > size:  # it grows, or it is one of the kernel's, whose size is 0
                data += file.read(max_bytes + 1 - len(data)) or b""
            if len(data) <= max_bytes:
                return data
    raise OSError(errno.EFBIG, f"more than the {max_bytes:,} bytes that are read", str(path))


@contextmanager
def atomic_files(*paths: str | Path, durable: bool = True, remove: Iterable[Path] = ()) -> Iterator[tuple[Path, ...]]:
    """Give temporary files to fill, which take the names of `paths`, in this order, if the block succeeds.

    The temporary names keep the suffixes. Missing parent folders are made; existing files are replaced.

    Args:
        durable: flush to the disk before renaming. Leave it out only for what can be made again and is checked when
            it is read.
        remove: files that are removed when all new ones are on the disk, before the first of them gets its name.

    Raises:
        OSError: from the block, or if the disk refuses; no temporary file is left then.
    """
    targets = [Path(path).absolute() for path in paths]
    staged = tuple(temporary_path(target) for target in targets)
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(target.parent)
        yield staged
        commit_files(staged, targets, durable=durable, remove=remove)
    finally:
        for file in staged:
            with suppress(OSError):  # such as a parent that is not a folder
                file.unlink(missing_ok=True)


def commit_files(
    staged: Sequence[Path], targets: Sequence[Path], *, durable: bool = True, remove: Iterable[Path] = ()
) -> None:
    """Rename files to their targets in the same file system, flushed to the disk first, as `atomic_files`. Raises
    OSError."""
    if durable:
        for file in staged:
            fsync_path(file)
    for file in remove:
        file.unlink(missing_ok=True)
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
    """Give an empty temporary folder to fill, which takes the name `path` if the block succeeds; of a link, the name
    that it leads to.

    Args:
        replace: a folder that is there already is replaced.

    Raises:
        FileExistsError: the folder is there already, perhaps made by another process meanwhile, and is not replaced.
        OSError: from the block, or if the disk refuses; nothing is left then, and an older folder is unchanged.
    """
    target = Path(path).absolute()
    target = target.resolve() if target.is_symlink() else target
    staged = temporary_path(target)
    try:
        staged.mkdir(parents=True)
        _remove_abandoned(target.parent)
        yield staged
        for entry in staged.rglob("*"):
            fsync_path(entry)
        commit_folder(staged, target, replace=replace)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def commit_folder(staged: Path, target: Path, *, replace: bool = False) -> None:
    """Rename a folder whose files are already on the disk to `target`, durably. Raises as `atomic_folder`.

    An older folder is replaced in one step on Linux. Where a file system cannot do that, such as NFS, `target` is
    missing for a moment.
    """
    fsync_path(staged)
    trash = trash_path(target)
    if replace and target.exists():
        if target.is_dir() and _exchange(staged, target):
            fsync_path(target.parent)
            shutil.rmtree(staged, ignore_errors=True)
            return
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


def _exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's name in one step; False where that cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def remove_folder(path: Path) -> None:
    """Remove a folder in one visible step: it is renamed first, so that no reader meets a half-removed one."""
    if path.exists():
        trash = trash_path(path)
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def temporary_path(target: Path) -> Path:
    """A new hidden name beside `target`, with the same suffix, that says whose it is."""
    name = target.name if len(os.fsencode(target.name)) <= _LONGEST_NAME else target.name[-_LONGEST_NAME // 4 :]
    return target.with_name(f".tmp-{_this_process()}-{uuid4().hex[:8]}-{name}")


def trash_path(target: Path) -> Path:
    """A new hidden name beside `target` for what is being removed, that says whose it is."""
    return target.with_name(f".trash-{_this_process()}-{uuid4().hex[:8]}")


def _this_process() -> str:
    return f"{_machine()}-{os.getpid()}"


@functools.cache
def _machine() -> str:
    """Eight hex digits for what the number of a process holds within: a machine since its start, or a container."""
    place = [socket.gethostname()]
    with suppress(OSError):
        place += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return sha256("\n".join(place).encode()).hexdigest()[:8]


@functools.lru_cache(maxsize=1024)
def _remove_abandoned(folder: Path) -> None:
    """Remove, once in a process, the temporary files and folders of processes that are dead."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if (owner := _OWNED.fullmatch(entry.name)) and _is_abandoned(entry, owner[1], int(owner[2])):
                _remove(entry)


def _is_abandoned(entry: os.DirEntry[str], machine: str, process: int) -> bool:
    if machine != _machine():
        return time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS
    if os.name != "posix":
        return False  # there, asking ends the process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


def is_leftover(name: str) -> bool:
    """Whether a file or folder has a temporary name."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(folder: Path, min_age_seconds: float = 0, *, only_hidden: bool = False) -> None:
    """Remove all temporary files and folders, where the caller is the only one that writes.

    Args:
        min_age_seconds: leave younger ones alone, where other processes may be writing into the same folder.
        only_hidden: leave alone what a user could have named so.
    """
    for entry in list(os.scandir(folder)):
        if only_hidden and not entry.name.startswith("."):
            continue
        with suppress(FileNotFoundError):
            if is_leftover(entry.name) and time.time() - entry.stat().st_mtime >= min_age_seconds:
                _remove(entry)


def _remove(entry: os.DirEntry[str]) -> None:
    shutil.rmtree(entry.path, ignore_errors=True) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk. Raises OSError.

    Some file systems (FUSE, 9p, SMB) cannot flush a folder and say so; there its entries are as safe as they get.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EBADF)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[BinaryIO]:
    """Hold an exclusive lock on a file, which is made if need be, and give the open file.

    It is `flock`: the system releases it when the process ends, even if it is killed, so none is ever stale. Linux
    passes it on to the servers of NFS and SMB, so that it also holds between machines. A file system without locks is
    used without one, with a warning.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
        OSError: the file cannot be made.
    """
    import fcntl

    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                warnings.warn(f"{path}: no lock ({error.strerror}); start nothing else there", stacklevel=4)
            try:
                still_there = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                still_there = False
            if still_there:  # else its last holder has removed it meanwhile
                yield file
                return


@contextmanager
def only_process(lock: Path, doing: str) -> Iterator[None]:
    """Hold a lock file, which names this process and is removed at the end.

    Args:
        lock: the file; its folder is there.
        doing: what is done under it, such as "training in runs/mine", for the error of another process.

    Raises:
        UserError: another process holds it; the message names it and its machine.
        OSError: the file cannot be made.
    """
    with ExitStack() as held:
        try:
            file = held.enter_context(file_lock(lock, wait=False))
        except BlockingIOError:
            raise UserError(f"{_holder(lock)} is {doing}; wait for it, or give another name") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink(missing_ok=True)


def _holder(lock: Path) -> str:
    """`process 123 on host`, as the holder of a lock has written into it."""
    with suppress(OSError), lock.open("rb") as file:
        if written := re.fullmatch(r"process \d{1,10} on [\w.-]{1,100}", file.read(200).decode(errors="replace")):
            return written[0]
    return "another process"


@contextmanager
def translate_write_errors(path: str | Path, advice: str = "") -> Iterator[None]:
    """Raise an OSError of the block as a UserError that names `path`, with the advice appended."""
    try:
        yield
    except OSError as error:
        advice = f"; {advice}" if advice else ""
        raise UserError(f"{path} could not be written: {error.strerror or error}{advice}") from error


def checked_path(path: str | Path) -> Path:
    """The path. Raises UserError for a NUL, which no file name can hold."""
    if "\0" in os.fspath(path):
        raise UserError(f"{path} is not a path: it holds a NUL")
    return Path(path)


def output_path(path: str | Path) -> Path:
    """The path of what is to be written. Raises UserError for a URL, which would become folders here, or a NUL."""
    if is_url(path):
        raise UserError(f"{without_credentials(str(path))} is a URL; results are written to this machine: give a path")
    return user_path(path)


def is_url(path: str | Path) -> bool:
    """Whether a path that leads to no file is a URL, of whose slashes a `Path` keeps one; a drive has one letter."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


def require_outside(path: Path, data: str) -> None:
    """Raise UserError if results would be written among the images of `data`, the whole path of a folder or a name."""
    if os.path.isabs(data) and path.resolve().is_relative_to(os.path.realpath(data)):
        raise UserError(
            f"{path} is inside {data}: plots written there would be read as images of a class; give a folder outside "
            "for out"
        )


def require_outside_images(folder: Path, images: Iterable[str | Path]) -> None:
    """Raise UserError if images would be written into one of the folders among these paths of images."""
    for path in map(user_path, images):
        if path.is_dir():
            require_outside(folder.absolute(), str(path.absolute()))


def require_absent(path: str | Path) -> None:
    """Raise UserError if a file is there that a new one would replace."""
    if user_path(path).exists():
        raise UserError(f"{path} is there already; give another name, or remove it first")


def user_path(path: str | Path) -> Path:
    """The path with the user's home in place of a leading `~`. Raises UserError without such a home, or for a NUL."""
    try:
        return checked_path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no home folder for ~; write the whole path") from None


def absolute_path_or_name(source: str) -> str:
    """A folder or file by its full path; anything else, such as a URL or an id of the hub, as it is."""
    path = user_path(source)
    return str(path.resolve()) if source and path.exists() else source
