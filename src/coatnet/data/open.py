"""Open a data set by name, path or URL."""

from dataclasses import replace
from pathlib import Path

from coatnet.data.builtin import (
    is_idx_folder,
    open_digits,
    open_fashion_mnist,
    open_fashion_mnist_small,
    open_idx_folder,
)
from coatnet.data.channels import find_scale
from coatnet.data.folder import MANIFEST_SUFFIXES, open_folder
from coatnet.data.hugging_face import SCHEME, is_saved_folder, open_hugging_face
from coatnet.data.manifest import open_manifest
from coatnet.data.shards.dataset import is_shard_folder, open_remote_shards, open_shard_folder
from coatnet.data.splits import SplitRule, Splits, divide
from coatnet.errors import UserError, nearest
from coatnet.system.credentials import conceal
from coatnet.system.files import absolute_path_or_name, user_path
from coatnet.system.terminal import report_wait

NAMES = ("digits", "fashion-mnist", "fashion-mnist-small")


def data_path(data: str) -> str:
    """The full path of a folder or file of images; the name of a data set or a URL as it is."""
    return data if data in NAMES else absolute_path_or_name(data)


def open_dataset(
    source: str | Path,
    *,
    validation_fraction: float = SplitRule.validation_fraction,
    rule: SplitRule | None = None,
    evaluation: bool = False,
    multilabel: bool = False,
) -> Splits:
    """Open the training and validation images of a source.

    Args:
        source: one of

            - `digits`, `fashion-mnist` or `fashion-mnist-small`;
            - a folder with one subfolder per class, or with `train` and `val` folders that have them;
            - a `.csv`, `.tsv` or `.parquet` manifest with the columns path, label and optionally split;
            - a folder of tar shards that `coatnet pack` or a WebDataset tool wrote, or the URL of one;
            - `hf://owner/name`, or a folder that Hugging Face `datasets` saved;
            - a folder of IDX files as MNIST has them.
        validation_fraction: the fraction of the images to hold out, above 0 and below 1, if the source does not say
            which ones. Which images these are depends on their names alone, so new images move no old ones.
        rule: as of a recipe, in place of the fraction: also folds, a test split, and what stays together.
        evaluation: nothing is trained on the images, so one class, one image a class or a test split alone are enough.
        multilabel: images of a manifest may have no label, even if none has several.

    Returns:
        Two datasets with the same classes; `print(splits)` summarizes them.

    Raises:
        UserError: there is no such source, or it cannot be used; the message says what to change.
    """
    rule = rule or SplitRule(validation_fraction)
    rule.check()
    splits = divide(_open(source, rule.validation_fraction, evaluation, multilabel), rule, evaluation=evaluation)
    if str(source) in NAMES and Path(source).exists():
        note = f"{source} is the data set of that name; what lies here is ./{source}"
        splits = replace(splits, notes=(*splits.notes, note))
    if "://" in str(source):  # no image is fetched to open a data set
        return splits
    return splits.with_scale(find_scale(splits.training if len(splits.training) else splits.validation))


@report_wait("reading what images there are")
def _open(source: str | Path, validation_fraction: float, evaluation: bool, multilabel: bool) -> Splits:
    if source == "":  # as a path it would be the current folder
        raise UserError(
            f"no data is given: give a folder, a .csv, .tsv or .parquet file, a URL, or one of {', '.join(NAMES)}"
        )
    source = conceal(str(source))
    match source:
        case "fashion-mnist":
            return open_fashion_mnist()
        case "fashion-mnist-small":
            return open_fashion_mnist_small()
        case "digits":
            return open_digits(validation_fraction)

    if source.startswith(SCHEME):
        return open_hugging_face(source, validation_fraction, evaluation=evaluation)
    if "://" in source:
        return open_remote_shards(source, validation_fraction, evaluation=evaluation)
    path = user_path(source)
    if not path.exists():
        raise UserError(
            f"no dataset at {source!r}{nearest(source, NAMES)}: "
            f"give a folder, a .csv, .tsv or .parquet file, a URL, or one of {', '.join(NAMES)}"
        )
    if path.is_dir():
        path = path.resolve()
        if is_idx_folder(path):
            return open_idx_folder(path, evaluation=evaluation)
        if is_saved_folder(path):
            return open_hugging_face(str(path), validation_fraction, evaluation=evaluation)
        if is_shard_folder(path):
            return open_shard_folder(path, validation_fraction, evaluation=evaluation)
        return open_folder(path, validation_fraction, evaluation=evaluation)
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return open_manifest(path, validation_fraction, evaluation=evaluation, multilabel=multilabel)
    raise UserError(f"{path} is neither a folder nor a .csv, .tsv or .parquet file; a single image is not a dataset")
