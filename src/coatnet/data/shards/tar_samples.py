"""What lies in a WebDataset tar that another program wrote: images by key, where their bytes are, and their labels.

Layout (https://github.com/webdataset/webdataset): members that follow each other and share the path up to the first
dot of the file name, the key, are one sample; the rest of the name says what a member is.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from coatnet.data.datasets import printable
from coatnet.data.folder import IMAGE_SUFFIXES
from coatnet.errors import UserError

Label = int | str | tuple[int | str, ...]

_LONGEST_LABEL = 1 << 20
_JSON_KEYS = ("labels", "label", "cls", "class")


class Sample(NamedTuple):
    key: str
    offset: int
    length: int
    label: Label


@dataclass
class _Members:
    """What was met of a sample so far."""

    key: str
    image: tuple[int, int] | None = None
    label: Label | None = None
    seen: set[str] = field(default_factory=set)


def read_samples(file: BinaryIO, where: str) -> Iterator[Sample]:
    """The samples of a tar in their order. `.cls` holds a class index or name, `.json` a label or a list of labels.

    Raises `UserError`, beginning with `where`, if the tar is compressed, cut off or damaged, if a key comes twice,
    or if an image has no label.
    """
    seen: set[str] = set()
    current: _Members | None = None
    for member in _members(file, where):
        folder, _, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        key = printable(f"{folder}/{stem}" if folder else stem)
        if current is None or key != current.key:
            if current is not None:
                yield from _finish(current, where)
            if key in seen:
                raise UserError(f"{where}: the key {key!r} comes twice; keys must be unique within a tar")
            seen.add(key)
            current = _Members(key)
        if kind in current.seen:
            raise UserError(f"{where}: {member.name!r} comes twice; keys must be unique within a tar")
        current.seen.add(kind)
        suffix = "." + kind.lower().rpartition(".")[2]
        if suffix in IMAGE_SUFFIXES:
            current.image = current.image or (member.offset_data, member.size)
        elif suffix in (".cls", ".json") and member.size <= _LONGEST_LABEL and current.label is None:
            current.label = _read_label(file, member, f"{where}: {printable(member.name)}")
    if current is not None:
        yield from _finish(current, where)


def _members(file: BinaryIO, where: str) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield from (member for member in archive if member.isreg())
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{where}: truncated, or no plain tar ({reason}); fetch it again, unpack a .tar.gz") from error
    # tarfile takes whatever it cannot parse for the end of the archive, which is a block of zeros.
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
    """None for a JSON object that says nothing of labels."""
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise UserError(f"{where}: truncated at byte {member.offset_data + len(data):,}; fetch it again")
    try:
        text = data.decode().strip()
        value = json.loads(text) if member.name.lower().endswith(".json") else text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a label ({' '.join(str(error).split())[:80]})") from error
    if isinstance(value, dict):
        value = next((value[key] for key in _JSON_KEYS if key in value), None)
        if value is None:
            return None
    if isinstance(value, list):
        return tuple(_one(item, where) for item in value)
    return _one(value, where)


def _one(value: object, where: str) -> int | str:
    if isinstance(value, str) and value.removeprefix("-").isdecimal():
        value = int(value)
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise UserError(f"{where}: the label is {value!r}; it must be a class index or a class name")
