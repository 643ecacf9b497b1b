"""Images in tar shards with an index: opened and checked before training, and read block by block in its order."""

import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coatnet.data.datasets import Dataset, printable
from coatnet.data.decode import ARRAY_SUFFIXES, IMAGE_SUFFIXES, BadImage
from coatnet.data.folder import is_folder
from coatnet.data.sampler import EpochSampler, Indices, Samples, hash_words
from coatnet.data.shards.index import (
    HEAD,
    SHARD_COLUMNS,
    TRAINING,
    VALIDATION,
    Head,
    Split,
    check_samples,
    check_shards,
    digest,
    from_npy,
    index_name,
    labels_of,
    parse_head,
    sample_columns,
    table_name,
)
from coatnet.data.shards.storage import LocalStorage, RemoteStorage, Storage, chunks, default_cache, read_whole
from coatnet.data.shards.webdataset import index_foreign, split_of
from coatnet.data.splits import Splits
from coatnet.errors import UserError
from coatnet.system.credentials import connection

# chosen: 8 MiB a request. Object stores answer in some 50 ms, so a connection gives about 100 MB/s.
BLOCK_BYTES = 8 << 20
# chosen: neighbors in the order then share a block in 1 of 128 cases.
BLOCKS_PER_WINDOW = 128
_MAX_OPEN_INDEXES = 160  # as many as open shards
_NUM_THREADS = 16


