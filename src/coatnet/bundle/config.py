"""config.json: what a bundle says about itself, validated as untrusted input.

The schema extends the one that timm writes for the Hugging Face hub (`save_config_for_hf`).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError
from coatnet.model.network import CoAtNet, create_model

FORMAT = 1
_KEYS = {"format", "architecture", "num_classes", "num_features", "model_args", "multilabel"}
_KEYS |= {"pretrained_cfg", "record"}
# Bounds for untrusted files: far above what is sensible, far below what exhausts memory.
_MAX_VALUES = {"num_classes": 1_000_000, "in_channels": 1_024, "resolution": 16_384}
_MAX_STAGES = 16
_MAX_FILE_BYTES = 64_000_000


class JsonObject:
    """A JSON object whose values are read by key and checked for their type and bounds.

    Raises:
        UserError: from every method, if a value is missing or not as asked; the message names file and key.
    """

    def __init__(self, values: Any, path: Path) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{path}: not a JSON object but {short(values)}")
        self.values: dict[str, Any] = values
        self.path = path

    @classmethod
    def read(cls, path: Path) -> "JsonObject":
        """Read the JSON object in a file."""
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise UserError(f"{path}: {size:,} bytes; a config.json has at most {_MAX_FILE_BYTES:,}")
        try:
            values = json.loads(path.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON: {error}") from None
        return cls(values, path)

    def refuse(self, key: str, expected: str) -> None:
        """Raise UserError for the value of a key."""
        raise UserError(f"{self.path}: {key} is {short(self.values[key])}; it must be {expected}")

    def get(self, key: str, kind: type) -> Any:
        """The value of a key, of the type `kind`."""
        if key not in self.values:
            raise UserError(f"{self.path}: {key} is missing")
        if not _is_a(self.values[key], kind):
            self.refuse(key, f"of type {kind.__name__}")
        return self.values[key]

    def get_object(self, key: str) -> "JsonObject":
        """The JSON object of a key."""
        return JsonObject(self.get(key, dict), self.path)

    def get_count(self, key: str) -> int:
        """The whole number of a key, from 1 to the bound of that key."""
        if not 1 <= self.get(key, int) <= _MAX_VALUES[key]:
            self.refuse(key, f"from 1 to {_MAX_VALUES[key]:,}")
        return self.values[key]

    def get_list(self, key: str, kind: type) -> tuple[Any, ...]:
        """The items of the list of a key, all of the type `kind`."""
        if not all(_is_a(item, kind) for item in self.get(key, list)):
            self.refuse(key, f"a list of type {kind.__name__}")
        return tuple(kind(item) for item in self.values[key])


def _is_a(value: Any, kind: type) -> bool:
    """Return whether a JSON value has a type: bools are not numbers, integers are floats, NaN and infinity are not."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


@dataclass(frozen=True)
class Config:
    """The validated contents of a config.json."""

    path: Path
    model_args: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    multilabel: bool
    record: dict[str, Any]

    def build_model(self) -> CoAtNet:
        """Create the network on the meta device, without memory for its weights."""
        try:
            with torch.device("meta"):
                return create_model(**self.model_args)
        except UserError as error:
            raise UserError(f"{self.path}: model_args: {error}") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.path}: model_args describe no network: {reason}") from None


def config_json(
    model: CoAtNet,
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    multilabel: bool,
    record: Mapping[str, Any],
) -> str:
    """The text of a config.json."""
    config = {
        "format": FORMAT,
        "architecture": model.variant.name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {name: value for name, value in model.config().items() if name != "num_classes"},
        "multilabel": multilabel,
        "pretrained_cfg": {
            "input_size": [preprocessing.channels, preprocessing.resolution, preprocessing.resolution],
            "crop_pct": preprocessing.crop_fraction,
            "crop_mode": preprocessing.crop,
            "interpolation": preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": model.num_classes,
            "label_names": list(classes),
        },
        "record": dict(record),
    }
    return readable_json(config)


def readable_json(values: Mapping[str, Any]) -> str:
    """Format as JSON with one key per line and lists of numbers on one line. Raises ValueError for NaN and infinity."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    # A line break directly after a bracket is never inside a string, where it would be escaped.
    return re.sub(r'\[\n[^\[\]{}"]*\]', lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def read_config(path: Path) -> Config:
    """Read and validate a config.json.

    Raises:
        UserError: a key is missing, unknown, of the wrong type or out of bounds; the message names it.
    """
    config = JsonObject.read(path)
    unknown = sorted(config.values.keys() - _KEYS)
    if unknown:
        raise UserError(f"{path}: unknown key {short(unknown[0])}; a bundle has {', '.join(sorted(_KEYS))}")
    if config.get("format", int) != FORMAT:
        raise UserError(
            f"{path}: format {config.values['format']}; this coatnet reads format {FORMAT}, try a newer one"
        )

    num_classes = config.get_count("num_classes")
    model_args = config.get_object("model_args")
    variant = model_args.get_object("variant")
    if "stages" in variant.values and len(variant.get("stages", list)) > _MAX_STAGES:
        raise UserError(f"{path}: stages: {len(variant.values['stages'])}; a network has at most {_MAX_STAGES}")
    if variant.get("name", str) != config.get("architecture", str):
        raise UserError(f"{path}: architecture {config.values['architecture']!r} is not the variant of model_args")
    arguments = {
        "variant": variant.values,
        "num_classes": num_classes,
        "in_channels": model_args.get_count("in_channels"),
        "resolution": model_args.get_count("resolution"),
    }
    for name in sorted(model_args.values.keys() - arguments.keys()):
        raise UserError(f"{path}: unknown key {short(name)} in model_args; it has {', '.join(sorted(arguments))}")

    pretrained_cfg = config.get_object("pretrained_cfg")
    classes = pretrained_cfg.get_list("label_names", str)
    if len(classes) != num_classes:
        raise UserError(f"{path}: label_names has {len(classes)} names for num_classes {num_classes}")
    preprocessing = read_preprocessing(pretrained_cfg)
    return Config(path, arguments, classes, preprocessing, config.get("multilabel", bool), config.get("record", dict))


def read_preprocessing(pretrained_cfg: JsonObject) -> Preprocessing:
    """Read the preprocessing from a "pretrained_cfg". Raises UserError if a value is wrong."""
    size = pretrained_cfg.get_list("input_size", int)
    try:
        preprocessing = Preprocessing(
            resolution=size[-1] if size else 0,
            crop=pretrained_cfg.get("crop_mode", str),
            crop_fraction=pretrained_cfg.get("crop_pct", float),
            interpolation=pretrained_cfg.get("interpolation", str),
            mean=pretrained_cfg.get_list("mean", float),
            std=pretrained_cfg.get_list("std", float),
        )
    except UserError as error:
        raise UserError(f"{pretrained_cfg.path}: pretrained_cfg: {error}") from None
    if size != (preprocessing.channels, preprocessing.resolution, preprocessing.resolution):
        pretrained_cfg.refuse("input_size", f"[{preprocessing.channels} (as many as mean), side, side]")
    return preprocessing
