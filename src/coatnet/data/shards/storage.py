"""Where the files of shards are: in a folder, or behind a URL that fsspec opens, read through a cache on disk.

The cache holds blocks of files, is bounded in bytes and shared by processes; the least recently used go first.
"""

import errno
import functools
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import quote
from zlib import crc32

from coatnet.data.datasets import printable
from coatnet.errors import UserError, import_extra, reason_of
from coatnet.system.cache import cache_folder
from coatnet.system.credentials import conceal, connection
from coatnet.system.files import atomic_files, file_lock, is_leftover, open_regular
from coatnet.system.terminal import warn

DEFAULT_CACHE_BYTES = 16_000_000_000
_NUM_LOCKS = 256
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class BlockCache:
    """Blocks by name. If several processes want the same block, one fetches it and the others wait.

    Args:
        folder: of the blocks; made when needed.
        max_bytes: of all blocks together.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def open(self, name: str, num_bytes: int, fetch: Callable[[], bytes]) -> int:
        """Open a block, fetched if it is not there or not whole.

        Returns:
            A file descriptor, for the caller to close; it stays readable even if the block is evicted. On Linux, a
            block for which a full disk has no room is in memory alone.

        Raises:
            UserError: the block alone is larger than the cache may be, or the cache cannot be written.
        """
        path = self.folder / name
        try:
            if (descriptor := _open_whole(path, num_bytes)) is not None:
                return descriptor
            if num_bytes > self.max_bytes:
                raise UserError(f"a block of {num_bytes:,} bytes is over COATNET_CACHE_SIZE, {self.max_bytes:,} bytes")
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with file_lock(self.folder / "locks" / str(crc32(name.encode()) % _NUM_LOCKS)):
                if (descriptor := _open_whole(path, num_bytes)) is not None:  # another process was faster
                    return descriptor
                data = fetch()
                with file_lock(self.folder / "locks" / "eviction"):
                    return self._keep(path, data)
        except OSError as error:
            advice = "COATNET_CACHE_DIR names another folder, COATNET_CACHE_SIZE less"
            raise UserError(f"{self.folder}: the cache cannot be written ({error.strerror}); {advice}") from error

    def _keep(self, path: Path, data: bytes) -> int:
        """Write a block, in the place of others where the disk is full, and open it."""
        for disk_full in (False, True):
            self._make_room(len(data), disk_full=disk_full)
            try:
                return _write(path, data)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or (disk_full and not hasattr(os, "memfd_create")):
                    raise
        _tell_full_disk(self.folder)
        descriptor = os.memfd_create("block")
        os.pwrite(descriptor, data, 0)
        return descriptor

    def _make_room(self, num_bytes: int, *, disk_full: bool) -> None:
        """Remove the least recently used blocks, and temporary files of killed processes."""
        blocks = []
        for entry in os.scandir(self.folder):
            if is_leftover(entry.name):  # a writer holds the lock that is held here, so this one was killed
                os.unlink(entry.path)
            elif entry.is_file():
                status = entry.stat()
                blocks.append((status.st_mtime_ns, status.st_size, entry.path))
        excess = num_bytes if disk_full else sum(size for _, size, _ in blocks) + num_bytes - self.max_bytes
        for _, size, path in sorted(blocks):
            if excess <= 0:
                return
            os.unlink(path)
            excess -= size


@functools.cache
def _tell_full_disk(folder: Path) -> None:
    """Tell it once in a process."""
    warn(
        f"{folder}: the disk has no room for a block, so what is read is fetched again each time; free some, or "
        "COATNET_CACHE_DIR names another folder"
    )


def default_cache() -> BlockCache:
    """The cache in `cache_folder()`, of COATNET_CACHE_SIZE bytes (default "16GB")."""
    size = os.environ.get("COATNET_CACHE_SIZE", str(DEFAULT_CACHE_BYTES))
    return BlockCache(cache_folder() / "blocks", parse_bytes(size))


def parse_bytes(text: str) -> int:
    """The number of bytes in "256MB", "1.5 GB" or plain digits; units are powers of 1000.

    Raises:
        UserError: it is not a size.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    try:
        num_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except ValueError:
        num_bytes = 0
    if num_bytes < 1:
        raise UserError(f"{text!r} is not a size; write it as 256MB or 2GB")
    return num_bytes


def _open_whole(path: Path, num_bytes: int) -> int | None:
    """Open a block; None if it is not there, or not whole, as after a power failure."""
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != num_bytes:
        os.close(descriptor)
        return None
    with suppress(OSError):  # a read-only cache does not learn what is used
        os.utime(path if os.utime not in os.supports_fd else descriptor)
    return descriptor


