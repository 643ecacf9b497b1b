"""config.json: what a bundle says about itself, read as if by a stranger.

The schema is a superset of the one that timm publishes on the Hugging Face hub (save_config_for_hf).
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
from coatnet.model.coatnet import CoAtNet, create_model

FORMAT = 1
_KEYS = {"format", "architecture", "num_classes", "num_features", "model_args", "multilabel"}
_KEYS |= {"pretrained_cfg", "record"}
# Far above anything sensible and far below what hurts: a stranger's numbers are checked before they are used.
_LIMITS = {"num_classes": 1_000_000, "in_channels": 1_024, "resolution": 16_384}
_MOST_STAGES = 16
_LONGEST_FILE = 64_000_000


@dataclass(frozen=True)
class Config:
    """The checked contents of a config.json."""

    path: Path
    model_args: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    multilabel: bool
    record: dict[str, Any]

    def build_model(self) -> CoAtNet:
        """The network without weights, on the meta device: no memory is taken yet."""
        try:
            with torch.device("meta"):
                return create_model(**self.model_args)
        except UserError as error:
            raise UserError(f"{self.path}: model_args: {error}") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.path}: model_args describe no network: {reason}") from None


def describe(
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
    """JSON with a key a line and a list of numbers a line; NaN and infinity are refused."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    # A line break right behind a bracket is never inside a string: there it would be escaped.
    return re.sub(r'\[\n[^\[\]{}"]*\]', lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def read_config(path: Path) -> Config:
    """The checked contents of the file.

    Raises:
        UserError: a key is missing, unknown, of the wrong type or out of bounds; the message names it.
    """
    if path.stat().st_size > _LONGEST_FILE:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes; a config.json has at most {_LONGEST_FILE:,}")
    try:
        raw = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    config = _Table(raw, path)
    unknown = sorted(config.values.keys() - _KEYS)
    if unknown:
        raise UserError(f"{path}: unknown key {short(unknown[0])}; a bundle has {', '.join(sorted(_KEYS))}")
    if config.take("format", int) != FORMAT:
        raise UserError(
            f"{path}: format {config.values['format']}; this coatnet reads format {FORMAT}, try a newer one"
        )

    num_classes = config.whole("num_classes")
    model_args = _Table(config.take("model_args", dict), path)
    variant = _Table(model_args.take("variant", dict), path)
    if len(variant.take("stages", list)) > _MOST_STAGES:
        raise UserError(f"{path}: stages: {len(variant.values['stages'])}; a network has at most {_MOST_STAGES}")
    if variant.take("name", str) != config.take("architecture", str):
        raise UserError(f"{path}: architecture {config.values['architecture']!r} is not the model_args' variant")
    arguments = {
        "variant": variant.values,
        "num_classes": num_classes,
        "in_channels": model_args.whole("in_channels"),
        "resolution": model_args.whole("resolution"),
    }
    for name in sorted(model_args.values.keys() - arguments.keys()):
        raise UserError(f"{path}: unknown key {short(name)} in model_args; it has {', '.join(sorted(arguments))}")

    seen = _Table(config.take("pretrained_cfg", dict), path)
    classes = seen.items("label_names", str)
    if len(classes) != num_classes:
        raise UserError(f"{path}: label_names has {len(classes)} names for num_classes {num_classes}")
    preprocessing = _read_preprocessing(seen)
    record = config.take("record", dict)
    return Config(path, arguments, classes, preprocessing, config.take("multilabel", bool), record)


def _read_preprocessing(seen: "_Table") -> Preprocessing:
    size = seen.items("input_size", int)
    try:
        preprocessing = Preprocessing(
            resolution=size[-1] if size else 0,
            crop=seen.take("crop_mode", str),
            crop_fraction=seen.take("crop_pct", float),
            interpolation=seen.take("interpolation", str),
            mean=seen.items("mean", float),
            std=seen.items("std", float),
        )
    except UserError as error:
        raise UserError(f"{seen.path}: pretrained_cfg: {error}") from None
    if size != (preprocessing.channels, preprocessing.resolution, preprocessing.resolution):
        seen.refuse("input_size", f"[{preprocessing.channels} (as many as mean), side, side]")
    return preprocessing


class _Table:
    """A JSON object whose values are asked for by key and type."""

    def __init__(self, values: Any, path: Path) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{path}: not a JSON object but {short(values)}")
        self.values: dict[str, Any] = values
        self.path = path

    def refuse(self, key: str, right: str) -> None:
        raise UserError(f"{self.path}: {key} is {short(self.values[key])}; it must be {right}")

    def take(self, key: str, kind: type) -> Any:
        if key not in self.values:
            raise UserError(f"{self.path}: {key} is missing")
        if not _is(self.values[key], kind):
            self.refuse(key, f"of type {kind.__name__}")
        return self.values[key]

    def whole(self, key: str) -> int:
        if not 1 <= self.take(key, int) <= _LIMITS[key]:
            self.refuse(key, f"from 1 to {_LIMITS[key]:,}")
        return self.values[key]

    def items(self, key: str, kind: type) -> tuple[Any, ...]:
        if not all(_is(item, kind) for item in self.take(key, list)):
            self.refuse(key, f"a list of type {kind.__name__}")
        return tuple(kind(item) for item in self.values[key])


def _is(value: Any, kind: type) -> bool:
    """JSON's idea of a type: a bool is no number, a whole number is a float too, NaN and infinity are not."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
