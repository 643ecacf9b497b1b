"""Where shards lie, as all places have it, and the plainest of places: a folder, read in place."""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import quote

from coatnet.data.datasets import printable
from coatnet.data.shards.block_cache import BlockCache
from coatnet.errors import UserError

T = TypeVar("T")

_OPEN_FILES = 160  # a window of the order touches 128 blocks, mostly in shards of their own; few systems allow 1024
_ANNOUNCED = 1024  # blocks, several windows of them
CHUNK_BYTES = 1 << 23
_CONNECTIONS = 16
_FIRST_PAUSE, _LAST_PAUSE = 0.5, 2.0  # seconds, doubled after each failure


class ShardFiles(Protocol):
    """Files by their names, which may hold slashes. `str()` names the place in messages."""

    def names(self, folder: str = "") -> list[str]: ...
    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of each file; None where there is none."""
        ...

    def open(self, name: str, num_bytes: int, checksum: str) -> int:
        """A descriptor of a whole file, for the caller to close."""
        ...

    def read(self, name: str, offset: int, length: int, block: range) -> bytes:
        """A piece of a file; `block` are the bytes around it that will be wanted soon. May return less at the end."""
        ...

    def stream(self, name: str) -> BinaryIO:
        """A whole file from its beginning."""
        ...


class LocalFiles:
    """Files below a folder. Raises `UserError` where the system refuses."""

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
        return sorted(os.path.join(folder, entry.name) for entry in os.scandir(self.root / folder) if entry.is_file())

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        return [path.stat().st_size if (path := self.root / name).is_file() else None for name in names]

    def open(self, name: str, num_bytes: int = 0, checksum: str = "") -> int:
        try:
            return os.open(self.root / name, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self}/{name}: {error.strerror}; fetch or pack it again") from error

    def read(self, name: str, offset: int, length: int, block: range) -> bytes:
        if name in self._opened:
            self._opened.move_to_end(name)
        else:
            if len(self._opened) == _OPEN_FILES:
                os.close(self._opened.popitem(last=False)[1])
            self._opened[name] = self.open(name)
        descriptor = self._opened[name]
        if (name, block.start) not in self._announced and hasattr(os, "posix_fadvise"):
            # A disk then reads the block in one sweep, whatever the order in which its images are asked for.
            os.posix_fadvise(descriptor, block.start, len(block), os.POSIX_FADV_WILLNEED)
            if len(self._announced) > _ANNOUNCED:
                self._announced.clear()
            self._announced.add((name, block.start))
        return os.pread(descriptor, length, offset)

    def stream(self, name: str) -> BinaryIO:
        return (self.root / name).open("rb", buffering=CHUNK_BYTES)

    def _forget(self) -> None:
        self._opened: OrderedDict[str, int] = OrderedDict()
        self._announced: set[tuple[str, int]] = set()


def read_whole(files: ShardFiles, name: str) -> bytes | None:
    """A small file, or None if there is none; never from a cache."""
    if files.sizes([name]) == [None]:
        return None
    with files.stream(name) as file:
        return file.read()


def chunks(files: ShardFiles, name: str) -> Iterator[bytes]:
    with files.stream(name) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


class RemoteFiles:
    """Files behind a URL that fsspec knows. What is read comes in blocks, which a cache on this machine keeps.

    Raises `UserError` if a file is missing, or cannot be fetched after some attempts.
    """

    def __init__(self, url: str, cache: BlockCache) -> None:
        self.url = url.rstrip("/")
        self.cache = cache
        self.edition = ""  # a checksum of the head: another edition's blocks are never mistaken for this one's
        self._system: Any = None

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_system": None}

    def names(self, folder: str = "") -> list[str]:
        system, place = self._connect()
        root = f"{place}/{folder}".rstrip("/")
        found = self._try(folder, lambda: system.ls(root, detail=True))
        names = (entry["name"].rpartition("/")[2] for entry in found if entry["type"] == "file")
        return sorted(os.path.join(folder, name) for name in names)

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        if len(names) > _CONNECTIONS and not self.url.startswith("http"):  # a web server has no list with sizes
            system, place = self._connect()
            found = self._try("", lambda: system.find(place, detail=True))
            known = {path.removeprefix(f"{place}/"): entry["size"] for path, entry in found.items()}
            return [known.get(name) for name in names]
        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            return list(threads.map(self._size, names))

    def open(self, name: str, num_bytes: int, checksum: str) -> int:
        def fetch() -> bytes:
            data = self._fetch(name, range(num_bytes))
            if sha256(data).hexdigest() != checksum:  # or the cache would keep what a server got wrong once
                raise UserError(f"{self}/{name}: its checksum is another than the index says; pack the images again")
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
        return self._try(name, lambda: system.open(f"{place}/{name}", block_size=CHUNK_BYTES, cache_type="readahead"))

    def _size(self, name: str) -> int | None:
        system, place = self._connect()

        def look() -> int | None:
            try:
                return system.info(f"{place}/{name}")["size"]
            except FileNotFoundError as error:
                cause = error.__cause__
                if cause is None or getattr(cause, "status", None) == 404:
                    return None
                raise ConnectionError(cause) from error  # fsspec calls a server that is down a file not found

        return self._try(name, look)

    def _fetch(self, name: str, block: range) -> bytes:
        system, place = self._connect()
        data = self._try(name, lambda: system.cat_file(f"{place}/{name}", start=block.start, end=block.stop))
        if len(data) > len(block):
            raise UserError(
                f"{self}/{name}: the server sends whole files where a part is asked for; it must know ranges"
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
            except Exception as error:  # each kind of store has its own errors
                if pause > _LAST_PAUSE:
                    reason = " ".join(str(error).split())[:120] or type(error).__name__
                    raise UserError(f"{self}/{name}: cannot be fetched, after several attempts: {reason}") from error
                time.sleep(pause)
                pause *= 2

    def _connect(self) -> tuple[Any, str]:
        if self._system is None:
            try:
                import fsspec
            except ImportError as error:
                raise UserError(f"{self}: shards behind a URL need fsspec; `pip install 'coatnet[shards]'`") from error
            try:
                self._system = fsspec.core.url_to_fs(self.url)
            except (ImportError, ValueError) as error:  # s3fs for s3://, gcsfs for gs://, or no such protocol
                reason = " ".join(str(error).split())[:120]
                raise UserError(
                    f"{self}: {reason}; http:// comes with coatnet[shards], s3fs and gcsfs apart"
                ) from error
        return self._system

    def _block_name(self, name: str, start: int) -> str:
        return f"{self.edition}-{quote(name, safe='')}-{start}"
