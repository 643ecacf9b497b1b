"""A cache on disk for blocks of remote files: bounded in bytes, shared by processes, least recently used first out."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

from coatnet.errors import UserError
from coatnet.system.files import atomic_files, cache_folder, file_lock, is_leftover

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
            A file descriptor, for the caller to close; it stays readable even if the block is evicted.

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
                    self._make_room(num_bytes)
                    return _write(path, data)
        except OSError as error:
            advice = "COATNET_CACHE_DIR names another folder, COATNET_CACHE_SIZE less"
            raise UserError(f"{self.folder}: the cache cannot be written ({error.strerror}); {advice}") from error

    def _make_room(self, num_bytes: int) -> None:
        """Remove the least recently used blocks, and temporary files of killed processes."""
        blocks = []
        for entry in os.scandir(self.folder):
            if is_leftover(entry.name):  # a writer holds the lock that is held here, so this one was killed
                os.unlink(entry.path)
            elif entry.is_file():
                status = entry.stat()
                blocks.append((status.st_mtime_ns, status.st_size, entry.path))
        excess = sum(size for _, size, _ in blocks) + num_bytes - self.max_bytes
        for _, size, path in sorted(blocks):
            if excess <= 0:
                return
            os.unlink(path)
            excess -= size


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
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != num_bytes:
        os.close(descriptor)
        return None
    os.utime(path if os.utime not in os.supports_fd else descriptor)
    return descriptor


def _write(path: Path, data: bytes) -> int:
    with atomic_files(path, durable=False) as (staged,):
        staged.write_bytes(data)
        return os.open(staged, os.O_RDONLY)
