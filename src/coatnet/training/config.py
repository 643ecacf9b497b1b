"""What decides a training run: a `Recipe` holds what was asked, a `TrainingConfig` everything that will be done.

`defaults.resolve` makes the second from the first, once, and the data. Both are frozen, print, and go to YAML and back.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo

from coatnet.data.decode import MAX_CHANNELS
from coatnet.data.mixing import Mixing
from coatnet.data.transforms import Augmentation, Preprocessing
from coatnet.errors import UserError, nearest_option, one_line, reason_of
from coatnet.system.files import read_regular, user_path
from coatnet.system.validated import (
    Boolean,
    FractionBelowOne,
    Integer,
    Names,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Size,
    Source,
    Text,
    check_some,
    fields_of,
    is_validated,
    validated,
)
from coatnet.training.distillation import Distillation
from coatnet.training.optimizer import Optimization, Schedule
from coatnet.training.progressive_resizing import ProgressiveResizing

MAX_YAML_BYTES = 8_000_000  # a run may name 20,000 copies that it keeps together
FROM_FILE = "{folder}/"  # begins a path that is counted from the folder of the file it stands in
# The optimizer's values in the recipe.yaml of a run of release 0.1, which had AdamW only.
OPTIMIZER_OF_RELEASE_0_1 = {"learning_rate", "weight_decay", "betas", "grad_clip_norm", "layer_decay"}

Parallelism = Literal["ddp", "fsdp", "hsdp"]
Recomputed = Literal["none", "transformer", "all"]
# Marks a field that may change when a run is resumed; `MAY_CHANGE` lists them.
CHANGEABLE = Field(json_schema_extra={"may_change": True})


def _at_most(value: float) -> float:
    if value > MOST:
        raise UserError(f"must be at most {MOST:,}")
    return value


# chosen: more than any run has; the product of two such numbers is one of 64 bits.
MOST = 10**9
AT_MOST = AfterValidator(_at_most)


@validated
class TrainingConfig:
    """All that decides a training run; `recipe.yaml` in the run folder holds it.

    The docstring under each field gives its unit, and its default or how that is chosen from the data.
    """

    _: KW_ONLY
    name: Text = "scratch"
    """Name of the recipe that the values start from, see `recipes.RECIPES`."""
    data: Source
    """What to learn from: a folder of images, a manifest, shards, or a name such as digits."""
    model: Text
    """Name of a variant (`coatnet models` lists them); by default chosen by resolution, or that of `init`."""
    variations: dict[str, Any] = field(default_factory=dict)
    """Changes of the variant's architecture, such as {downsample: depthwise}."""
    init: Source = ""
    """Model to start from: a bundle, an id of the hub such as timm/coatnet_0_rw_224.sw_in1k, or auto: the published one
    that suits images and machine; by default none."""
    freeze: Names = ()
    """With `init`: parts that do not learn, such as stem,stages.0; by default none."""
    head_first_epochs: Annotated[NonNegativeFloat, AT_MOST] = 0.0
    """With `init`: epochs at the start in which only the classifier learns; by default 0."""
    teacher: Source = ""
    """Teacher for knowledge distillation: a bundle, or an id of the hub; by default none."""
    resolution: Size
    """Side of the square images that the model sees, pixels, or their height and width, such as 192x320; by default
    that of small images, else 128 or 224, or 96 if `max_minutes` leaves fewer than 7 epochs."""
    channels: Annotated[Integer, Field(ge=1, le=MAX_CHANNELS)]
    """Channels of these images: 1 (gray), 3 (color), or any up to 16; by default those of the data."""
    epochs: Annotated[PositiveFloat, AT_MOST, CHANGEABLE]
    """Passes over the training images; by default 20 to 100, more for fewer images, or with `init` a third of that, but
    at least 8 and 300 steps."""
    batch_size: Annotated[PositiveInt, AT_MOST]
    """Images of one optimizer step, over all processes; by default 16 up to 724 images, 32 up to 1,448, 64 for
    more."""
    micro_batch_size: Annotated[PositiveInt, AT_MOST]
    """Images of one forward and backward pass of a process; by default its whole share of the batch."""
    seed: Annotated[Integer, Field(ge=0, le=2**63 - 1)] = 0
    """Start of all random numbers, 0 to 2^63 - 1; another seed is another run."""
    device: Annotated[Text, CHANGEABLE] = "auto"
    """Where to compute: cpu, cuda, or one GPU such as cuda:1; auto: the first GPU, or the CPU without one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the matrix products; weights are fp32 always. auto: bf16 where the hardware multiplies it, and
    on CPUs only where that is faster."""
    compile: Boolean = False
    """Whether to compile the blocks by torch.compile."""
    parallelism: Annotated[Literal[Parallelism, "auto"], CHANGEABLE] = "auto"
    """With several processes: a copy of the weights on each (ddp), shards over all (fsdp) or over each machine (hsdp);
    auto: copies up to 10^9 parameters."""
    activation_checkpointing: Annotated[Recomputed, CHANGEABLE] = "none"
    """Blocks that are computed again in the backward pass to save memory."""
    stochastic_depth: FractionBelowOne
    """Rate of stochastic depth at the last block, growing from 0 in a line; by default 0 up to 64 pixels and in
    runs of less than 25 epochs without `init`, else 0.1."""
    ema_decay: FractionBelowOne
    """Decay of the exponential average of the weights for each step, 0 for none; by default over 3 % of the run."""
    loss: Literal["softmax", "sigmoid"]
    """Cross-entropy over classes, or for each class; by default sigmoid for several labels per image."""
    balance: Literal["none", "sampler", "weights"] = "none"
    """What equalizes rare and frequent classes: how often images are drawn, or weights in the loss."""
    optimizer: Optimization
    """The rule of the updates."""
    schedule: Schedule
    """The learning rate over the run."""
    progressive_resizing: ProgressiveResizing = field(default_factory=ProgressiveResizing)
    """How the size of the images grows over the run."""
    augmentation: Augmentation
    """How training images vary."""
    mixing: Mixing
    """How images and labels are blended."""
    preprocessing: Preprocessing
    """What the model sees of an image; it is stored with the weights. With `init`, by default that of the bundle."""
    distillation: Distillation = Distillation()
    """With `teacher`: how the network learns from its outputs."""
    patience: Annotated[NonNegativeInt, CHANGEABLE] = 0
    """Evaluations without a better top-1 (or mAP) that end the run, with its best weights; by default none do (0)."""
    max_minutes: Annotated[NonNegativeFloat, AT_MOST, CHANGEABLE] = 0.0
    """Time limit in minutes, over all resumptions; the schedule is planned to end there; by default none (0)."""
    evaluate_every: Annotated[Annotated[PositiveFloat, AT_MOST] | Literal["auto"], CHANGEABLE]
    """Epochs between evaluations on held-out images; by default (auto) a twelfth of the run, at least 1, and more where
    evaluations would take more than a twentieth of the time."""
    checkpoint_every_minutes: Annotated[PositiveFloat, AT_MOST, CHANGEABLE] = 10.0
    """Minutes between checkpoints."""
    keep_checkpoints: Annotated[PositiveInt, CHANGEABLE] = 2
    """How many of the last checkpoints stay."""
    keep_every_hours: Annotated[NonNegativeFloat, AT_MOST, CHANGEABLE] = 0.0
    """Hours of training for each of which one more checkpoint stays; by default none (0)."""
    validation_fraction: FractionBelowOne = 0.1
    """Fraction of the images held out for evaluation, where the data has no split of its own."""
    training_images: NonNegativeInt = 0
    """Number of images to learn from, as many of each class, chosen by the seed and among those of every larger number;
    by default all (0)."""
    test_fraction: FractionBelowOne = 0.0
    """Fraction of the images for a test split, measured once at the end, where the data has none; by default none."""
    fold: Text = ""
    """Held out instead of a fraction: 2/5 is the second of five folds; `train --folds 5` has all; by default none."""
    kept_together: tuple[tuple[str, ...], ...] = ()
    """Groups of images, by name, that fall on one side of the split; by default copies and near copies with one label,
    where image files have no split of their own and are at most 20,000."""
    num_workers: Annotated[NonNegativeInt | Literal["auto"], CHANGEABLE] = "auto"
    """Processes that read images; 0: the training process reads them; auto, up to 8: with a GPU as many as the cores,
    else a third of them, and an eighth where images are kept decoded; the other cores compute."""
    cache: Literal["auto", "memory", "disk", "none"] = "none"
    """Where images that are files are kept decoded, reduced to what training looks at: memory, disk (for later runs
    too), or none; by default (auto) memory, if they take at most a quarter of what is available, else none."""
    bad_image_budget: Annotated[Probability, CHANGEABLE] = 1.0
    """Fraction of the images that may be unreadable before the run stops; by default none stops it (1)."""
    non_finite_budget: Annotated[NonNegativeInt, CHANGEABLE] = 0
    """Steps that may be left out because their loss or gradient is not finite."""
    loggers: Annotated[Names, CHANGEABLE] = ()
    """Where figures go beside the run folder: tensorboard,wandb,mlflow; by default nowhere."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from the plain values of `to_dict`, or from those of an earlier release.

        These held null where no limit and no pre-trained model was asked for.
        """
        given = {name: value for name, value in values.items() if value is not None}
        if "batch_size" in given:
            given.setdefault("micro_batch_size", given["batch_size"])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML; `from_dict` gives the same configuration back."""
        return plain(asdict(self))

    def to_yaml(self) -> str:
        """The configuration as YAML, fields in their order."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


