"""config.json: what a bundle says about itself, read as if by a stranger.

The schema is a superset of the one that timm publishes on the Hugging Face hub (save_config_for_hf).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from coatnet.bundle.json_validation import read_preprocessing, read_table
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError
from coatnet.model.network import CoAtNet, create_model

FORMAT = 1
_KEYS = {"format", "architecture", "num_classes", "num_features", "model_args", "multilabel"}
_KEYS |= {"pretrained_cfg", "record"}
_MOST_STAGES = 16


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
    config = read_table(path)
    unknown = sorted(config.values.keys() - _KEYS)
    if unknown:
        raise UserError(f"{path}: unknown key {short(unknown[0])}; a bundle has {', '.join(sorted(_KEYS))}")
    if config.take("format", int) != FORMAT:
        raise UserError(
            f"{path}: format {config.values['format']}; this coatnet reads format {FORMAT}, try a newer one"
        )

    num_classes = config.whole("num_classes")
    model_args = config.table("model_args")
    variant = model_args.table("variant")
    if "stages" in variant.values and len(variant.take("stages", list)) > _MOST_STAGES:
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

    seen = config.table("pretrained_cfg")
    classes = seen.items("label_names", str)
    if len(classes) != num_classes:
        raise UserError(f"{path}: label_names has {len(classes)} names for num_classes {num_classes}")
    preprocessing = read_preprocessing(seen)
    record = config.take("record", dict)
    return Config(path, arguments, classes, preprocessing, config.take("multilabel", bool), record)
