"""WebDataset tars that another program wrote: read once, with their index in this machine's cache folder.

The index belongs to the names and sizes of the tars (of local ones also to their modification times), so tars that
change are read again, with all checks.

Layout (https://github.com/webdataset/webdataset): consecutive members with the same path up to the first dot of the
file name, the key, are one sample; the rest of the name says what a member is.
"""

import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coatnet.data.datasets import printable
from coatnet.data.decode import ARRAY_SUFFIXES, IMAGE_SUFFIXES
from coatnet.data.folder import TEST_NAMES, TRAINING_NAMES, VALIDATION_NAMES, natural_key
from coatnet.data.shards.index import (
    HEAD,
    MAX_CLASSES,
    TRAINING,
    VALIDATION,
    Head,
    Shard,
    digest,
    index_name,
    sample_table,
    shard_table,
    summarize_split,
    table_name,
    to_npy,
)
from coatnet.data.shards.storage import LocalStorage, Storage
from coatnet.errors import UserError, reason_of, shorten
from coatnet.system.cache import cached_folder
from coatnet.system.json_reader import MAX_INTEGER, parse_json
from coatnet.system.progress import ProgressBar

Label = int | str | tuple[int | str, ...]

_MAX_LABEL_BYTES = 1 << 20
_JSON_KEYS = ("labels", "label", "cls", "class")
_MAX_KEY_BYTES = 1_024  # every row of an index is as wide as its longest key
_MAX_TABLE_BYTES = 1 << 29  # of the labels of a tar, one bit for each class and image
_MAX_HEADER_BYTES = 1 << 20  # of all headers of a member


class Sample(NamedTuple):
    """An image in a tar: its key, where its bytes are, and its label."""

    key: str
    offset: int
    length: int
    label: Label


class _Tar(NamedTuple):
    name: str
    num_bytes: int
    samples: list[Sample]


def index_foreign(files: Storage, validation_fraction: float, evaluation: bool = False) -> LocalStorage:
    """The folder of the index, which is made if these tars are new.

    With `evaluation` nothing is trained, so tars for validation alone, a lone tar or one class are enough.

    Raises:
        UserError: there are no tars, or one of them is damaged or has images without labels.
    """
    parts, left_out = _split(files, validation_fraction, evaluation)
    names = [name for part in parts.values() for name in part]
    sizes = files.sizes(names)
    mark = sha256(repr((str(files), parts, sizes, files.modified(names), *left_out)).encode()).hexdigest()[:32]
    lengths = [size or 0 for size in sizes]

    def write(folder: Path) -> None:
        _write(folder, files, parts, left_out, lengths, min_classes=1 if evaluation else 2)

    return LocalStorage(cached_folder("indexes", mark, write))


def split_of(name: str) -> str | None:
    """The split that is part of a name such as `imagenet-train-0003.tar`; None if there is none."""
    if _has_word(name, TRAINING_NAMES):
        return TRAINING
    return VALIDATION if _has_word(name, (*VALIDATION_NAMES, *TEST_NAMES)) else None


def _has_word(name: str, words: Collection[str]) -> bool:
    return not set(re.split(r"[^a-z]+", name.lower())).isdisjoint(words)


def _split(files: Storage, fraction: float, evaluation: bool) -> tuple[dict[str, list[str]], list[str]]:
    """The tars of each split, by the names of files and folders, else some held out by hash; and tars for a test, which
    are left out beside those of both splits."""
    folders = ["", *filter(split_of, files.folders())]
    names = [name for folder in folders for name in files.names(folder) if name.endswith(".tar")]
    if not names:
        raise UserError(f"{files}: no {HEAD} and no .tar files; give the folder that `coatnet pack` wrote")
    parts: dict[str, list[str]] = {TRAINING: [], VALIDATION: []}
    left_out: list[str] = []
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{files}: the name {printable(name)!r} is not UTF-8, as those of shards are; rename the file"
            ) from None
    some_train = any((split_of(name) or TRAINING) == TRAINING for name in names)
    both = some_train and any(_has_word(name, VALIDATION_NAMES) for name in names)
    for name in names:
        for_test = _has_word(name, TEST_NAMES) and not _has_word(name, (*TRAINING_NAMES, *VALIDATION_NAMES))
        # chosen: an index has two splits.
        (left_out if both and for_test else parts[split_of(name) or TRAINING]).append(name)
    if not parts[VALIDATION]:
        if len(names) < 2 and evaluation:
            return {VALIDATION: names}, []
        if len(names) < 2:
            raise UserError(f"{files}: one tar, so none can be held out; name some val-....tar, or `coatnet pack` them")
        by_hash = sorted(names, key=_name_hash)
        count = min(max(1, round(fraction * len(names))), len(names) - 1)
        parts = {TRAINING: sorted(by_hash[count:]), VALIDATION: sorted(by_hash[:count])}
    if not parts[TRAINING] and evaluation:
        return {VALIDATION: parts[VALIDATION]}, left_out
    if not parts[TRAINING]:
        raise UserError(f"{files}: all tars are for validation; some need train in their names")
    return parts, left_out


