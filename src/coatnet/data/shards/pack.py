"""`coatnet pack`: images from any source as tar shards with a side index, by several processes, whole or not at all.

The images of a split are shuffled once, by a permutation that depends on their number only: a shard, and a block of
a shard, is then a sample of the whole split. Shards are independent pieces of work, so who writes them and when
changes nothing in their bytes, and a packing that was stopped goes on where it was.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from coatnet.data.datasets import Dataset
from coatnet.data.decode import BadImage
from coatnet.data.open import open_dataset
from coatnet.data.shards.index import HEAD, TRAINING, VALIDATION, Head, shard_table, summarise_split, table_name, to_npy
from coatnet.data.shards.open import WORK
from coatnet.data.shards.pack_processes import Piece, write_pieces
from coatnet.data.shards.write import OVERHEAD, Written, encoded
from coatnet.data.splits import Splits
from coatnet.errors import UserError
from coatnet.system.files import atomic_write, commit_folder, file_lock, remove_leftovers, translate_write_errors
from coatnet.system.progress import ProgressBar

SHARD_BYTES = 256_000_000
LEFT_OUT = "left-out.jsonl"
_SAMPLED = 512  # images, for their mean size
_FINGERPRINTED = 4096  # names


@dataclass(frozen=True)
class Packed:
    """What was written, and why each image left out was no use."""

    folder: Path
    num_images: int
    num_shards: int
    num_bytes: int
    left_out: Mapping[str, str]


def pack(
    source: str | Path | Splits, out: str | Path, *, shard_bytes: int = SHARD_BYTES, num_workers: int | None = None
) -> Packed:
    """Write both splits of a source to the new folder `out`, in shards of about `shard_bytes`.

    `num_workers` processes write, one a core if None. What an interrupted packing has finished is kept beside `out`,
    and the same call goes on from there.

    Raises:
        UserError: `out` exists, another process is packing there, the disk refuses, or no image can be used.
    """
    if shard_bytes < 1 or (num_workers is not None and num_workers < 1):
        raise UserError(f"a shard needs a byte and a packing a worker, got {shard_bytes} and {num_workers}")
    target = Path(out).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{out} exists already; give a new folder")
    splits = source if isinstance(source, Splits) else open_dataset(source)
    datasets = {TRAINING: splits.training, VALIDATION: splits.validation}
    mean = {name: _mean_bytes(dataset) for name, dataset in datasets.items()}
    pieces = [
        piece for name, dataset in datasets.items() for piece in _pieces(name, len(dataset), shard_bytes / mean[name])
    ]
    staged = target.with_name(f".{target.name}.packing")
    advice = f"what is finished is kept in {staged}, and the same command goes on with it"
    with translate_write_errors(out, advice), _alone(staged):
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


def _mean_bytes(dataset: Dataset) -> float:
    """Of a sample in a tar, from images evenly spread."""
    sizes = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(_SAMPLED, len(dataset))).astype(np.int64)).tolist():
        try:
            sizes.append(len(encoded(dataset, index)[0]) + OVERHEAD)
        except BadImage:
            continue
    return float(np.mean(sizes)) if sizes else float(OVERHEAD)


def _pieces(split: str, num_images: int, per_shard: float) -> Iterator[Piece]:
    num_shards = min(num_images, max(1, round(num_images / max(1.0, per_shard))))
    edges = [number * num_images // num_shards for number in range(num_shards + 1)]
    for number in range(num_shards):
        yield Piece(split, f"{split}-{number:06d}.tar", edges[number], edges[number + 1])


@contextmanager
def _alone(staged: Path) -> Iterator[None]:
    work = staged / WORK
    work.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(work / "lock", wait=False):
            yield
    except BlockingIOError as error:
        raise UserError(f"another process is packing into {staged}; wait for it, or give another folder") from error


def _fingerprint(dataset: Dataset) -> str:
    """What tells whether an interrupted packing was of the same images: their number, labels and names."""
    hashed = sha256(json.dumps([len(dataset), dataset.classes]).encode())
    hashed.update(np.ascontiguousarray(dataset.labels).data)
    for index in np.linspace(0, len(dataset) - 1, min(_FINGERPRINTED, len(dataset))).astype(np.int64).tolist():
        hashed.update(dataset.describe(index).encode())
    return hashed.hexdigest()


def _begin(staged: Path, plan: dict) -> None:
    """Go on with what an earlier process left, if it had the same plan; or with nothing."""
    path, text = staged / WORK / "plan.json", json.dumps(plan)
    for folder in (staged, path.parent):
        remove_leftovers(folder)
    if path.exists() and path.read_text() == text:
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
    """Write tables and head, and give the folder its name."""
    heads = {}
    for split in (TRAINING, VALIDATION):
        written = [result for piece, result in results if piece.split == split]
        shards = [result.shard for result in written]
        table = to_npy(shard_table(shards))
        atomic_write(staged / table_name(split), table)
        counts = np.sum([result.class_counts for result in written], axis=0)
        try:
            heads[split] = summarise_split(shards, counts, table, f"{splits.name}: {split}")
        except UserError:
            shutil.rmtree(staged, ignore_errors=True)  # there is nothing to go on with
            raise
    left_out = {name: reason for _, result in results for name, reason in result.left_out.items()}
    notes = [f"packed from {splits.name} in {len(results):,} shards", *splits.notes]
    if left_out:
        lines = [json.dumps({"picture": name, "reason": reason}) + "\n" for name, reason in left_out.items()]
        atomic_write(staged / LEFT_OUT, "".join(lines).encode())
        notes.append(f"{len(left_out):,} images were left out when it was packed; {LEFT_OUT} names them")
    if empty := [name for name, count in zip(splits.classes, heads[TRAINING].class_counts, strict=True) if not count]:
        notes.append(f"no training image of {', '.join(empty[:5])} could be used")
    head = Head(splits.name, splits.classes, splits.multilabel, heads, tuple(notes))
    atomic_write(staged / HEAD, head.to_json())  # last: without it the folder is not believed
    commit_folder(staged, target)
    shards = [result.shard for _, result in results]
    num_images, num_bytes = sum(shard.num_samples for shard in shards), sum(shard.num_bytes for shard in shards)
    return Packed(target, num_images, len(shards), num_bytes, left_out)
