"""Read and write timm's CoAtNets: folders in the layout of the hub, and files of weights.

Source: the schema that `timm.models.save_for_hf` of timm 1.0.31 writes and `timm.create_model("local-dir:...")` reads.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

import torch
from pydantic import BaseModel

from coatnet.bundle.config import (
    NumClasses,
    PreprocessingCfg,
    read_preprocessing,
    require_memory,
)
from coatnet.bundle.hub import CONFIG, PICKLE, WEIGHTS
from coatnet.bundle.timm.catalog import PREPROCESSING_224, PRETRAINED, imagenet_1k, imagenet_classes, pretrained_of
from coatnet.bundle.timm.names import counterparts, from_timm, to_timm
from coatnet.bundle.weights import load_pickle, read_pickled_tensors, read_shapes, read_tensors, write_tensors
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError, nearest
from coatnet.model.network import CoAtNet, create_model
from coatnet.model.timm.config import TIMM_VARIANTS, TimmVariant
from coatnet.system.json_reader import read_json_object, validate

# Keys of timm's `model_args` that keep the architecture; any other would change it.
_KNOWN_ARGUMENTS = {"img_size", "in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate"}


class TimmPretrainedCfg(PreprocessingCfg):
    """The "pretrained_cfg" of timm."""

    crop_mode: Literal["center", "squash"] = "center"
    label_names: Any = None


class TimmJson(BaseModel, strict=True, protected_namespaces=()):
    """The contents of a config.json that timm wrote; other keys are ignored."""

    architecture: str
    num_classes: NumClasses
    pretrained_cfg: TimmPretrainedCfg
    model_args: dict[str, Any] = {}
    global_pool: Literal["avg"] = "avg"
    label_names: Any = None


@dataclass(frozen=True, eq=False)
class TimmModel:
    """A network of timm's with its weights, in evaluation mode, with its class names and preprocessing."""

    model: CoAtNet
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def is_timm_folder(folder: Path) -> bool:
    """Return whether a folder with a config.json is one that timm wrote."""
    config = read_json_object(folder / CONFIG)
    return "architecture" in config and "format" not in config


def read_timm_folder(folder: Path, *, allow_pickle: bool = False) -> TimmModel:
    """Read the network in a folder that timm wrote for the hub.

    Raises:
        UserError: config.json or the weights are damaged or not those of a CoAtNet, or the weights are a pickle and
            `allow_pickle` is False; the message names the key or the tensor.
    """
    path = folder / CONFIG
    config = validate(TimmJson, read_json_object(path), path)
    variant = find_architecture(config.architecture, path)
    for name in sorted(config.model_args.keys() - _KNOWN_ARGUMENTS):
        raise UserError(
            f"{path}: model_args has {short(name)}, which changes the architecture; coatnet has no such network"
        )
    preprocessing = _read_timm_preprocessing(config.pretrained_cfg, path)
    side = _table_side(config.model_args.get("img_size", preprocessing.side), path)
    model = _create_on_meta(variant, config.num_classes, preprocessing, side)
    _load_weights(model, folder / (WEIGHTS if (folder / WEIGHTS).is_file() else PICKLE), allow_pickle)
    require_memory(model, preprocessing, path)
    return TimmModel(model.eval(), _class_names(config, path), preprocessing)


def read_timm_file(path: Path, architecture: str, *, allow_pickle: bool = False) -> TimmModel:
    """Read a network from a file of weights alone.

    Args:
        architecture: timm's name, such as "coatnet_0_rw_224"; with the tag of its weights after a period, such as
            "coatnet_0_rw_224.sw_in1k", it also selects the preprocessing.

    Raises:
        UserError: as `read_timm_folder`.
    """
    variant = find_architecture(architecture.removeprefix("timm/").partition(".")[0], path)
    known = PRETRAINED.get(architecture.removeprefix("timm/")) or next(iter(pretrained_of(variant.name)), None)
    preprocessing = known.preprocessing if known else replace(PREPROCESSING_224, resolution=variant.resolution)
    shapes = _read_shapes(path, allow_pickle)
    for name in ("head.fc.weight", "stem.conv1.weight"):
        if len(shapes.get(name, ())) not in (2, 4):
            raise UserError(f"{path}: {name} is missing or no matrix: the file is not timm's {variant.name}")
    if shapes["stem.conv1.weight"][1] == 1:
        preprocessing = _to_grayscale(preprocessing)
    num_classes = shapes["head.fc.weight"][0]
    model = _create_on_meta(variant, num_classes, preprocessing, preprocessing.side)
    _load_weights(model, path, allow_pickle)
    return TimmModel(model.eval(), imagenet_classes(num_classes) or _numbered_classes(num_classes), preprocessing)


