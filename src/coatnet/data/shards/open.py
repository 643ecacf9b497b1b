"""Open a folder or a URL of shards, checking everything that can be checked before training."""

import os
from pathlib import Path

from coatnet.data.shards.block_cache import default_cache
from coatnet.data.shards.dataset import ShardDataset
from coatnet.data.shards.index import (
    HEAD,
    TRAINING,
    VALIDATION,
    Head,
    Shard,
    digest,
    from_npy,
    parse_head,
    table_name,
)
from coatnet.data.shards.storage import LocalStorage, RemoteStorage, Storage, read_whole
from coatnet.data.shards.webdataset import index_foreign, split_of
from coatnet.data.splits import Splits
from coatnet.errors import UserError

WORK = ".packing"  # a folder inside that `coatnet pack` removes when it is finished


def is_shard_folder(folder: Path) -> bool:
    """Whether a folder has an index of shards, or tar files and no folders of classes beside them."""
    if (folder / HEAD).exists() or (folder / WORK).exists():
        return True
    places = [folder]
    found = False
    while places:
        for entry in list(os.scandir(places.pop())):
            found = found or entry.name.endswith(".tar")
            if entry.is_dir() and not entry.name.startswith("."):
                if os.path.dirname(entry.path) != str(folder) or split_of(entry.name) is None:
                    return False
                places.append(Path(entry.path))
    return found


def open_shard_folder(folder: Path, validation_fraction: float) -> Splits:
    """Open shards on this machine. Raises a UserError that names a shard that differs from its index."""
    if (folder / WORK).exists() and not (folder / HEAD).exists():
        raise UserError(f"{folder}: its packing was not finished; the same `coatnet pack` command continues it")
    return _open(LocalStorage(folder), validation_fraction)


def open_remote_shards(url: str, validation_fraction: float) -> Splits:
    """Open shards behind s3://, gs://, http:// or another URL of fsspec, read through a cache on this machine."""
    return _open(RemoteStorage(url.removesuffix(HEAD), default_cache()), validation_fraction)


def _open(files: Storage, validation_fraction: float) -> Splits:
    index_files = files
    data = read_whole(files, HEAD)
    if data is None:
        index_files = index_foreign(files, validation_fraction)
        data = read_whole(index_files, HEAD)
        assert data is not None
    files.version = digest(data)[:16]
    head = parse_head(data, f"{index_files}/{HEAD}")
    training, validation = (_open_split(head, name, files, index_files) for name in (TRAINING, VALIDATION))
    if files.is_local and index_files is files:
        known = {name.decode() for part in (training, validation) for name in part.table["name"].tolist()}
        if unknown := sorted({name for name in files.names() if name.endswith(".tar")} - known):
            raise UserError(f"{files}/{unknown[0]}: not in the index {HEAD}; remove it, or pack the images again")
    return Splits(head.name, training, validation, head.notes)


def _open_split(head: Head, name: str, files: Storage, index_files: Storage) -> ShardDataset:
    split, where = head.splits[name], f"{index_files}/{table_name(name)}"
    data = read_whole(index_files, table_name(name))
    if data is None:
        raise UserError(f"{where}: missing; fetch or pack it again")
    if digest(data) != split.table_sha256:
        raise UserError(f"{where}: does not belong to {HEAD}; its checksum differs")
    table = from_npy(data, Shard._fields, split.num_shards, where)
    if table["num_samples"].sum() != split.num_samples:
        raise UserError(f"{where}: {table['num_samples'].sum():,} samples where {HEAD} says {split.num_samples:,}")
    dataset = ShardDataset(head, split, table, files, index_files)
    dataset.check()
    if index_files.is_local:  # remote ones are checked when they are fetched
        dataset.check_indexes()
    return dataset