def _write(path: Path, data: bytes) -> int:
    with atomic_files(path, durable=False) as (staged,):
        staged.write_bytes(data)
        return os.open(staged, os.O_RDONLY)


T = TypeVar("T")

_MAX_OPEN_FILES = 160  # a window of the sampler has 128 blocks, mostly of different shards; some systems allow 1024
_MAX_ANNOUNCED = 1024  # blocks, several windows
CHUNK_BYTES = 1 << 23  # 8 MiB
MAX_INDEX_BYTES = 1 << 29  # chosen: the table of a split of two million shards
_CONNECTIONS = 16
_FIRST_PAUSE, _LAST_PAUSE = 0.5, 2.0  # seconds, doubled after each failure


class Storage(Protocol):
    """Files by name; names may hold slashes. `str(storage)` names the place in messages.

    All methods raise UserError if a file is missing or cannot be read.

    Attributes:
        is_local: whether the files are on this machine.
        version: a checksum of the head, so that cached blocks of another version are never used.
    """

    is_local: bool
    version: str = ""

    def names(self, folder: str = "") -> list[str]:
        """The files of a folder, sorted."""
        ...

    def folders(self) -> list[str]:
        """The folders of local storage, sorted; none of remote storage."""
        return []

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """The size of each file in bytes; None if it does not exist."""
        ...

    def modified(self, names: Sequence[str]) -> list[int]:
        """When each file of local storage was modified, in nanoseconds; empty for remote storage."""
        return []

    def open(self, name: str, num_bytes: int, checksum: str) -> int:
        """A file descriptor of a whole file with this size and SHA-256, for the caller to close."""
        ...

    def read(self, name: str, offset: int, length: int, block: range) -> bytes:
        """A part of a file, shorter at its end; `block` are the bytes around it that will be read soon."""
        ...

    def stream(self, name: str) -> BinaryIO:
        """A file opened at its beginning."""
        ...


class LocalStorage(Storage):
    """Files below a folder."""

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self._forget()

    def __str__(self) -> str:
        return printable(str(self.root))

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.root = state["root"]
        self._forget()

    def names(self, folder: str = "") -> list[str]:
        return sorted(
            os.path.join(folder, entry.name) for entry in os.scandir(self.root / folder) if os.path.isfile(entry)
        )

    def folders(self) -> list[str]:
        return sorted(entry.name for entry in os.scandir(self.root) if os.path.isdir(entry))

    def modified(self, names: Sequence[str]) -> list[int]:
        return [(self.root / name).stat().st_mtime_ns for name in names]

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        return [path.stat().st_size if (path := self.root / name).is_file() else None for name in names]

    def open(self, name: str, num_bytes: int = 0, checksum: str = "") -> int:
        try:
            return open_regular(self.root / name)
        except OSError as error:
            raise UserError(f"{self}/{name}: {error.strerror}; fetch or pack it again") from error

    def read(self, name: str, offset: int, length: int, block: range) -> bytes:
        if name in self._opened:
            self._opened.move_to_end(name)
        else:
            if len(self._opened) == _MAX_OPEN_FILES:
                os.close(self._opened.popitem(last=False)[1])
            self._opened[name] = self.open(name)
        descriptor = self._opened[name]
        if (name, block.start) not in self._announced and hasattr(os, "posix_fadvise"):
            # The disk then reads the block in one go, in whatever order its images are read.
            os.posix_fadvise(descriptor, block.start, len(block), os.POSIX_FADV_WILLNEED)
            if len(self._announced) > _MAX_ANNOUNCED:
                self._announced.clear()
            self._announced.add((name, block.start))
        return os.pread(descriptor, length, offset)

    def stream(self, name: str) -> BinaryIO:
        try:
            return open(self.root / name, "rb", buffering=CHUNK_BYTES, opener=open_regular)
        except OSError as error:
            raise UserError(f"{self}/{name}: {error.strerror}; fetch or pack it again") from error

    def _forget(self) -> None:
        self._opened: OrderedDict[str, int] = OrderedDict()
        self._announced: set[tuple[str, int]] = set()


def read_whole(files: Storage, name: str) -> bytes | None:
    """A small file, never from a cache; None if it does not exist."""
    (size,) = files.sizes([name])
    if size is None:
        return None
    if size > MAX_INDEX_BYTES:
        raise UserError(f"{files}/{name}: {size:,} bytes; it may have {MAX_INDEX_BYTES:,}")
    with files.stream(name) as file:
        return file.read()


