"""The side index of shards: a small JSON head, a table of shards for each split, a table of samples for each shard.

A sample's row says where its image lies in the tar, so any image is one read away. Tables are `.npy` files of
format 1.0; a billion samples are rows in many small files, never one object in memory.
"""

import io
import json
import mmap
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
_LONGEST_HEADER = 65_536  # of an .npy file of format 1.0


class Shard(NamedTuple):
    """One tar and its table of samples. `sha256` is empty where another program wrote the tar: it was not hashed."""

    name: str
    num_bytes: int
    num_samples: int
    sha256: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class Split:
    """What the head says of a split; its table of shards has this checksum."""

    num_samples: int
    num_shards: int
    class_counts: tuple[int, ...]
    table_sha256: str


@dataclass(frozen=True)
class Head:
    """What a folder of shards holds."""

    name: str
    classes: tuple[str, ...]
    multilabel: bool
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        values = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        return json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n"


def parse_head(data: bytes, where: str) -> Head:
    """Raises `UserError` if this is no head, or one of a newer version."""
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
    """A row for each shard, fields as `Shard` has them."""
    width = max(len(shard.name.encode()) for shard in shards)
    kinds = (f"S{width}", "<i8", "<i8", "S64", "<i8", "S64")
    rows = [(shard.name.encode(), *shard[1:]) for shard in shards]
    return np.array(rows, dtype=list(zip(Shard._fields, kinds, strict=True)))


def summarise_split(shards: Sequence[Shard], class_counts: NDArray, table: bytes, where: str) -> Split:
    """Raises `UserError`, beginning with `where`, if there is not one sample."""
    num_samples = sum(shard.num_samples for shard in shards)
    if not num_samples:
        raise UserError(f"{where} has no image that can be used")
    return Split(num_samples, len(shards), tuple(class_counts.tolist()), digest(table))


def sample_table(offsets: Sequence[int], lengths: Sequence[int], labels: NDArray, keys: Sequence[str]) -> NDArray:
    """A row for each sample. Labels are class indices (n,), or 0 and 1 a class (n, K), which are stored as bits."""
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
    """The labels of a table (n,), or of one row of it: class indices, or 0 and 1 a class."""
    if multilabel:
        return np.unpackbits(samples["label"], axis=-1, count=num_classes)
    return samples["label"].astype(np.int64)


def to_npy(table: NDArray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, table, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes | mmap.mmap, columns: Sequence[str], num_rows: int, where: str) -> NDArray:
    """The table in `data`, not copied. Raises `UserError` if it has other columns or another number of rows."""
    file = io.BytesIO(data[:_LONGEST_HEADER])
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of .npy")
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
        if kind.names != tuple(columns) or shape != (num_rows,):
            raise ValueError(f"{shape} rows of {kind.names}")
        if len(data) != file.tell() + num_rows * kind.itemsize:
            raise ValueError(f"{len(data):,} bytes")
        return np.frombuffer(data, kind, num_rows, file.tell()) if num_rows else np.zeros(0, kind)
    except ValueError as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{where}: not the index it should be ({reason}); {num_rows:,} rows were expected") from error


def digest(data: bytes | mmap.mmap) -> str:
    return sha256(data).hexdigest()


def table_name(split: str) -> str:
    return f"{split}.shards.npy"


def index_name(shard: str) -> str:
    """The table of samples of a shard lies beside it."""
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
        raise TypeError(f"{value!r} where a text should be")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} where a count should be")
    return value