SECTIONS: dict[str, Any] = {
    name: each.annotation for name, each in fields_of(TrainingConfig).items() if is_validated(each.annotation)
}
REQUIRED = tuple(name for name, each in fields_of(TrainingConfig).items() if each.is_required())
MAY_CHANGE = tuple(
    name for name, each in fields_of(TrainingConfig).items() if each.json_schema_extra == CHANGEABLE.json_schema_extra
)


def options() -> dict[str, FieldInfo]:
    """Every value of a run by its dotted name, such as "optimizer.learning_rate"."""
    flat: dict[str, FieldInfo] = {}
    for name, each in fields_of(TrainingConfig).items():
        inner = fields_of(SECTIONS[name]) if name in SECTIONS else {}
        flat |= {f"{name}.{key}": value for key, value in inner.items()} or {name: each}
    return flat


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What was asked of a run; where a value is None, the named recipe, the data or a default decides.

    The fields are those of `TrainingConfig`, which explains them. A section (`optimizer`, `schedule`,
    `progressive_resizing`, `augmentation`, `mixing`, `preprocessing`, `distillation`) is given whole, or as a dict of
    some of its values; it is kept as a dict:
    `Recipe(data="digits", augmentation={"shift": 1})`.

    Raises:
        UserError: a name is unknown, or a value is wrong.
    """

    name: str = "scratch"
    data: str = ""
    model: str | None = None
    variations: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    freeze: Sequence[str] | str | None = None
    head_first_epochs: float | None = None
    teacher: str | None = None
    resolution: int | tuple[int, int] | str | None = None
    channels: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    seed: int | None = None
    device: str | None = None
    precision: Literal["auto", "fp32", "bf16"] | None = None
    compile: bool | None = None
    parallelism: Literal[Parallelism, "auto"] | None = None
    activation_checkpointing: Recomputed | None = None
    stochastic_depth: float | None = None
    ema_decay: float | None = None
    loss: Literal["softmax", "sigmoid"] | None = None
    balance: Literal["none", "sampler", "weights"] | None = None
    optimizer: dict[str, Any] | Optimization = field(default_factory=dict)
    schedule: dict[str, Any] | Schedule = field(default_factory=dict)
    progressive_resizing: dict[str, Any] | ProgressiveResizing = field(default_factory=dict)
    augmentation: dict[str, Any] | Augmentation = field(default_factory=dict)
    mixing: dict[str, Any] | Mixing = field(default_factory=dict)
    preprocessing: dict[str, Any] | Preprocessing = field(default_factory=dict)
    distillation: dict[str, Any] | Distillation = field(default_factory=dict)
    patience: int | None = None
    max_minutes: float | None = None
    evaluate_every: float | Literal["auto"] | None = None
    checkpoint_every_minutes: float | None = None
    keep_checkpoints: int | None = None
    keep_every_hours: float | None = None
    validation_fraction: float | None = None
    training_images: int | None = None
    test_fraction: float | None = None
    fold: str | None = None
    kept_together: Sequence[Sequence[str]] | None = None
    num_workers: int | Literal["auto"] | None = None
    cache: Literal["auto", "memory", "disk", "none"] | None = None
    bad_image_budget: float | None = None
    non_finite_budget: int | None = None
    loggers: Sequence[str] | str | None = None

    def __new__(cls, **asked: Any) -> Self:
        for name in asked:
            if name not in fields_of(TrainingConfig):
                hint = nearest_option(name, options()) or f"; there are {', '.join(fields_of(TrainingConfig))}"
                raise UserError(f"{name} is unknown{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) is None and each.default is not None:  # null in a file: not asked
                default = {} if each.default is MISSING else each.default
                object.__setattr__(self, each.name, default)
        for name, value in check_some(TrainingConfig, self._asked()).items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in self._asked().items())})"

    def _asked(self) -> dict[str, Any]:
        """What was asked, by name."""
        return {name: value for name, value in vars(self).items() if value is not None and value != {}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A recipe from plain values by name."""
        if not isinstance(values, Mapping):
            raise UserError(f"a recipe must be names with values, such as {{name: value}}, got {values!r:.80}")
        return cls(**{str(name): value for name, value in values.items()})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """A recipe from a YAML file, such as the `recipe.yaml` of a run."""
        try:
            return cls.from_dict(read_yaml(path))
        except UserError as error:
            raise UserError(str(error) if one_line(str(path)) in str(error) else f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """What was asked as plain values, ready for JSON or YAML; `from_dict` gives the same recipe back."""
        return plain(self._asked())

    def to_yaml(self) -> str:
        """What was asked as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """This recipe with other values over its own; of a section, with those that are given."""
        return self.from_dict(merge(self.to_dict(), changes))


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name with changes over them, one level deep into the sections and variations.

    The resolution is that of the preprocessing where changes name only this one.
    """
    merged = {**values, **changes}
    for name in (*SECTIONS, "variations"):
        if isinstance(values.get(name), Mapping) and isinstance(changes.get(name), Mapping):
            merged[name] = {**values[name], **changes[name]}
    seen = changes.get("preprocessing")
    if isinstance(seen, Mapping) and seen.get("resolution") is not None and changes.get("resolution") is None:
        merged["resolution"] = seen["resolution"]
    return merged


def plain(value: Any) -> Any:
    """Nested dicts and lists, without tuples, ready for YAML or JSON."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, and no aliases, by which a small file grows without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)


# YAML 1.1 wants a point and a sign: 1.0e-3.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


# Its constructors let through what Python says of a number of 5,000 digits, of 2026-99-99 or of `!!bool x`.
_YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError)


def read_value(text: str) -> Any:
    """A value as YAML reads it: a number, true, [0.5, 0.5], ...; what is no YAML stays the text that it is."""
    try:
        return yaml.load(text, Loader=_Loader)
    except _YAML_ERRORS:
        return text


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping, bounded in size, without aliases or tags: a file can name values, never code.

    Where `data`, `init` or `teacher` begins with `{folder}/`, as in the recipe.yaml of a run, that is the folder of the
    file.
    """
    try:
        text = read_regular(path, MAX_YAML_BYTES)
        values = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a recipe in YAML") from None
    except _YAML_ERRORS as error:
        raise UserError(f"{path} is not a recipe in YAML: {reason_of(error)}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path} must hold names with values, such as epochs: 20, but holds {found}")
    optimizer = values.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.keys() == OPTIMIZER_OF_RELEASE_0_1:
        optimizer["algorithm"] = "adamw"
    for name in ("data", "init", "teacher"):
        if isinstance(place := values.get(name), str) and place.startswith((FROM_FILE, "~")):
            place = place.replace(FROM_FILE, f"{os.path.realpath(Path(path).parent)}/", 1)
            values[name] = os.path.realpath(user_path(place))
    return values