def chunks(files: Storage, name: str) -> Iterator[bytes]:
    """Yield a file in chunks of 8 MiB."""
    with files.stream(name) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


class RemoteStorage(Storage):
    """Files behind a URL that fsspec opens, fetched in blocks that a cache on this machine keeps.

    A file that cannot be fetched is tried several times. Credentials of the URL are in `_connection` alone.
    """

    is_local = False

    def __init__(self, url: str, cache: BlockCache) -> None:
        self.url = conceal(url).rstrip("/")
        self.cache = cache
        self._connection = connection(conceal(url))  # for worker processes, too, whose memory begins empty
        self._system: Any = None

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_system": None}

    def names(self, folder: str = "") -> list[str]:
        system, place = self._connect()
        root = f"{place}/{folder}".rstrip("/") + self._connection[1]
        found = self._try(folder, lambda: system.ls(root, detail=True))
        names = (entry["name"].partition("?")[0].rpartition("/")[2] for entry in found if entry["type"] == "file")
        return sorted(os.path.join(folder, name) for name in names)

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        if len(names) > _CONNECTIONS and not self.url.startswith("http"):  # a web server lists no sizes
            system, place = self._connect()
            found = self._try("", lambda: system.find(place, detail=True))
            known = {path.removeprefix(f"{place}/"): entry["size"] for path, entry in found.items()}
            return [known.get(name) for name in names]
        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            return list(threads.map(self._size, names))

    def open(self, name: str, num_bytes: int, checksum: str) -> int:
        def fetch() -> bytes:
            data = self._fetch(name, range(num_bytes))
            if sha256(data).hexdigest() != checksum:  # else the cache would keep a wrong answer of the server
                raise UserError(f"{self}/{name}: its checksum differs from the index; pack the images again")
            return data

        return self.cache.open(self._block_name(name, 0), num_bytes, fetch)

    def read(self, name: str, offset: int, length: int, block: range) -> bytes:
        fetch = self._fetch
        descriptor = self.cache.open(self._block_name(name, block.start), len(block), lambda: fetch(name, block))
        try:
            return os.pread(descriptor, length, offset - block.start)
        finally:
            os.close(descriptor)

    def stream(self, name: str) -> BinaryIO:
        system, place = self._connect()
        return self._try(
            name,
            lambda: system.open(f"{place}/{name}{self._connection[1]}", block_size=CHUNK_BYTES, cache_type="readahead"),
        )

    def _size(self, name: str) -> int | None:
        system, place = self._connect()

        def look() -> int | None:
            try:
                return system.info(f"{place}/{name}{self._connection[1]}")["size"]
            except FileNotFoundError as error:
                cause = error.__cause__
                if cause is None or getattr(cause, "status", None) == 404:
                    return None
                raise ConnectionError(cause) from error  # fsspec reports a server that is down as a missing file

        return self._try(name, look)

    def _fetch(self, name: str, block: range) -> bytes:
        system, place = self._connect()
        data = self._try(
            name, lambda: system.cat_file(f"{place}/{name}{self._connection[1]}", start=block.start, end=block.stop)
        )
        if len(data) > len(block):
            raise UserError(
                f"{self}/{name}: the server ignores range requests and sends whole files; use one that supports them"
            )
        if len(data) < len(block):
            raise UserError(
                f"{self}/{name}: ends at byte {block.start + len(data):,}, before {block.stop:,}; truncated"
            )
        return data

    def _try(self, name: str, work: Callable[[], T]) -> T:
        pause = _FIRST_PAUSE
        while True:
            try:
                return work()
            except FileNotFoundError as error:
                raise UserError(f"{self}/{name}: not found") from error
            except Exception as error:  # each kind of storage has its own errors
                if pause > _LAST_PAUSE:
                    raise UserError(
                        f"{self}/{name}: cannot be fetched, after several attempts: {reason_of(error)}"
                    ) from error
                time.sleep(pause)
                pause *= 2

    def _connect(self) -> tuple[Any, str]:
        if self._system is None:
            fsspec = import_extra("fsspec", "shards", f"{self}: a URL")
            try:
                self._system = fsspec.core.url_to_fs(self._connection[0])
            except (ImportError, ValueError) as error:  # s3fs for s3://, gcsfs for gs://, or no such protocol
                raise UserError(
                    f"{self}: {reason_of(error)}; http:// comes with coatnet[shards], s3fs and gcsfs are separate"
                ) from error
        return self._system

    def _block_name(self, name: str, start: int) -> str:
        return f"{self.version}-{quote(name, safe='')}-{start}"
