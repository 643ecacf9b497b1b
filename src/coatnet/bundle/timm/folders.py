"""timm's CoAtNets on disk: the folders that timm writes for the hub, and bare files of weights.

Source: the schema that `timm.models.save_for_hf` of timm 1.0.31 writes and `timm.create_model("local-dir:...")` reads.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from coatnet.bundle.imagenet import imagenet_1k, imagenet_classes
from coatnet.bundle.json_validation import Table, read_preprocessing, read_table
from coatnet.bundle.timm.catalog import PRETRAINED, SEEN_AT_224, pretrained_of
from coatnet.bundle.timm.names import counterparts, from_timm, to_timm
from coatnet.bundle.weights import load_pickle, read_header, read_pickled_tensors, read_tensors, write_tensors
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError, nearest
from coatnet.model.network import CoAtNet, create_model
from coatnet.model.timm.config import TIMM_VARIANTS, TimmVariant

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
# What `model_args` of timm may say; anything else would make another network.
_KNOWN_ARGUMENTS = {"img_size", "in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate"}


@dataclass(frozen=True, eq=False)
class TimmModel:
    """A network of timm's with its weights, in evaluation mode, and all that its file says about its use."""

    model: CoAtNet
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def is_timm_folder(folder: Path) -> bool:
    """Whether a folder with a config.json is one that timm wrote."""
    config = read_table(folder / "config.json").values
    return "architecture" in config and "format" not in config


def read_timm_folder(folder: Path, *, allow_pickle: bool = False) -> TimmModel:
    """The network in a folder of timm's hub layout.

    Raises:
        UserError: config.json or the weights are damaged, hostile or not a CoAtNet; the message names the key or the
            tensor. Sizes are compared with the file before memory is taken; pickled weights are refused unless asked
            for.
    """
    config = read_table(folder / "config.json")
    architecture = find_architecture(config.take("architecture", str), config.path)
    seen = config.table("pretrained_cfg")
    arguments = config.table("model_args") if "model_args" in config.values else Table({}, config.path)
    for name in sorted(arguments.values.keys() - _KNOWN_ARGUMENTS):
        raise UserError(f"{config.path}: model_args has {short(name)}, which makes a network that is not in the table")
    if config.values.get("global_pool", "avg") != "avg":
        config.refuse("global_pool", "avg")
    preprocessing = _read_timm_preprocessing(seen)
    num_classes = config.whole("num_classes")
    model = _empty(architecture, num_classes, preprocessing, _table_side(arguments, preprocessing.resolution))
    path = folder / (SAFE if (folder / SAFE).is_file() else PICKLED)
    _fill(model, path, allow_pickle)
    return TimmModel(model.eval(), _class_names(config, num_classes), preprocessing)


def read_timm_file(path: Path, architecture: str, *, allow_pickle: bool = False) -> TimmModel:
    """The network in a bare file of weights, which does not say itself what it is.

    Args:
        architecture: timm's name, such as "coatnet_0_rw_224", or with the tag of its weights behind a point, which
            tells what its images look like.

    Raises:
        UserError: as `read_timm_folder`.
    """
    row = find_architecture(architecture.removeprefix("timm/").partition(".")[0], path)
    known = PRETRAINED.get(architecture.removeprefix("timm/")) or next(iter(pretrained_of(row.name)), None)
    preprocessing = known.preprocessing if known else replace(SEEN_AT_224, resolution=row.resolution)
    shapes = _shapes(path, allow_pickle)
    for name in ("head.fc.weight", "stem.conv1.weight"):
        if len(shapes.get(name, ())) not in (2, 4):
            raise UserError(f"{path}: {name} is missing or no matrix: the file is not timm's {row.name}")
    if shapes["stem.conv1.weight"][1] == 1:
        preprocessing = _in_grey(preprocessing)
    num_classes = shapes["head.fc.weight"][0]
    model = _empty(row, num_classes, preprocessing, preprocessing.resolution)
    _fill(model, path, allow_pickle)
    return TimmModel(model.eval(), imagenet_classes(num_classes) or _numbers(num_classes), preprocessing)