def _write(
    folder: Path,
    files: Storage,
    parts: dict[str, list[str]],
    left_out: Sequence[str],
    sizes: Sequence[int],
    *,
    min_classes: int,
) -> None:
    read: dict[str, list[_Tar]] = {split: [] for split in parts}
    first_with: dict[bytes, str] = {}
    left = iter(sizes)
    with ProgressBar("reading the tars once", sum(sizes), "bytes") as bar:
        for split, names in parts.items():
            for name in names:
                with files.stream(name) as file:
                    tar = _Tar(name, next(left), list(read_samples(file, f"{files}/{name}")))
                keys = blake2b("\n".join(sample.key for sample in tar.samples).encode()).digest()
                if tar.samples and (twin := first_with.setdefault(keys, name)) != name:
                    raise UserError(f"{files}/{name}: holds the same keys as {twin}; remove one of the two")
                read[split].append(tar)
                bar.advance(tar.num_bytes)
    labels = [sample.label for tars in read.values() for tar in tars for sample in tar.samples]
    classes = _classes(labels, str(files), min_classes)
    multilabel = any(isinstance(label, tuple) for label in labels)
    splits = {}
    for split, tars in read.items():
        shards = [_write_samples(folder, tar, classes, multilabel) for tar in tars]
        counts = np.sum([counts for _, counts in shards], axis=0)
        table = to_npy(shard_table([shard for shard, _ in shards]))
        (folder / table_name(split)).write_bytes(table)
        splits[split] = summarize_split([shard for shard, _ in shards], counts, table, f"{files}: {split}")
    held_out = ", ".join(parts[VALIDATION][:3]) + (" and more" if len(parts[VALIDATION]) > 3 else "")
    without = f", without {shorten(left_out)}" if left_out else ""
    notes = (f"{sum(map(len, parts.values())):,} tars of another program; held out: {held_out}{without}",)
    name = str(files).rstrip("/").rpartition("/")[2]
    (folder / HEAD).write_bytes(Head(name, tuple(classes), multilabel, splits, notes).to_json())


