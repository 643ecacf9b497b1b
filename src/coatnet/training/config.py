"""A recipe: all that decides a training run, as one frozen value that prints, stores and repeats it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml

from coatnet.data.mixing import Mixing
from coatnet.data.transforms import Augmentation, Preprocessing
from coatnet.errors import UserError
from coatnet.training.config_parsing import build, checked, field_types, plain, read_yaml, shallow
from coatnet.training.optimizer import Optimization, Schedule

T = TypeVar("T")

PARTS: dict[str, type] = {
    "optimizer": Optimization,
    "schedule": Schedule,
    "augmentation": Augmentation,
    "mixing": Mixing,
    "preprocessing": Preprocessing,
}
_ABOVE_ZERO = (
    "epochs",
    "batch_size",
    "micro_batch_size",
    "resolution",
    "patience",
    "max_minutes",
    "evaluate_every",
    "checkpoint_every_minutes",
    "keep_checkpoints",
    "keep_every_hours",
)
_BELOW_ONE = ("stochastic_depth", "ema_decay", "validation_fraction", "bad_image_budget")


Parallelism = Literal["ddp", "fsdp", "hsdp"]
Recomputed = Literal["none", "transformer", "all"]


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how.

    None means: chosen from the data when training starts (`coatnet.training.defaults.resolve`). The parts
    `optimizer`, `schedule`, `augmentation`, `mixing` and `preprocessing` may be given whole, or as a dict of
    what should differ from the choice: `Recipe(data="digits", augmentation={"shift": 1})`.

    `name` is a row of `recipes.RECIPES`; `model` a variant, or "auto"; `init` a bundle to start from,
    a folder or an id of the hub. With it, `freeze` names parts that do not learn ("stem,stages.0", or a list), and
    in the first `head_first_epochs` only the classifier learns.
    `epochs` and `evaluate_every` count passes over the training images, `batch_size` the images of one
    optimizer step, `micro_batch_size` those that pass through the model at once. `ema_decay` 0 means no
    averaging. On several processes (`torchrun`) each takes its share of the batch; `parallelism` says whether each
    has a copy of the weights (ddp) or a part, spread over all (fsdp) or over each machine (hsdp); auto is by size.
    `activation_checkpointing` computes Transformer blocks, or all, twice rather than keep what they computed.
    `keep_checkpoints` is how many of the last ones stay; with `keep_every_hours` one of every so many hours as well.
    `non_finite_budget` is how many steps may be left out because their loss or gradient is not finite.
    `loggers` are told the figures as well: tensorboard, wandb, mlflow.
    `patience` is in evaluations without a better top-1 (or mAP). Under `max_minutes` the schedule
    is planned to end at the limit, so the run is repeatable in its steps only without it.
    """

    name: str = "scratch"
    data: str = ""
    model: str = "auto"
    variations: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    freeze: tuple[str, ...] | str = ()
    head_first_epochs: float = 0.0
    resolution: int | None = None
    channels: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    parallelism: Parallelism | Literal["auto"] = "auto"
    activation_checkpointing: Recomputed = "none"
    stochastic_depth: float | None = None
    ema_decay: float | None = None
    loss: Literal["softmax", "sigmoid"] | None = None
    balance: Literal["none", "sampler", "weights"] = "none"
    optimizer: dict[str, Any] | Optimization = field(default_factory=dict)
    schedule: dict[str, Any] | Schedule = field(default_factory=dict)
    augmentation: dict[str, Any] | Augmentation = field(default_factory=dict)
    mixing: dict[str, Any] | Mixing = field(default_factory=dict)
    preprocessing: dict[str, Any] | Preprocessing = field(default_factory=dict)
    patience: int | None = None
    max_minutes: float | None = None
    evaluate_every: float | None = None
    checkpoint_every_minutes: float = 10.0
    keep_checkpoints: int = 2
    keep_every_hours: float | None = None
    validation_fraction: float = 0.1
    num_workers: int | None = None
    bad_image_budget: float = 0.001
    non_finite_budget: int = 0
    loggers: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        """Raises UserError naming the field, whatever way the value came in."""
        for name, value in checked(Recipe, shallow(self)).items():
            if name in PARTS and isinstance(value, dict):
                value = checked(PARTS[name], value, f"{name}.")
                if name != "preprocessing":  # its fields can be judged only together
                    PARTS[name](**value)
            object.__setattr__(self, name, value)
        for name in ("freeze", "loggers"):
            if isinstance(listed := getattr(self, name), str):
                each = (part.strip() for part in listed.split(","))
                object.__setattr__(self, name, tuple(part for part in each if part))
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be above 0, got {value}")
        for name in _BELOW_ONE:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {value}")
        if not self.head_first_epochs >= 0:
            raise UserError(f"head_first_epochs must be 0 or more, got {self.head_first_epochs}")
        if self.channels not in (None, 1, 3):
            raise UserError(f"channels must be 1 (grey) or 3 (colour), got {self.channels}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed}")
        if self.non_finite_budget < 0:
            raise UserError(f"non_finite_budget must be 0 or more, got {self.non_finite_budget}")
        if self.num_workers is not None and self.num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, got {self.num_workers}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """A recipe from plain values; unknown keys and wrong types are refused by name."""
        return build(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """A recipe from a YAML file, such as the `recipe.yaml` of a run."""
        try:
            return cls.from_dict(read_yaml(path))
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML; `from_dict` gives the same recipe back."""
        return plain(self)

    def to_yaml(self) -> str:
        """The recipe as YAML, fields in their order."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def complete(kind: type[T], given: Mapping[str, Any] | T, **chosen: Any) -> T:
    """A whole part of a recipe: what was given, then what the recipe chose, then the defaults of `kind`."""
    if isinstance(given, kind):
        return given
    assert isinstance(given, Mapping)
    return build(kind, {**plain(chosen), **given})


class Parts(NamedTuple):
    """The parts of a recipe, whole."""

    optimizer: Optimization
    schedule: Schedule
    augmentation: Augmentation
    mixing: Mixing
    preprocessing: Preprocessing


def parts(recipe: Recipe) -> Parts:
    """The parts of a complete recipe; what is not given is the default of its dataclass."""
    return Parts(*(complete(kind, getattr(recipe, name)) for name, kind in PARTS.items()))


def options() -> dict[str, Any]:
    """Every option by its dotted name ("optimizer.learning_rate"), with its type; for a command line."""
    flat: dict[str, Any] = {}
    for name, hint in field_types(Recipe).items():
        inner = field_types(PARTS[name]) if name in PARTS else {}
        flat.update({f"{name}.{key}": kind for key, kind in inner.items()} or {name: hint})
    return flat
