"""The door: a name, a folder or a manifest becomes training and validation images."""

from pathlib import Path

from coatnet.data.builtin import (
    FASHION_CLASSES,
    is_idx_folder,
    open_digits,
    open_fashion_mnist,
    open_fashion_mnist_small,
    open_idx_folder,
)
from coatnet.data.folder import open_folder
from coatnet.data.hugging_face import SCHEME, is_saved_folder, open_hugging_face
from coatnet.data.manifest import MANIFEST_SUFFIXES, open_manifest
from coatnet.data.shards.open import is_shard_folder, open_remote_shards, open_shard_folder
from coatnet.data.splits import Splits
from coatnet.errors import UserError, nearest

NAMES = ("digits", "fashion-mnist", "fashion-mnist-small")


def open_dataset(source: str | Path, *, validation_fraction: float = 0.1) -> Splits:
    """Recognise a named set, a folder (of images, tar shards, IDX files, or one that Hugging Face `datasets` saved),
    a CSV, TSV or Parquet manifest, the URL of a folder of shards, or `hf://` and the name of a dataset.

    `validation_fraction` is held out where the source does not say what to hold out.

    Raises `UserError` if there is no such source, or it is not what it should be.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction must be between 0 and 1, got {validation_fraction!r}")
    if source == "":  # as a path it would be the current folder
        raise UserError(
            f"no data is given: give a folder, a .csv, .tsv or .parquet file, a URL, or one of {', '.join(NAMES)}"
        )
    match str(source):
        case "fashion-mnist":
            return open_fashion_mnist()
        case "fashion-mnist-small":
            return open_fashion_mnist_small()
        case "digits":
            return open_digits(validation_fraction)

    if str(source).startswith(SCHEME):
        return open_hugging_face(str(source), validation_fraction)
    if "://" in str(source):
        return open_remote_shards(str(source), validation_fraction)
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            f"no dataset at {str(source)!r}{nearest(str(source), NAMES)}: "
            f"give a folder, a .csv, .tsv or .parquet file, a URL, or one of {', '.join(NAMES)}"
        )
    if path.is_dir():
        path = path.resolve()
        if is_idx_folder(path):
            return open_idx_folder(path, path.name, FASHION_CLASSES if "fashion" in path.name.lower() else None)
        if is_saved_folder(path):
            return open_hugging_face(str(path), validation_fraction)
        if is_shard_folder(path):
            return open_shard_folder(path, validation_fraction)
        return open_folder(path, validation_fraction)
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return open_manifest(path, validation_fraction)
    raise UserError(f"{path} is neither a folder nor a .csv, .tsv or .parquet file; one image alone is no dataset")
