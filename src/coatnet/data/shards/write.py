"""Write one shard and check it on the disk: the work of one process of `coatnet pack`.

Layout: https://github.com/webdataset/webdataset. Members have no times and no owners, so the same images give the same
bytes.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coatnet.data.datasets import Dataset, Encoded
from coatnet.data.decode import BadImage, decode
from coatnet.data.shards.index import Shard, digest, index_name, sample_table, to_npy
from coatnet.errors import UserError
from coatnet.system.files import atomic_files, atomic_write

OVERHEAD_BYTES = 4 * tarfile.BLOCKSIZE  # of a sample beside its image: two headers, a label, padding
_SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp"}
_MAX_KEY_LENGTH = 60  # with number and suffix it fits into the 100 bytes of a plain tar header


@dataclass(frozen=True)
class Written:
    """A finished shard: its row of the table, the images of each class, and the bad images with reasons."""

    shard: Shard
    class_counts: list[int]
    left_out: dict[str, str] = field(default_factory=dict)  # the key in the record on disk


class _Tar:
    """Writes the members of a tar file one after another and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = sha256()
        self.position = 0

    def add(self, name: str, data: bytes) -> int:
        """Write a member and return the byte offset of its data."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self.position
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> str:
        """Write the end mark and return the SHA-256 of the file."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.position += len(data)


def write_shard(dataset: Dataset, indices: Iterable[int], first: int, path: Path, record: Path) -> Written:
    """Write images as members "000000012-name.jpg" and "000000012-name.cls", numbered from `first`.

    Each image is decoded once, and bad ones are left out. The table of samples is written beside the tar. A shard
    whose record exists and matches the files is not written again.

    Args:
        indices: of the images in the dataset.
        path: of the tar.
        record: a JSON file that is written last.

    Raises:
        UserError: the disk returns other bytes than were written.
        OSError: the disk refuses.
    """
    if (finished := _read_record(path, record)) is not None:
        return finished
    offsets, lengths, labels, keys, left_out = [], [], [], [], {}
    with atomic_files(path) as (staged,), staged.open("wb") as file:
        tar = _Tar(file)
        for number, index in enumerate(indices, start=first):
            try:
                data, label = encoded(dataset, index)
                decode(data, dataset.describe(index))
            except BadImage as bad:
                left_out[bad.name] = bad.reason
                continue
            key = f"{number:09d}-{_short_name(dataset.describe(index))}".rstrip("-")
            offsets.append(tar.add(f"{key}.{_SUFFIXES.get(data[:2], 'tif')}", data))
            tar.add(*_label_member(key, label, dataset.classes))
            lengths.append(len(data))
            labels.append(label)
            keys.append(key)
        checksum = tar.finish()
    _check(path, checksum)

    one_a_row = np.array(labels, dtype=np.int64)
    if dataset.multilabel:
        one_a_row = np.array(labels, dtype=np.uint8).reshape(-1, len(dataset.classes))
    table = to_npy(sample_table(offsets, lengths, one_a_row, keys))
    atomic_write(path.with_name(index_name(path.name)), table)
    shard = Shard(path.name, tar.position, len(keys), checksum, len(table), digest(table))
    written = Written(shard, _count(one_a_row, len(dataset.classes)), left_out)
    atomic_write(record, json.dumps(asdict(written)))
    return written


def encoded(dataset: Dataset, index: int) -> tuple[bytes, NDArray]:
    """The bytes of an image file and its label; an array becomes a PNG, which is lossless."""
    image, label = dataset.read(index)
    return (image if isinstance(image, bytes) else _as_png(image)), label


def _as_png(pixels: Encoded) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def _label_member(key: str, label: NDArray, classes: tuple[str, ...]) -> tuple[str, bytes]:
    if label.ndim:
        names = [classes[number] for number in np.flatnonzero(label)]
        return f"{key}.json", json.dumps({"labels": names}, ensure_ascii=False).encode()
    return f"{key}.cls", str(int(label)).encode()


def _short_name(name: str) -> str:
    """The recognizable part of an image's name, in letters that every tool accepts; a dot would end the key."""
    last = re.split(r"[/\\]", name)[-1]
    stem = re.sub(r"\.\w{1,5}$|^[0-9]{9,}-", "", last)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:_MAX_KEY_LENGTH].strip("_-")


def _count(labels: NDArray, num_classes: int) -> list[int]:
    if labels.ndim == 2:
        return labels.sum(axis=0, dtype=np.int64).tolist()
    return np.bincount(labels, minlength=num_classes).tolist()


def _check(path: Path, checksum: str) -> None:
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # else the bytes would come from memory, not from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if _hash_of(file) != checksum:
            raise UserError(f"{path}: the disk returned other bytes than were written; is it failing?")


def _hash_of(file: BinaryIO) -> str:
    hashed = sha256()
    while chunk := file.read(1 << 22):
        hashed.update(chunk)
    return hashed.hexdigest()


def _read_record(path: Path, record: Path) -> Written | None:
    """The record of a finished shard; None if it is not finished or its files do not match."""
    try:
        values = json.loads(record.read_bytes())
        shard = Shard(*values["shard"])
        with path.open("rb") as tar, path.with_name(index_name(path.name)).open("rb") as table:
            if _hash_of(tar) == shard.sha256 and _hash_of(table) == shard.index_sha256:
                return Written(shard, values["class_counts"], values["left_out"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
