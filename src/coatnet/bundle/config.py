"""config.json: what a bundle says about itself, validated as untrusted input.

The schema extends the one that timm writes for the Hugging Face hub (`save_config_for_hf`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, FailFast, Field, FiniteFloat

from coatnet.data.decode import MAX_CHANNELS
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError, first_line
from coatnet.model.complexity import inference_bytes
from coatnet.model.network import CoAtNet, create_model
from coatnet.system.json_reader import Texts, read_json_object, validate

FORMAT = 1
_MAX_STAGES, _MAX_BLOCKS = 16, 256  # CoAtNet-7 has 58 blocks
MAX_INFERENCE_BYTES = 16 << 30  # of one image; CoAtNet-7 at 512 pixels takes 3 GiB

# Bounds for untrusted files: far above what is sensible, far below what exhausts memory.
NumClasses = Annotated[int, Field(ge=1, le=1_000_000)]
NumChannels = Annotated[int, Field(ge=1, le=1_024)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]


class ModelArgs(BaseModel, strict=True, extra="forbid"):
    """The arguments of `create_model`; the fields of the variant are checked by `Variant`."""

    variant: dict[str, Any]
    in_channels: NumChannels
    resolution: Pixels


class PreprocessingCfg(BaseModel, strict=True):
    """Preprocessing under timm's names; other keys of its "pretrained_cfg" are ignored."""

    input_size: Annotated[list[int], Field(max_length=3)]
    crop_pct: FiniteFloat
    crop_mode: Literal["center", "squash"]
    interpolation: Literal["bilinear", "bicubic"]
    mean: Annotated[list[FiniteFloat], Field(max_length=MAX_CHANNELS)]
    std: Annotated[list[FiniteFloat], Field(max_length=MAX_CHANNELS)]
    value_range: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None = None
    channel_names: Annotated[list[str], Field(max_length=MAX_CHANNELS)] = []


class PretrainedCfg(PreprocessingCfg):
    """Preprocessing and class names."""

    label_names: Texts


class ReportJson(BaseModel, strict=True, extra="allow"):
    """What the card shows of a report; the rest is for people."""

    headline: str = ""
    data: str = ""
    split: str = ""
    figures: dict[str, FiniteFloat] = {}
    intervals: dict[str, Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None] = {}


class RecipeJson(BaseModel, strict=True, extra="allow"):
    """What evaluation takes from a recipe: how the data was split."""

    validation_fraction: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.1
    test_fraction: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.0
    fold: str = ""
    kept_together: Annotated[list[Texts], FailFast()] = []


class ProbeJson(RecipeJson):
    """How a linear probe was fitted: what the card shows, and how the data was split."""

    model: str = ""
    data: str = ""
    num_training: int = 0
    l2: FiniteFloat = 0.0


class SoupJson(BaseModel, strict=True, extra="allow"):
    """What the card shows of an average of models."""

    summary: str = ""


class AddedJson(BaseModel, strict=True, extra="allow"):
    """Classes that were added to a model, and the images that they were learned from."""

    data: str = ""
    added: Texts = []


class ExtensionJson(AddedJson):
    """What the card and the evaluation take from the record of classes that were added, the last and all before."""

    earlier: Annotated[list[AddedJson], FailFast()] = []


class TrainingJson(BaseModel, strict=True, extra="allow"):
    """What a report shows of how a model came about."""

    epochs: FiniteFloat = 0.0
    steps: int = 0
    minutes: FiniteFloat = 0.0
    images: int = 0
    hardware: str = "unknown hardware"
    software: str = ""


class RecordJson(BaseModel, strict=True, extra="allow"):
    """The record of a training, for people; the few values that code reads are checked."""

    report: ReportJson | None = None
    recipe: RecipeJson | None = None
    training: TrainingJson | None = None
    probe: ProbeJson | None = None
    soup: SoupJson | None = None
    extension: ExtensionJson | None = None
    classes_before: Texts = []


class BundleJson(BaseModel, strict=True, extra="forbid", protected_namespaces=()):
    """The contents of a bundle's config.json."""

    format: int
    architecture: str
    num_classes: NumClasses
    num_features: Any = None
    model_args: ModelArgs
    multilabel: bool
    pretrained_cfg: PretrainedCfg
    record: RecordJson


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
            raise UserError(f"{self.path}: model_args describe no network: {first_line(error)}") from None