def write_timm_folder(model: CoAtNet, classes: Sequence[str], preprocessing: Preprocessing, folder: Path) -> None:
    """Write the files that `timm.create_model("local-dir:...", pretrained=True)` opens into a folder.

    Raises:
        UserError: the network is not one of timm's, or its input is not a square 8-bit image.
    """
    variant = model.variant
    if not isinstance(variant, TimmVariant):
        raise UserError(
            f"{variant.name} is a variant of the paper, and timm has no such network: format timm is for models of "
            f"timm's architectures, such as {next(iter(TIMM_VARIANTS))}"
        )
    if preprocessing.value_range is not None:
        raise UserError("timm reads 8-bit images, and this model takes other values: take another format")
    height, width = preprocessing.size
    if height != width:
        raise UserError(
            f"timm's CoAtNets see square images, and this model sees {preprocessing.shown_size}: take another format"
        )
    pretrained_cfg = {
        "input_size": [preprocessing.channels, *preprocessing.size],
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
        "architecture": variant.name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": "avg",
        "label_names": list(classes),
        "model_args": {"img_size": model.resolution},
        "pretrained_cfg": pretrained_cfg,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_tensors(to_timm(model), folder / WEIGHTS)


def find_architecture(name: str, path: Path) -> TimmVariant:
    """Return timm's variant of this name. Raises UserError with the nearest name if there is none."""
    if name not in TIMM_VARIANTS:
        raise UserError(f"{path}: architecture {short(name)} is not a CoAtNet of timm{nearest(name, TIMM_VARIANTS)}")
    return TIMM_VARIANTS[name]


def _create_on_meta(variant: TimmVariant, num_classes: int, preprocessing: Preprocessing, side: int) -> CoAtNet:
    with torch.device("meta"):
        return create_model(variant, num_classes=num_classes, in_channels=preprocessing.channels, resolution=side)


def _load_weights(model: CoAtNet, path: Path, allow_pickle: bool) -> None:
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
            f"{path} is a pickle, which can hold more than weights: use a .safetensors file, or load it with "
            "allow_pickle=True (only tensors are read then)"
        )
    return True


def _read_shapes(path: Path, allow_pickle: bool) -> dict[str, Sequence[int]]:
    if _is_pickle(path, allow_pickle):
        return {name: tuple(tensor.shape) for name, tensor in load_pickle(path).items()}
    return read_shapes(path)


def _read_timm_preprocessing(seen: TimmPretrainedCfg, path: Path) -> Preprocessing:
    """Read timm's "pretrained_cfg", which has three means for grayscale images too."""
    if seen.input_size[:1] == [1] and len(seen.mean) == 3:
        mean, std = (sum(values) / max(1, len(values)) for values in (seen.mean, seen.std))
        seen = seen.model_copy(update={"mean": [mean], "std": [std]})
    return read_preprocessing(seen, path)


def _table_side(img_size: Any, path: Path) -> int:
    """Side of the images that the relative bias tables belong to: a number, or two equal ones."""
    sides = img_size if isinstance(img_size, list) else [img_size]
    if len(set(map(str, sides))) != 1 or not isinstance(sides[0], int) or not 32 <= sides[0] <= 8192:
        raise UserError(
            f"{path}: img_size is {short(img_size)}; it must be one side of a square from 32 to 8192 pixels"
        )
    return sides[0]


def _to_grayscale(preprocessing: Preprocessing) -> Preprocessing:
    mean, std = (sum(values) / len(values) for values in (preprocessing.mean, preprocessing.std))
    return replace(preprocessing, mean=(mean,), std=(std,))


def _class_names(config: TimmJson, path: Path) -> tuple[str, ...]:
    """Class names: those of the file, ImageNet's synsets as words, or numbers if there are none."""
    names, num_classes = config.label_names or config.pretrained_cfg.label_names, config.num_classes
    if names is None:
        return imagenet_classes(num_classes) or _numbered_classes(num_classes)
    if isinstance(names, dict) and sorted(names) == sorted(map(str, range(num_classes))):
        names = [names[str(index)] for index in range(num_classes)]
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: label_names is not a list of {num_classes:,} names")
    if len(set(names)) != num_classes:
        raise UserError(f"{path}: label_names names a class twice; every output needs a name of its own")
    words = dict(imagenet_1k())
    return tuple(words[name] for name in names) if words.keys() == set(names) else tuple(names)


def _numbered_classes(num_classes: int) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(num_classes))