def _write_samples(folder: Path, tar: _Tar, classes: dict[str, int], multilabel: bool) -> tuple[Shard, NDArray]:
    """Write the table of samples of a tar; returns its row of the table of shards, and the count of each class."""
    samples = tar.samples
    width = -(-len(classes) // 8) if multilabel else 1
    if len(samples) * width > _MAX_TABLE_BYTES:
        raise UserError(
            f"{tar.name}: {len(samples):,} images with several of {len(classes):,} labels; a tar may have "
            f"{8 * _MAX_TABLE_BYTES:,} labels times images, split it into several"
        )
    labels = np.zeros((len(samples), width), np.uint8) if multilabel else np.zeros(len(samples), np.int64)
    counts = np.zeros(len(classes), np.int64)
    for row, sample in enumerate(samples):
        chosen = np.unique([classes[str(name)] for name in _names(sample.label)]).astype(np.int64)
        counts[chosen] += 1
        if multilabel:  # as numpy.packbits
            np.bitwise_or.at(labels[row], chosen >> 3, (128 >> (chosen & 7)).astype(np.uint8))
        else:
            labels[row] = chosen[0]
    table = to_npy(
        sample_table([s.offset for s in samples], [s.length for s in samples], labels, [s.key for s in samples])
    )
    path = folder / index_name(tar.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(table)
    return Shard(tar.name, tar.num_bytes, len(samples), "", len(table), digest(table)), counts


def _classes(labels: Iterable[Label], where: str, min_classes: int) -> dict[str, int]:
    """The index of each class name. Labels that are indices have the names "0", "1", ..."""
    found = {name for label in labels for name in _names(label)}
    if all(isinstance(name, int) for name in found):
        highest = max((int(name) for name in found), default=0)
        if not min_classes - 1 <= highest < MAX_CLASSES:
            raise UserError(
                f"{where}: the highest class index is {highest:,}; it must be from {min_classes - 1} to "
                f"{MAX_CLASSES - 1:,}"
            )
        return {str(number): number for number in range(highest + 1)}
    if len(found) > MAX_CLASSES:
        raise UserError(f"{where}: {len(found):,} classes; there may be {MAX_CLASSES:,}")
    if len(found) < min_classes:
        raise UserError(f"{where}: one class, {min(map(str, found))!r}; a classifier needs at least two")
    return {name: number for number, name in enumerate(sorted(map(str, found), key=natural_key))}


def _names(label: Label) -> tuple[int | str, ...]:
    return label if isinstance(label, tuple) else (label,)


def _name_hash(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=8).digest()


@dataclass
class _Members:
    """The members of a sample that were read so far."""

    key: str
    image: tuple[int, int] | None = None
    is_array: bool = False  # of NumPy, for which another image is taken
    label: Label | None = None
    seen: set[str] = field(default_factory=set)


def read_samples(file: BinaryIO, where: str) -> Iterator[Sample]:
    """Yield the samples of a tar. `.cls` holds a class index or name, `.json` a label or a list of labels.

    Raises:
        UserError: the tar is compressed, truncated or damaged, a key occurs twice, or an image has no label. The
            message begins with `where`.
    """
    seen: set[str] = set()
    current: _Members | None = None
    for member in _members(file, where):
        folder, _, name = member.name.rpartition("/")
        if name.startswith("."):  # such as ._000.jpg, which tar of macOS adds
            continue
        stem, _, kind = name.partition(".")
        key = printable(f"{folder}/{stem}" if folder else stem)
        if len(key.encode()) > _MAX_KEY_BYTES:
            raise UserError(
                f"{where}: the key {key!r:.80} ... has {len(key):,} characters; it may have {_MAX_KEY_BYTES:,}"
            )
        if current is None or key != current.key:
            if current is not None:
                yield from _finish(current, where)
            if key in seen:
                raise UserError(f"{where}: the key {key!r} occurs twice; keys must be unique within a tar")
            seen.add(key)
            current = _Members(key)
        if kind in current.seen:
            raise UserError(f"{where}: {member.name!r} occurs twice; keys must be unique within a tar")
        current.seen.add(kind)
        suffix = "." + kind.lower().rpartition(".")[2]
        if suffix in IMAGE_SUFFIXES:
            is_array = suffix in ARRAY_SUFFIXES
            if current.image is None or (current.is_array and not is_array):
                current.image, current.is_array = (member.offset_data, member.size), is_array
        elif suffix in (".cls", ".json") and member.size <= _MAX_LABEL_BYTES and current.label is None:
            current.label = _read_label(file, member, f"{where}: {printable(member.name)}")
    if current is not None:
        yield from _finish(current, where)


class _BoundedHeaders:
    """A tar for `tarfile`, which believes what headers say: bounded in what it reads for those of one member.

    Without the bound a header that claims gigabytes takes as much memory, and one whose size is negative, or whose map
    has no end, is read for ever.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.tell = file, file.tell
        self.left = _MAX_HEADER_BYTES

    def seek(self, place: int) -> int:
        if place < 0:
            raise tarfile.ReadError("a member before the beginning")
        return self._file.seek(place)

    def read(self, size: int) -> bytes:
        self.left -= max(size, 1)
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a member with headers of more than {_MAX_HEADER_BYTES:,} bytes")
        return self._file.read(size)


def _members(file: BinaryIO, where: str) -> Iterator[tarfile.TarInfo]:
    headers: Any = _BoundedHeaders(file)
    place = -1
    try:
        with tarfile.open(fileobj=headers, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # pyrefly: ignore[missing-attribute]  # else all stay in memory
                headers.left = _MAX_HEADER_BYTES
                if member.size < 0 or member.offset <= place:
                    raise tarfile.ReadError(f"{printable(member.name):.80} has a size that cannot be")
                if member.issparse():
                    raise tarfile.ReadError(f"{printable(member.name):.80} is a sparse file")
                place = member.offset
                if member.isreg():
                    yield member
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where}: truncated, or not a plain tar ({reason_of(error)}); fetch it again, unpack a .tar.gz"
        ) from error
    # tarfile takes anything that it cannot parse for the end of the archive, which is a block of zeros.
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{where}: truncated or damaged, no end mark at byte {end:,}; fetch it again")


def _finish(members: _Members, where: str) -> Iterator[Sample]:
    if members.image is None:
        return  # a README, or a sample of something else
    if members.label is None:
        raise UserError(f"{where}: {members.key!r} has no .cls or .json with a label; each image needs one")
    yield Sample(members.key, *members.image, members.label)


def _read_label(file: BinaryIO, member: tarfile.TarInfo, where: str) -> Label | None:
    """The label in a member; None for a JSON object without labels."""
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise UserError(f"{where}: truncated at byte {member.offset_data + len(data):,}; fetch it again")
    try:
        text = data.decode().strip()
    except ValueError as error:
        raise UserError(f"{where}: not a label ({reason_of(error)})") from error
    value = parse_json(text, f"{where}: not a label") if member.name.lower().endswith(".json") else text
    if isinstance(value, dict):
        value = next((value[key] for key in _JSON_KEYS if key in value), None)
        if value is None:
            return None
    if isinstance(value, list):
        return tuple(_one(item, where) for item in value)
    return _one(value, where)


def _one(value: object, where: str) -> int | str:
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INTEGER:
        return value
    raise UserError(f"{where}: the label is {short(value)}; it must be a class index or a class name")
