"""The index of a folder of shards: a JSON head, a table of shards per split, a table of samples per shard.

The row of a sample says where its image is in the tar, so any image takes one read. Tables are `.npy` files of
format 1.0; a billion samples are rows in many small files, never one object in memory.
"""

import io
import json
import mmap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from tokenize import TokenError
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from coatnet.data.image_headers import AST_LOCK
from coatnet.errors import UserError, reason_of
from coatnet.system.json_reader import MAX_INTEGER, Count, Counts, Texts, parse_json, require_object, validate

HEAD = "coatnet-shards.json"
TRAINING, VALIDATION = "train", "val"
_FORMAT, _VERSION = "coatnet shards", 1
MAX_CLASSES = 1_000_000
_MAX_HEADER_BYTES = 65_536  # of an .npy file of format 1.0
_PARSER_ERRORS = (SyntaxError, TokenError, RecursionError, MemoryError)


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


class SplitJson(BaseModel, strict=True):
    """The entry of a split in a head that others wrote."""

    num_samples: Annotated[Count, Field(ge=1)]
    num_shards: Annotated[Count, Field(ge=1)]
    class_counts: Counts
    table_sha256: str


class HeadJson(BaseModel, strict=True):
    """A head that others wrote."""

    format: Literal["coatnet shards"]
    version: Literal[1]
    name: str
    classes: Annotated[Texts, Field(min_length=2, max_length=MAX_CLASSES)]
    multilabel: bool
    splits: dict[Literal["train", "val"], SplitJson]
    notes: Texts


class MeasuredHeadJson(HeadJson, strict=True):
    """A head of tars on which nothing is trained."""

    classes: Annotated[Texts, Field(min_length=1, max_length=MAX_CLASSES)]


def parse_head(data: bytes, where: str, *, evaluation: bool = False) -> Head:
    """Parse `coatnet-shards.json`. Raises UserError if it is damaged or of a newer version.

    With `evaluation` it need not have a training split, nor two classes.
    """
    try:
        values = require_object(parse_json(data, HEAD), HEAD)
        version = values.get("version")
        if values.get("format") == _FORMAT and isinstance(version, int) and version != _VERSION:
            raise UserError(f"version {version!r} of the index; this coatnet reads {_VERSION}")
        found = validate(MeasuredHeadJson if evaluation else HeadJson, values, HEAD)
        splits = {
            name: _split(found, name) for name in (TRAINING, VALIDATION) if name in found.splits or not evaluation
        }
        if len(set(found.classes)) < len(found.classes):
            raise UserError(f"class {Counter(found.classes).most_common(1)[0][0]!r} is named twice")
    except UserError as error:
        reason = str(error).removeprefix(f"{HEAD}: ")
        raise UserError(f"{where}: not the index of a folder of shards ({reason}); pack the images again") from error
    return Head(found.name, tuple(found.classes), found.multilabel, splits, tuple(found.notes))


def _split(head: HeadJson, name: Literal["train", "val"]) -> Split:
    if name not in head.splits:
        raise UserError(f"{name} is missing")
    seen, num_classes = head.splits[name], len(head.classes)
    if len(seen.class_counts) != num_classes:
        raise UserError(f"{num_classes} classes, and counts of other numbers of classes")
    return Split(seen.num_samples, seen.num_shards, tuple(seen.class_counts), seen.table_sha256)


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
    """A table with a row per sample.

    Args:
        offsets: of the images in the tar.
        lengths: of the images.
        labels: class indices (n,), or one bit per class (n, K / 8), as `numpy.packbits` makes them.
        keys: names of the samples.
    """
    encoded = [key.encode() for key in keys]
    width = max(map(len, encoded), default=1)
    label: tuple[Any, ...] = ("label", "<i4") if labels.ndim == 1 else ("label", "u1", (labels.shape[1],))
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


