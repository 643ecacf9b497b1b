"""Where shards lie, as all places have it, and the plainest of places: a folder, read in place."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from coatnet.data.datasets import printable
from coatnet.errors import UserError

_OPEN_FILES = 160  # a window of the order touches 128 blocks, mostly in shards of their own; few systems allow 1024
_ANNOUNCED = 1024  # blocks, several windows of them
CHUNK_BYTES = 1 << 23


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