def write_timm_folder(model: CoAtNet, classes: Sequence[str], preprocessing: Preprocessing, folder: Path) -> None:
    """Fill a folder with what `timm.create_model("local-dir:...", pretrained=True)` opens.

    Raises:
        UserError: timm has no such network.
    """
    row = model.variant
    if not isinstance(row, TimmVariant):
        raise UserError(
            f"{row.name} is a row of the paper's, and timm has no such network: format timm is for bundles made from "
            f"timm's architectures, such as {next(iter(TIMM_VARIANTS))}"
        )
    side = preprocessing.resolution
    seen = {
        "input_size": [preprocessing.channels, side, side],
        "fixed_input_size": True,
        "interpolation": preprocessing.interpolation,
        "crop_pct": preprocessing.crop_fraction,
        "crop_mode": preprocessing.crop,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "num_classes": model.num_classes,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
    }
    config: dict[str, Any] = {
        "architecture": row.name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": "avg",
        "label_names": list(classes),
        "model_args": {"img_size": model.resolution},
        "pretrained_cfg": seen,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_tensors(to_timm(model), folder / SAFE)


def find_architecture(name: str, path: Path) -> TimmVariant:
    """The row of that name. Raises UserError with the nearest names if there is none."""
    if name not in TIMM_VARIANTS:
        raise UserError(f"{path}: architecture {short(name)} is no CoAtNet of timm's{nearest(name, TIMM_VARIANTS)}")
    return TIMM_VARIANTS[name]


def _empty(row: TimmVariant, num_classes: int, preprocessing: Preprocessing, side: int) -> CoAtNet:
    with torch.device("meta"):
        return create_model(row, num_classes=num_classes, in_channels=preprocessing.channels, resolution=side)


def _fill(model: CoAtNet, path: Path, allow_pickle: bool) -> None:
    ours = model.state_dict()
    expected = {each.theirs: each.to_theirs(ours[each.ours]) for each in counterparts(model)}
    read = read_pickled_tensors if _is_pickle(path, allow_pickle) else read_tensors
    model.load_state_dict(from_timm(model, read(path, expected)), assign=True)
    model.to(memory_format=torch.channels_last)


def _is_pickle(path: Path, allow_pickle: bool) -> bool:
    if path.suffix == ".safetensors":
        return False
    if not allow_pickle:
        raise UserError(
            f"{path} is a pickle, which can hold more than weights: use a .safetensors, or load it with "
            "allow_pickle=True (tensors only are then read from it)"
        )
    return True


def _shapes(path: Path, allow_pickle: bool) -> dict[str, Sequence[int]]:
    if _is_pickle(path, allow_pickle):
        return {name: tuple(tensor.shape) for name, tensor in load_pickle(path).items()}
    return {name: row["shape"] for name, row in read_header(path).items()}


def _read_timm_preprocessing(seen: Table) -> Preprocessing:
    """timm leaves the crop mode out where it is the usual one, and keeps three means for grey images."""
    values = {"crop_mode": "center", **seen.values}
    size = seen.items("input_size", int)
    if size[:1] == (1,) and len(seen.items("mean", float)) == 3:
        grey = _in_grey(Preprocessing(mean=seen.items("mean", float), std=seen.items("std", float)))
        values |= {"mean": list(grey.mean), "std": list(grey.std)}
    return read_preprocessing(Table(values, seen.path))


def _table_side(arguments: Table, resolution: int) -> int:
    """Side of the images that the relative biases are made for: `img_size`, a number or two that are the same."""
    size = arguments.values.get("img_size", resolution)
    sides = size if isinstance(size, list) else [size]
    if len(set(map(str, sides))) != 1 or not isinstance(sides[0], int) or not 32 <= sides[0] <= 8192:
        arguments.refuse("img_size", "one side of a square from 32 to 8192 pixels")
    return sides[0]


def _in_grey(preprocessing: Preprocessing) -> Preprocessing:
    mean, std = (sum(values) / len(values) for values in (preprocessing.mean, preprocessing.std))
    return replace(preprocessing, mean=(mean,), std=(std,))


def _class_names(config: Table, num_classes: int) -> tuple[str, ...]:
    """As the file names them; ImageNet in words; numbers if nothing is known."""
    names = config.values.get("label_names") or config.table("pretrained_cfg").values.get("label_names")
    if names is None:
        return imagenet_classes(num_classes) or _numbers(num_classes)
    if isinstance(names, dict) and sorted(names) == sorted(map(str, range(num_classes))):
        names = [names[str(index)] for index in range(num_classes)]
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise UserError(f"{config.path}: label_names is not a list of {num_classes:,} names")
    if len(set(names)) != num_classes:
        raise UserError(f"{config.path}: label_names names a class twice; every output needs a name of its own")
    words = dict(imagenet_1k())
    return tuple(words[name] for name in names) if words.keys() == set(names) else tuple(names)


def _numbers(num_classes: int) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(num_classes))
