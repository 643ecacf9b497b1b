"""Pack the images of any source into tar shards with an index, by several processes, whole or not at all.

The images of a split are shuffled once, by a permutation that depends on their number only, so a shard, and a block of
a shard, is a random sample of the split. Shards are independent: their bytes do not depend on which process writes
them and when, and an interrupted packing continues with the shards that are missing.

Layout: https://github.com/webdataset/webdataset. Members have no times and no owners, so the same images give the same
bytes.
"""

import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from hashlib import file_digest, sha256
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from coatnet.data.channels import read_pixels
from coatnet.data.datasets import TRUSTED_ROOTS, Dataset, Encoded, count_labels, evenly_spaced, links_outside
from coatnet.data.decode import BadImage, allowed_pixels, format_of
from coatnet.data.near_duplicates import keep_copies_together
from coatnet.data.open import open_dataset
from coatnet.data.sampler import EpochSampler
from coatnet.data.shards.dataset import WORK
from coatnet.data.shards.index import (
    HEAD,
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
from coatnet.data.splits import SplitRule, Splits
from coatnet.data.worker_processes import hide_main_script, may_start_processes
from coatnet.errors import UserError, counted
from coatnet.system.files import (
    atomic_files,
    atomic_write,
    commit_folder,
    only_process,
    open_regular,
    output_path,
    read_regular,
    remove_leftovers,
    translate_write_errors,
)
from coatnet.system.hardware import num_cores
from coatnet.system.json_reader import parse_json
from coatnet.system.parents import end_with_parent
from coatnet.system.progress import ProgressBar
from coatnet.system.terminal import warn

OVERHEAD_BYTES = 4 * tarfile.BLOCKSIZE  # of a sample beside its image: two headers, a label, padding
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
                read_pixels(data, dataset.describe(index), getattr(dataset, "scale", None))
            except BadImage as bad:
                left_out[bad.name] = bad.reason
                continue
            key = f"{number:09d}-{_short_name(dataset.describe(index))}".rstrip("-")
            offsets.append(tar.add(key + format_of(data, key).suffixes[0], data))
            tar.add(*_label_member(key, label, dataset.classes))
            lengths.append(len(data))
            labels.append(label)
            keys.append(key)
        checksum = tar.finish()
    _check(path, checksum)

    one_a_row = np.array(labels, dtype=np.int64)
    if dataset.multilabel:
        one_a_row = np.array(labels, dtype=np.uint8).reshape(-1, len(dataset.classes))
    stored = np.packbits(one_a_row, axis=1) if dataset.multilabel else one_a_row
    table = to_npy(sample_table(offsets, lengths, stored, keys))
    atomic_write(path.with_name(index_name(path.name)), table)
    shard = Shard(path.name, tar.position, len(keys), checksum, len(table), digest(table))
    written = Written(shard, count_labels(one_a_row, len(dataset.classes)).tolist(), left_out)
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


def _check(path: Path, checksum: str) -> None:
    with open(path, "rb", opener=open_regular) as file:
        if hasattr(os, "posix_fadvise"):  # else the bytes would come from memory, not from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if _hash_of(file) != checksum:
            raise UserError(f"{path}: the disk returned other bytes than were written; is it failing?")


def _hash_of(file: BufferedReader) -> str:
    return file_digest(file, "sha256").hexdigest()


def _read_record(path: Path, record: Path) -> Written | None:
    """The record of a finished shard; None if it is not finished or its files do not match."""
    try:
        values = parse_json(read_regular(record), record)
        shard = Shard(*values["shard"])
        table_path = path.with_name(index_name(path.name))
        with open(path, "rb", opener=open_regular) as tar, open(table_path, "rb", opener=open_regular) as table:
            if _hash_of(tar) == shard.sha256 and _hash_of(table) == shard.index_sha256:
                return Written(shard, values["class_counts"], values["left_out"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


SHARD_BYTES = 256_000_000
BAD_IMAGES_FILE = "left-out.jsonl"
SAMPLED_IMAGES = 512  # chosen: enough for their mean size
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote.

    Attributes:
        folder: of the shards.
        num_images: in all shards.
        num_shards: of both splits.
        num_bytes: of all shards.
        bad_images: the reason for each image that was left out.
    """

    folder: Path
    num_images: int
    num_shards: int
    num_bytes: int
    bad_images: Mapping[str, str]


class Piece(NamedTuple):
    """A shard to write: the positions `start` to `stop` of the shuffled split."""

    split: str
    name: str
    start: int
    stop: int


def pack(
    source: str | Path | Splits, out: str | Path, *, shard_bytes: int = SHARD_BYTES, num_workers: int | None = None
) -> Packed:
    """Write both splits of a source to a new folder of tar shards.

    Copies and near copies fall on one side, as in a training. The shards of an interrupted packing are kept beside
    `out`, and the same call continues with the missing ones.

    Args:
        source: a source as `open_dataset` takes it, or splits.
        out: the folder to make.
        shard_bytes: the size of a shard, about.
        num_workers: processes that write; None is one per core.

    Raises:
        UserError: `out` exists or is a mount point, another process is packing there, the disk refuses, or no image
            can be used.
    """
    if shard_bytes < 1 or (num_workers is not None and num_workers < 1):
        raise UserError(f"shard_bytes and num_workers must be at least 1, got {shard_bytes} and {num_workers}")
    target = output_path(out).absolute()
    target = target.resolve() if target.is_symlink() else target
    _require_new(target, out)
    if isinstance(source, Splits):
        splits = source
    else:
        splits, _ = keep_copies_together(open_dataset(source), SplitRule(), warn)
    if splits.test is not None:
        warn(f"{counted(len(splits.test), 'image')} of the test split are not packed")
    datasets = {TRAINING: splits.training, VALIDATION: splits.validation}
    for purpose, dataset in (("training", splits.training), ("validation", splits.validation)):
        if not len(dataset):
            raise UserError(f"{splits.name} has no images in its {purpose} split, and shards need both")
    if outside := [link for dataset in datasets.values() for link in links_outside(dataset)]:
        name, file = outside[0]
        raise UserError(
            f"{name} is a link to {file}, out of the data's folder, as are {len(outside) - 1:,} others: packing would "
            f"copy what it leads to; if it may, name the folder in {TRUSTED_ROOTS}"
        )
    mean = {name: _mean_bytes(dataset) for name, dataset in datasets.items()}
    pieces = [
        piece for name, dataset in datasets.items() for piece in _pieces(name, len(dataset), shard_bytes / mean[name])
    ]
    staged = target.with_name(f".{target.name}.packing")
    advice = f"finished shards are kept in {staged}, and the same command continues"
    with translate_write_errors(out, advice):
        (staged / WORK).mkdir(parents=True, exist_ok=True)
    with translate_write_errors(out, advice), only_process(staged / WORK / "lock", f"packing into {target}"):
        _require_new(target, out)  # another process may have finished meanwhile
        _begin(staged, {"pieces": [len(pieces)], "splits": {k: _fingerprint(v) for k, v in datasets.items()}})
        _require_space(staged, sum(mean[name] * len(dataset) for name, dataset in datasets.items()), out)
        written = {}
        total = sum(len(dataset) for dataset in datasets.values())
        with ProgressBar("packing", total, "images") as bar:
            for piece, result in write_pieces(datasets, pieces, staged, staged / WORK, num_workers):
                written[piece] = result
                bar.advance(piece.stop - piece.start)
        packed = _finish(staged, target, splits, [(piece, written[piece]) for piece in pieces])
    shutil.rmtree(target / WORK, ignore_errors=True)
    return packed


def _require_new(target: Path, out: str | Path) -> None:
    """Raise UserError unless nothing is at the target, or an empty folder, which a finished one can replace."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{out} exists already; give a new folder")
    if os.path.ismount(target):
        raise UserError(f"{out} is a mount point, which no folder can replace; give a new folder below it")


def _mean_bytes(dataset: Dataset) -> float:
    """The mean size of a sample in a tar, from images that are evenly spread."""
    sizes = []
    for index in evenly_spaced(len(dataset), SAMPLED_IMAGES):
        try:
            sizes.append(len(encoded(dataset, index)[0]) + OVERHEAD_BYTES)
        except BadImage:
            continue
    return float(np.mean(sizes)) if sizes else float(OVERHEAD_BYTES)


def _pieces(split: str, num_images: int, images_per_shard: float) -> Iterator[Piece]:
    num_shards = min(num_images, max(1, round(num_images / max(1.0, images_per_shard))))
    edges = [number * num_images // num_shards for number in range(num_shards + 1)]
    for number in range(num_shards):
        yield Piece(split, f"{split}-{number:06d}.tar", edges[number], edges[number + 1])


def _fingerprint(dataset: Dataset) -> str:
    """A hash of what the shards are made of, to continue a packing of the same images, under the same limit, only."""
    hashed = sha256(json.dumps([len(dataset), dataset.classes, allowed_pixels()]).encode())
    hashed.update(np.ascontiguousarray(dataset.labels).data)
    for part in itertools.chain(dataset.identity(), dataset.state()):
        hashed.update(part)
    return hashed.hexdigest()


def _begin(staged: Path, plan: dict) -> None:
    """Keep the finished shards of an earlier process if it had the same plan, else remove them."""
    path, text = staged / WORK / "plan.json", json.dumps(plan)
    for folder in (staged, path.parent):
        remove_leftovers(folder)
    if path.exists() and read_regular(path) == text.encode():
        return
    for entry in [*staged.iterdir(), *(staged / WORK).iterdir()]:
        if entry.is_file() and entry.name != "lock":
            entry.unlink()
    atomic_write(path, text)


def _require_space(staged: Path, num_bytes: float, out: str | Path) -> None:
    done = sum(entry.stat().st_size for entry in os.scandir(staged) if entry.is_file())
    free = shutil.disk_usage(staged).free
    if num_bytes - done > free:
        raise UserError(f"{out} needs about {num_bytes / 1e9:,.1f} GB, of which {free / 1e9:,.1f} GB are free")


def _finish(staged: Path, target: Path, splits: Splits, results: list[tuple[Piece, Written]]) -> Packed:
    """Write the tables and the head, and rename the folder."""
    heads = {}
    for split in (TRAINING, VALIDATION):
        written = [result for piece, result in results if piece.split == split]
        shards = [result.shard for result in written]
        table = to_npy(shard_table(shards))
        atomic_write(staged / table_name(split), table)
        counts = np.sum([result.class_counts for result in written], axis=0)
        try:
            heads[split] = summarize_split(shards, counts, table, f"{splits.name}: {split}")
        except UserError:
            shutil.rmtree(staged, ignore_errors=True)  # there is nothing to continue with
            raise
    left_out = {name: reason for _, result in results for name, reason in result.left_out.items()}
    notes = [f"packed from {splits.name} in {counted(len(results), 'shard')}"]
    notes += [note for note in splits.notes if splits.test is None or "measured once" not in note]
    if splits.test is not None:
        notes.append(f"{counted(len(splits.test), 'image')} of the test split not packed")
    if left_out:
        lines = [json.dumps({"picture": name, "reason": reason}) + "\n" for name, reason in left_out.items()]
        atomic_write(staged / BAD_IMAGES_FILE, "".join(lines).encode())
        notes.append(f"{counted(len(left_out), 'image')} left out when it was packed, see {BAD_IMAGES_FILE}")
    if empty := [name for name, count in zip(splits.classes, heads[TRAINING].class_counts, strict=True) if not count]:
        notes.append(f"no training image of {', '.join(empty[:5])} could be used")
    head = Head(splits.name, splits.classes, splits.multilabel, heads, tuple(notes))
    atomic_write(staged / HEAD, head.to_json())  # last: a folder without it is not opened
    commit_folder(staged, target)
    shards = [result.shard for _, result in results]
    num_images, num_bytes = sum(shard.num_samples for shard in shards), sum(shard.num_bytes for shard in shards)
    return Packed(target, num_images, len(shards), num_bytes, left_out)


class _Work(NamedTuple):
    datasets: Mapping[str, Dataset]
    folder: Path
    records: Path

    def write(self, piece: Piece) -> Written:
        dataset = self.datasets[piece.split]
        indices = EpochSampler(len(dataset), SHUFFLE_SEED).indices(np.arange(piece.start, piece.stop)).tolist()
        path = self.folder / piece.name
        return write_shard(dataset, indices, piece.start, path, self.records / f"{piece.name}.json")


def write_pieces(
    datasets: Mapping[str, Dataset], pieces: Sequence[Piece], folder: Path, records: Path, num_workers: int | None
) -> Iterator[tuple[Piece, Written]]:
    """Yield each piece when it is finished, in any order. With one worker, this process writes them all.

    Raises:
        UserError: a process died. What a process raises is raised here.
    """
    work = _Work(datasets, folder, records)
    num_workers = min(num_workers or num_cores(), len(pieces))
    if num_workers == 1 or not may_start_processes():
        yield from ((piece, work.write(piece)) for piece in pieces)
        return
    # Fork would copy the locks of threads that do not exist in the child; a forkserver has no threads.
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "coatnet.data.shards.pack"])
    executor = ProcessPoolExecutor(num_workers, context, _start, (work,))
    try:
        with hide_main_script(unless_it_defines=type(datasets[pieces[0].split])):
            futures = {executor.submit(_write, piece): piece for piece in pieces}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        reason = "a process that was packing stopped, perhaps for lack of memory"
        raise UserError(f"{reason}; the same command continues; --workers starts fewer") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start(work: _Work) -> None:
    global _own_work
    _own_work = work
    torch.set_num_threads(1)
    # The terminal sends Ctrl-C to every process; the main process stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _write(piece: Piece) -> Written:
    return _own_work.write(piece)


_own_work: _Work  # of a process that `_start` has set up
