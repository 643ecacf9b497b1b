"""Images in tar shards with a side index: any image is one read, from a folder or from behind a URL."""

import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatnet.data.decode import BadImage
from coatnet.data.shards.block_sampler import BlockSampler
from coatnet.data.shards.files import ShardFiles, chunks
from coatnet.data.shards.index import SAMPLE_COLUMNS, Head, Split, digest, from_npy, index_name, labels_of
from coatnet.errors import UserError

# chosen: 8 MiB a request. Object stores answer in some 50 ms, so a connection gives about 100 MB/s.
BLOCK_BYTES = 8 << 20
_OPEN_INDEXES = 160  # as many as shards are kept open
_THREADS = 16


class ShardDataset:
    """A split of a folder of shards. Tables of samples are mapped, not held: a worker process costs next to nothing."""

    def __init__(self, head: Head, split: Split, table: NDArray, files: ShardFiles, index_files: ShardFiles) -> None:
        """`table` has the split's shards; the tables of their samples are among `index_files`."""
        self.name = head.name
        self.classes = head.classes
        self.multilabel = head.multilabel
        self.table = table
        self.class_counts = np.array(split.class_counts, dtype=np.int64)
        self._files = files
        self._index_files = index_files
        self._starts = np.concatenate([[0], np.cumsum(table["num_samples"])])
        self._opened: OrderedDict[int, NDArray] = OrderedDict()
        num_bytes = int(table["num_bytes"].sum())
        self.block_size = max(1, round(BLOCK_BYTES * len(self) / max(1, num_bytes)))

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "labels"}
        return {**state, "_opened": OrderedDict()}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def labels(self) -> NDArray:
        """Of every sample, from all tables. `class_counts` and `read` do not need it."""
        shards = np.flatnonzero(self.table["num_samples"])
        with ThreadPoolExecutor(_THREADS) as threads:
            tables = threads.map(self._load, shards.tolist())
            return np.concatenate([labels_of(table, len(self.classes), self.multilabel) for table in tables])

    def order(self, seed: int) -> BlockSampler:
        """The order of training: the same for a folder and for a copy of it behind a URL."""
        return BlockSampler(len(self), seed, self.block_size)

    def read(self, index: int) -> tuple[bytes, NDArray]:
        """Raises `BadImage` if the disk fails; `UserError` if a shard has become shorter or is gone."""
        shard, row = self._find(index)
        samples = self._samples(shard)
        sample = samples[row]
        start = int(self._starts[shard])
        first = max(index // self.block_size * self.block_size - start, 0)
        last = min((index // self.block_size + 1) * self.block_size - start, len(samples)) - 1
        block = range(int(samples[first]["offset"]), int(samples[last]["offset"] + samples[last]["length"]))
        length = int(sample["length"])
        try:
            data = self._files.read(self.shard_name(shard), int(sample["offset"]), length, block)
        except OSError as error:
            raise BadImage(self.describe(index), f"unreadable: {error.strerror or error}") from error
        if len(data) != length:
            raise UserError(f"{self._files}/{self.shard_name(shard)}: has become shorter; fetch or pack it again")
        return data, labels_of(sample, len(self.classes), self.multilabel)

    def describe(self, index: int) -> str:
        shard, row = self._find(index)
        return f"{self._files}/{self.shard_name(shard)}/{self._samples(shard)[row]['key'].decode()}"

    def shard_name(self, shard: int) -> str:
        return self.table["name"][shard].decode()

    def check(self) -> None:
        """Raises `UserError` naming a shard or table that is missing, of another size, or not the one described."""
        names = [name.decode() for name in self.table["name"].tolist()]
        for name, size, shard in zip(names, self._files.sizes(names), self.table, strict=True):
            if size is None:
                raise UserError(f"{self._files}/{name}: missing, though the index has it; fetch or pack it again")
            if size != shard["num_bytes"]:
                kind = "truncated" if size < shard["num_bytes"] else "changed"
                raise UserError(
                    f"{self._files}/{name}: {kind}, it has {size:,} bytes where the index says "
                    f"{shard['num_bytes']:,}; fetch or pack it again"
                )

    def check_indexes(self) -> None:
        """Raises `UserError` naming a table of samples that is missing or does not belong here."""
        with ThreadPoolExecutor(_THREADS) as threads:
            for _ in threads.map(self._load, range(len(self.table))):
                pass

    def verify(self) -> Iterator[int]:
        """Read every shard whole, compare its checksum, and tell its bytes; raises `UserError` naming a changed one."""
        for number, shard in enumerate(self.table):
            name, hashed = self.shard_name(number), sha256()
            for chunk in chunks(self._files, name):
                hashed.update(chunk)
            if shard["sha256"] and hashed.hexdigest() != shard["sha256"].decode():
                raise UserError(f"{self._files}/{name}: changed, its checksum is another; fetch or pack it again")
            yield int(shard["num_bytes"])

    def _find(self, index: int) -> tuple[int, int]:
        """Shard and row; a shard without samples has none."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])

    def _samples(self, shard: int) -> NDArray:
        if shard in self._opened:
            self._opened.move_to_end(shard)
        else:
            if len(self._opened) == _OPEN_INDEXES:
                self._opened.popitem(last=False)
            self._opened[shard] = self._load(shard)
        return self._opened[shard]

    def _load(self, shard: int) -> NDArray:
        row = self.table[shard]
        name, num_bytes = index_name(self.shard_name(shard)), int(row["index_bytes"])
        checksum = row["index_sha256"].decode()
        descriptor = self._index_files.open(name, num_bytes, checksum)
        try:
            if os.fstat(descriptor).st_size != num_bytes:
                raise UserError(f"{self._index_files}/{name}: truncated or changed; pack the images again")
            mapped = mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        if digest(mapped) != checksum:
            tar = self.shard_name(shard)
            raise UserError(
                f"{self._index_files}/{name}: does not belong to {tar}, its checksum differs; pack them again"
            )
        return from_npy(mapped, SAMPLE_COLUMNS, int(row["num_samples"]), f"{self._index_files}/{name}")