def require_memory(model: CoAtNet, preprocessing: Preprocessing, where: object) -> None:
    """Raise UserError if one image of the preprocessing's size would take the network more than 16 GiB."""
    if (needed := inference_bytes(model.variant, preprocessing.side)) > MAX_INFERENCE_BYTES:
        raise UserError(
            f"{where}: at {preprocessing.shown_size} pixels one image takes this network about {needed / 2**30:,.0f} "
            f"GiB; models of more than {MAX_INFERENCE_BYTES >> 30} GiB are not loaded, give a smaller resolution"
        )


def provenance(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the training, which stays true of a model whose classes or weights were changed since."""
    return {name: record[name] for name in ("recipe", "probe", "classes_before") if name in record}


def extensions(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each time that classes were added to a model, first to last: `data` that they were learned from, and `added`."""
    last = record.get("extension") or {}
    return [
        {"data": each.get("data", ""), "added": list(each["added"])}
        for each in (*last.get("earlier", []), last)
        if each.get("added")
    ]


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
            "input_size": [preprocessing.channels, *preprocessing.size],
            "crop_pct": preprocessing.crop_fraction,
            "crop_mode": preprocessing.crop,
            "interpolation": preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            **({} if preprocessing.value_range is None else {"value_range": list(preprocessing.value_range)}),
            **({"channel_names": list(preprocessing.channel_names)} if preprocessing.channel_names else {}),
            "num_classes": model.num_classes,
            "label_names": list(classes),
        },
        "record": dict(record),
    }
    try:
        return readable_json(config)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the record holds what JSON cannot: {first_line(error)}") from None


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
    values = read_json_object(path)
    if (format := values.get("format", FORMAT)) != FORMAT:
        raise UserError(f"{path}: format {short(format)}; this coatnet reads format {FORMAT}, try a newer one")
    config = validate(BundleJson, values, path)
    variant, classes = config.model_args.variant, tuple(config.pretrained_cfg.label_names)
    if isinstance(stages := variant.get("stages"), list):
        if len(stages) > _MAX_STAGES:
            raise UserError(f"{path}: stages: {len(stages)}; a network has at most {_MAX_STAGES}")
        depths = [stage.get("depth") for stage in stages if isinstance(stage, dict)]
        if sum(depth for depth in depths if isinstance(depth, int)) > _MAX_BLOCKS:
            raise UserError(f"{path}: stages: a depth of more than {_MAX_BLOCKS} blocks in all")
    if variant.get("name") != config.architecture:
        raise UserError(f"{path}: architecture {config.architecture!r} is not the variant of model_args")
    if len(classes) != config.num_classes:
        raise UserError(f"{path}: label_names has {len(classes)} names for num_classes {config.num_classes}")
    arguments = config.model_args.model_dump() | {"num_classes": config.num_classes}
    preprocessing = read_preprocessing(config.pretrained_cfg, path)
    return Config(path, arguments, classes, preprocessing, config.multilabel, values["record"])


def read_preprocessing(seen: PreprocessingCfg, path: Path) -> Preprocessing:
    """The preprocessing of a "pretrained_cfg". Raises UserError if a value is wrong."""
    try:
        preprocessing = Preprocessing(
            resolution=tuple(seen.input_size[1:]) if len(seen.input_size) == 3 else 0,
            crop=seen.crop_mode,
            crop_fraction=seen.crop_pct,
            interpolation=seen.interpolation,
            mean=tuple(seen.mean),
            std=tuple(seen.std),
            channel_names=tuple(seen.channel_names),
            value_range=None if seen.value_range is None else (seen.value_range[0], seen.value_range[1]),
        )
    except UserError as error:
        raise UserError(f"{path}: pretrained_cfg: {error}") from None
    expected = [preprocessing.channels, *preprocessing.size]
    if seen.input_size != expected:
        raise UserError(f"{path}: input_size is {short(seen.input_size)}; by mean and resolution it must be {expected}")
    return preprocessing
