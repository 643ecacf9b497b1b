"""The index of a folder of shards: a JSON head, a table of shards per split, a table of samples per shard.

The row of a sample says where its image is in the tar, so any image takes one read. Tables are `.npy` files of
format 1.0; a billion samples are rows in many small files, never one object in memory.
"""

import io
import json
import mmap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coatnet.errors import UserError

HEAD = "coatnet-shards.json"
TRAINING, VALIDATION = "train", "val"
_FORMAT, _VERSION = "coatnet shards", 1
_MAX_HEADER_BYTES = 65_536  # of an .npy file of format 1.0
# numpy parses a header by `ast`, which fails at times in several threads at once before Python 3.11.8 and 3.12.1
# (https://github.com/python/cpython/issues/106905).
_HEADER_LOCK = threading.Lock()


class Shard(NamedTuple):
    """A tar file and its table of samples. `sha256` is empty if another program wrote the tar: it was not hashed."""

    name: str
    num_bytes: int
    num_samples: int
    sha256: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class Split:
    """The entry of a split in the head, with the checksum of its table of shards."""

    num_samples: int
    num_shards: int
    class_counts: tuple[int, ...]
    table_sha256: str


@dataclass(frozen=True)
class Head:
    """The contents of a folder of shards."""

    name: str
    classes: tuple[str, ...]
    multilabel: bool
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """The file `coatnet-shards.json`."""
        values = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        return json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n"


def parse_head(data: bytes, where: str) -> Head:
    """Parse `coatnet-shards.json`. Raises UserError if it is damaged or of a newer version."""
    try:
        values = json.loads(data)
        if values["format"] != _FORMAT:
            raise ValueError(f"its format is {values['format']!r}")
        if values["version"] != _VERSION:
            raise UserError(f"{where}: version {values['version']!r} of the index; this coatnet reads {_VERSION}")
        splits = {name: _parse_split(values["splits"][name]) for name in (TRAINING, VALIDATION)}
        head = Head(
            _text(values["name"]),
            tuple(_text(name) for name in values["classes"]),
            bool(values["multilabel"]),
            splits,
            tuple(_text(note) for note in values["notes"]),
        )
        if len(head.classes) < 2 or any(len(split.class_counts) != len(head.classes) for split in splits.values()):
            raise ValueError(f"{len(head.classes)} classes, and counts of other numbers of classes")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{where}: not the index of a folder of shards ({reason}); pack the images again") from error
    return head


def shard_table(shards: Sequence[Shard]) -> NDArray:
    """A table with a row per shard and the fields of `Shard`."""
    width = max(len(shard.name.encode()) for shard in shards)
    kinds = (f"S{width}", "<i8", "<i8", "S64", "<i8", "S64")
    rows = [(shard.name.encode(), *shard[1:]) for shard in shards]
    return np.array(rows, dtype=list(zip(Shard._fields, kinds, strict=True)))


def summarize_split(shards: Sequence[Shard], class_counts: NDArray, table: bytes, where: str) -> Split:
    """The entry of a split. Raises a UserError that begins with `where` if there are no samples."""
    num_samples = sum(shard.num_samples for shard in shards)
    if not num_samples:
        raise UserError(f"{where} has no image that can be used")
    return Split(num_samples, len(shards), tuple(class_counts.tolist()), digest(table))


def sample_table(offsets: Sequence[int], lengths: Sequence[int], labels: NDArray, keys: Sequence[str]) -> NDArray:
    """A table with a row per sample. Labels are class indices (n,), or 0 and 1 per class (n, K), stored as bits."""
    encoded = [key.encode() for key in keys]
    width = max(map(len, encoded), default=1)
    label: tuple[Any, ...] = ("label", "<i4")
    if labels.ndim == 2:
        labels = np.packbits(labels, axis=1)
        label = ("label", "u1", (labels.shape[1],))
    table = np.zeros(len(encoded), dtype=[("offset", "<i8"), ("length", "<i8"), label, ("key", f"S{width}")])
    table["offset"], table["length"], table["label"] = offsets, lengths, labels
    table["key"] = encoded
    return table


def labels_of(samples: NDArray, num_classes: int, multilabel: bool) -> NDArray:
    """The labels of a table: class indices (n,), or 0 and 1 per class (n, K); of a row () or (K,)."""
    if multilabel:
        return np.unpackbits(samples["label"], axis=-1, count=num_classes)
    return samples["label"].astype(np.int64)


def to_npy(table: NDArray) -> bytes:
    """A table as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, table, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes | mmap.mmap, columns: Sequence[str], num_rows: int, where: str) -> NDArray:
    """The table in `data`, without a copy. Raises UserError if it has other columns or another number of rows."""
    file = io.BytesIO(data[:_MAX_HEADER_BYTES])
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of .npy")
        with _HEADER_LOCK:
            shape, _, kind = np.lib.format.read_array_header_1_0(file)
        if kind.names != tuple(columns) or shape != (num_rows,):
            raise ValueError(f"{shape} rows of {kind.names}")
        if len(data) != file.tell() + num_rows * kind.itemsize:
            raise ValueError(f"{len(data):,} bytes")
        return np.frombuffer(data, kind, num_rows, file.tell()) if num_rows else np.zeros(0, kind)
    except ValueError as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{where}: not the expected index ({reason}); {num_rows:,} rows were expected") from error


def digest(data: bytes | mmap.mmap) -> str:
    """SHA-256 in hexadecimal digits."""
    return sha256(data).hexdigest()


def table_name(split: str) -> str:
    """The file name of a split's table of shards."""
    return f"{split}.shards.npy"


def index_name(shard: str) -> str:
    """The file name of a shard's table of samples, which lies beside the tar."""
    return shard.removesuffix(".tar") + ".npy"


SAMPLE_COLUMNS = ("offset", "length", "label", "key")


def _parse_split(values: Mapping[str, Any]) -> Split:
    counts = tuple(_whole(count) for count in values["class_counts"])
    num_samples, num_shards = _whole(values["num_samples"]), _whole(values["num_shards"])
    if not num_samples or not num_shards:
        raise ValueError("a split without images")
    return Split(num_samples, num_shards, counts, _text(values["table_sha256"]))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where a text is expected")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} where a count is expected")
    return value