def from_npy(data: bytes | mmap.mmap, columns: Mapping[str, Any], num_rows: int, where: str) -> NDArray:
    """The table in `data`, without a copy.

    Args:
        columns: the type of each column by name; "S" is a text of any width.

    Raises:
        UserError: it has other columns or another number of rows.
    """
    file = io.BytesIO(data[:_MAX_HEADER_BYTES])
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of .npy")
        with AST_LOCK:  # numpy parses a header by `ast`
            shape, _, kind = np.lib.format.read_array_header_1_0(file)
        if kind.names != tuple(columns) or shape != (num_rows,):
            raise ValueError(f"{shape} rows of {kind.names}")
        for name, wanted in columns.items():
            if kind[name].kind != "S" if wanted == "S" else kind[name] != np.dtype(wanted):
                raise ValueError(f"the column {name} is {kind[name]}")
        if len(data) != file.tell() + num_rows * kind.itemsize:
            raise ValueError(f"{len(data):,} bytes")
        return np.frombuffer(data, kind, num_rows, file.tell()) if num_rows else np.zeros(0, kind)
    except (ValueError, TypeError, ArithmeticError, *_PARSER_ERRORS) as error:
        raise UserError(
            f"{where}: not the expected index ({reason_of(error)}); {num_rows:,} rows were expected"
        ) from error


def check_shards(table: NDArray, num_samples: int, where: str) -> None:
    """Raise UserError unless a table of shards has names within its folder and the given number of samples."""
    for name in table["name"].tolist():
        text = name.decode("utf-8", "replace")
        parts = text.split("/")
        if (
            text.encode() != name
            or not name.endswith(b".tar")
            or not all(parts)
            or {".", ".."} & set(parts)
            or b"\\" in name
            or b"\0" in name
        ):
            raise UserError(f"{where}: {name!r:.80} is not the name of a tar in this folder; pack the images again")
    for column in ("num_bytes", "num_samples", "index_bytes"):
        if table[column].min() < 0 or table[column].max() > MAX_INTEGER:
            raise UserError(f"{where}: the column {column} has values that cannot be; pack the images again")
    if (found := sum(table["num_samples"].tolist())) != num_samples:
        raise UserError(f"{where}: {found:,} samples where {HEAD} says {num_samples:,}")


def check_samples(table: NDArray, num_bytes: int, num_classes: int, where: str) -> None:
    """Raise UserError unless rows lie in a tar of `num_bytes`, one after the other, and labels are known."""
    offsets, lengths, labels = table["offset"], table["length"], table["label"]
    inside = (offsets >= 0) & (lengths >= 0) & (lengths <= num_bytes) & (offsets <= num_bytes - lengths)
    wrong = ~inside
    wrong[1:] |= inside[1:] & inside[:-1] & (offsets[1:] < offsets[:-1] + lengths[:-1])
    if labels.ndim == 1:
        wrong |= (labels < 0) | (labels >= num_classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"{where}: row {row:,} points outside its tar, into another image or to no class; pack the images again"
        )


def digest(data: bytes | mmap.mmap) -> str:
    """SHA-256 in hexadecimal digits."""
    return sha256(data).hexdigest()


def table_name(split: str) -> str:
    """The file name of a split's table of shards."""
    return f"{split}.shards.npy"


def index_name(shard: str) -> str:
    """The file name of a shard's table of samples, which lies beside the tar."""
    return shard.removesuffix(".tar") + ".npy"


SHARD_COLUMNS = {
    "name": "S",
    "num_bytes": "<i8",
    "num_samples": "<i8",
    "sha256": "S64",
    "index_bytes": "<i8",
    "index_sha256": "S64",
}


def sample_columns(num_classes: int, multilabel: bool) -> dict[str, Any]:
    """The columns of a table of samples and their types."""
    label = ("u1", (-(-num_classes // 8),)) if multilabel else "<i4"
    return {"offset": "<i8", "length": "<i8", "label": label, "key": "S"}