class BlockSampler(EpochSampler):
    """Samples every image once per epoch, shuffled in two levels, so that each block is read in one piece.

    `block_size` neighboring images are a block. The blocks of an epoch come in a random order, a window of them at a
    time, and the images of a window come in a random order: a reader needs the blocks of one window only. Like
    `EpochSampler` it is a pure function of (seed, epoch, position) in constant memory.

    Args:
        size: the number of images, N.
        seed: of the orders of all epochs.
        block_size: images in a block.
        blocks_per_window: blocks whose images are shuffled together.
    """

    def __init__(self, size: int, seed: int, block_size: int, blocks_per_window: int = BLOCKS_PER_WINDOW) -> None:
        super().__init__(size, seed)
        self.block_size = min(block_size, size)
        num_blocks = -(-size // self.block_size)
        self._blocks = EpochSampler(num_blocks, seed)
        self._per_window = min(blocks_per_window, num_blocks)
        self._num_windows = -(-num_blocks // self._per_window)
        # The last window of an epoch may have fewer blocks, and the last block fewer images.
        last = num_blocks - (self._num_windows - 1) * self._per_window
        own_seed = int(hash_words(seed, 1)[0])
        self._inside = EpochSampler(self._per_window * self.block_size, own_seed)
        self._inside_last = EpochSampler(last * self.block_size, own_seed)

    def sample(self, positions: ArrayLike) -> Samples:
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        indices = self._shuffle(epochs, places)
        # The last block is filled up with images that do not exist. Cycle walking, as in `EpochSampler`: a position
        # that gets one of them is permuted again, which keeps the images of an epoch unique.
        while len(beyond := np.flatnonzero(indices >= self.size)):
            indices[beyond] = self._shuffle(epochs[beyond], indices[beyond])
        return Samples(indices, epochs)

    def _shuffle(self, epochs: Indices, places: Indices) -> Indices:
        """A permutation of range(num_blocks * block_size) for each epoch."""
        windows, offsets = np.divmod(places, self._inside.size)
        turns = epochs * self._num_windows + windows
        inside = np.empty_like(places)
        is_last = windows == self._num_windows - 1
        for part, order in ((~is_last, self._inside), (is_last, self._inside_last)):
            inside[part] = order.indices(turns[part] * order.size + offsets[part])
        slots, rest = np.divmod(inside, self.block_size)
        blocks = self._blocks.indices(epochs * self._blocks.size + windows * self._per_window + slots)
        return blocks * self.block_size + rest


class ShardDataset(Dataset):
    """A split of a folder of shards. Any image takes one read; tables of samples are memory-mapped.

    Args:
        head: of the folder.
        split: its entry in the head.
        table: the split's table of shards.
        files: where the shards are.
        index_files: where the tables of samples are.
    """

    def __init__(self, head: Head, split: Split, table: NDArray, files: Storage, index_files: Storage) -> None:
        self.name = head.name
        self.classes = head.classes
        self.multilabel = head.multilabel
        self.table = table
        self._class_counts = np.array(split.class_counts, dtype=np.int64)
        self._files = files
        self._index_files = index_files
        self._starts = np.concatenate([[0], np.cumsum(table["num_samples"])])
        self._opened: OrderedDict[int, NDArray] = OrderedDict()
        self._unverified: set[int] = set()
        num_bytes = int(table["num_bytes"].sum())
        self.block_size = max(1, round(BLOCK_BYTES * len(self) / max(1, num_bytes)))

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "labels"}
        return {**state, "_opened": OrderedDict()}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def labels(self) -> NDArray:  # pyrefly: ignore[bad-override]  # read when first used
        """The labels of all samples, read from all tables; `class_counts`, `label` and `read` do not need them."""
        shards = np.flatnonzero(self.table["num_samples"])
        if not len(shards):
            return np.zeros((0, len(self.classes)) if self.multilabel else 0, np.int64)
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            tables = threads.map(self._load, shards.tolist())
            return np.concatenate([labels_of(table, len(self.classes), self.multilabel) for table in tables])

    def sampler(self, seed: int) -> BlockSampler:
        """The order of training, block by block; the same for a folder and for a copy of it behind a URL."""
        return BlockSampler(len(self), seed, self.block_size)

    def read(self, index: int) -> tuple[bytes, NDArray]:
        """Read an image. Raises BadImage if the disk fails, UserError if a shard is truncated or missing."""
        shard, row = self._find(index)
        if shard in self._unverified:
            self._verify(shard)
            self._unverified.remove(shard)
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

    def label(self, index: int) -> NDArray:
        shard, row = self._find(index)
        return labels_of(self._samples(shard)[row], len(self.classes), self.multilabel)

    @property
    def class_counts(self) -> NDArray[np.int64]:
        return self._class_counts

    def content(self) -> Iterator[bytes]:
        yield self.table.tobytes()

    identity = content

    def state(self) -> Iterator[bytes]:
        yield from self.content()
        if not self.table["sha256"].all():  # tars of another program, whose index has no checksum of the pixels
            names = [name.decode() for name in self.table["name"].tolist()]
            yield f"{self._files} {self._files.modified(names)}\n".encode()

    def describe(self, index: int) -> str:
        shard, row = self._find(index)
        key = printable(os.fsdecode(self._samples(shard)[row]["key"]))
        return f"{self.shard_name(shard)}/{key}"

    def shard_name(self, shard: int) -> str:
        """The file name of a shard."""
        return self.table["name"][shard].decode()

    def check(self) -> None:
        """Raise a UserError that names a shard that is missing or of another size than the index says."""
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
        """Raise a UserError that names a table of samples that is missing or has another checksum."""
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            for _ in threads.map(self._load, range(len(self.table))):
                pass

    def verify(self) -> Iterator[int]:
        """Read every shard and compare its checksum; yields its size in bytes. Raises UserError if one differs."""
        for number, shard in enumerate(self.table):
            self._verify(number)
            yield int(shard["num_bytes"])

    def verify_when_read(self) -> None:
        """Compare the checksum of each shard on this machine before its first image is read, which then comes from the
        page cache. `read` raises UserError if it differs."""
        if self._files.is_local:  # else each would be fetched twice
            self._unverified = set(np.flatnonzero(self.table["sha256"]).tolist())

    def _verify(self, number: int) -> None:
        name, checksum, hashed = self.shard_name(number), self.table["sha256"][number], sha256()
        for chunk in chunks(self._files, name):
            hashed.update(chunk)
        if checksum and hashed.hexdigest() != checksum.decode("ascii", "replace"):
            raise UserError(f"{self._files}/{name}: changed, its checksum differs; fetch or pack it again")

    def _find(self, index: int) -> tuple[int, int]:
        """The shard of a sample and its row in the shard's table."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])

    def _samples(self, shard: int) -> NDArray:
        if shard in self._opened:
            self._opened.move_to_end(shard)
        else:
            if len(self._opened) == _MAX_OPEN_INDEXES:
                self._opened.popitem(last=False)
            self._opened[shard] = self._load(shard)
        return self._opened[shard]

    def _load(self, shard: int) -> NDArray:
        row = self.table[shard]
        name, num_bytes = index_name(self.shard_name(shard)), int(row["index_bytes"])
        checksum = row["index_sha256"].decode("ascii", "replace")
        descriptor = self._index_files.open(name, num_bytes, checksum)
        try:
            if not num_bytes or os.fstat(descriptor).st_size != num_bytes:
                raise UserError(f"{self._index_files}/{name}: truncated or changed; pack the images again")
            mapped = mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        if digest(mapped) != checksum:
            tar = self.shard_name(shard)
            raise UserError(
                f"{self._index_files}/{name}: does not belong to {tar}, its checksum differs; pack them again"
            )
        where, num_classes = f"{self._index_files}/{name}", len(self.classes)
        table = from_npy(mapped, sample_columns(num_classes, self.multilabel), int(row["num_samples"]), where)
        check_samples(table, int(row["num_bytes"]), num_classes, where)
        return table


WORK = ".packing"  # a folder inside that `coatnet pack` removes when it is finished


def is_shard_folder(folder: Path) -> bool:
    """Whether a folder has an index of shards, or tar files and no images or folders of classes beside them."""
    if (folder / HEAD).exists() or (folder / WORK).exists():
        return True
    places = [folder]
    found = False
    while places:
        for entry in list(os.scandir(places.pop())):
            if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES.difference(ARRAY_SUFFIXES):
                return False  # loose images; the index is NumPy files
            found = found or entry.name.endswith(".tar")
            if is_folder(entry):
                if os.path.dirname(entry.path) != str(folder) or split_of(entry.name) is None:
                    return False
                places.append(Path(entry.path))
    return found


def open_shard_folder(folder: Path, validation_fraction: float, *, evaluation: bool = False) -> Splits:
    """Open shards on this machine. Raises a UserError that names a shard that differs from its index.

    With `evaluation`, tars of another program need no training split and no second class.
    """
    if (folder / WORK).exists() and not (folder / HEAD).exists():
        raise UserError(f"{folder}: its packing was not finished; the same `coatnet pack` command continues it")
    return _open(LocalStorage(folder), validation_fraction, evaluation)


def open_remote_shards(url: str, validation_fraction: float, *, evaluation: bool = False) -> Splits:
    """Open shards behind s3://, gs://, http:// or another URL of fsspec, read through a cache on this machine.

    `evaluation` as in `open_shard_folder`.
    """
    place, query = connection(url)  # as it was given, with its credentials
    return _open(RemoteStorage(place.removesuffix(HEAD) + query, default_cache()), validation_fraction, evaluation)


def _open(files: Storage, validation_fraction: float, evaluation: bool) -> Splits:
    index_files = files
    data = read_whole(files, HEAD)
    if data is None:
        index_files = index_foreign(files, validation_fraction, evaluation)
        data = read_whole(index_files, HEAD)
        assert data is not None
    # Tars of another program have no checksum in their index: others may have the same names, sizes and labels.
    files.version = digest(data if index_files is files else data + str(files).encode())[:16]
    head = parse_head(data, f"{index_files}/{HEAD}", evaluation=index_files is not files and evaluation)
    training, validation = (_open_split(head, name, files, index_files) for name in (TRAINING, VALIDATION))
    if files.is_local and index_files is files:
        known = {name.decode() for part in (training, validation) for name in part.table["name"].tolist()}
        if unknown := sorted({name for name in files.names() if name.endswith(".tar")} - known):
            raise UserError(f"{files}/{unknown[0]}: not in the index {HEAD}; remove it, or pack the images again")
    return Splits(head.name, training, validation, head.notes)


def _open_split(head: Head, name: str, files: Storage, index_files: Storage) -> ShardDataset:
    split, where = head.splits.get(name), f"{index_files}/{table_name(name)}"
    if split is None:  # for evaluation
        no_samples = Split(0, 0, (0,) * len(head.classes), "")
        return ShardDataset(head, no_samples, np.zeros(0, list(SHARD_COLUMNS.items())), files, index_files)
    data = read_whole(index_files, table_name(name))
    if data is None:
        raise UserError(f"{where}: missing; fetch or pack it again")
    if digest(data) != split.table_sha256:
        raise UserError(f"{where}: does not belong to {HEAD}; its checksum differs")
    table = from_npy(data, SHARD_COLUMNS, split.num_shards, where)
    check_shards(table, split.num_samples, where)
    dataset = ShardDataset(head, split, table, files, index_files)
    dataset.check()
    if index_files.is_local:  # remote ones are checked when they are fetched
        dataset.check_indexes()
    return dataset
