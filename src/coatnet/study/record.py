"""`study.json`: the plan of a study before it starts, the figures of its runs as they end, and all that pages show."""

import json
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from coatnet.errors import UserError
from coatnet.system.files import atomic_write, translate_write_errors
from coatnet.system.json_reader import read_json_object
from coatnet.system.validated import (
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Probability,
    Text,
    validated,
)

RECORD = "study.json"
PAGES = HTML_PAGE, MARKDOWN_PAGE, CURVES_PLOT, GAP_PLOT = ("study.html", "study.md", "curves.png", "gap.png")
FIGURES = "figures.json"  # in a run folder: what the study keeps of the run, and the mark of its end
FORMAT = 1
_WAY_OUT = "move it out of the folder, and the same command plans the study again with the runs that are there"


@validated
class Paper:
    """What the paper says of a member of a study; None where it says nothing. Equal ranks: no difference."""

    generalization_rank: PositiveInt | None = None
    """1 for the smallest gap between training and evaluation."""
    capacity_rank: PositiveInt | None = None
    """1 for the best fit to very many training images."""


@validated
class Member:
    """A network of a study."""

    name: Text
    """Such as C-C-T-T; unique in its study."""
    description: Text
    """What it is, in a line."""
    parameters: PositiveInt
    """Number of trainable parameters."""
    macs: PositiveInt
    """Multiply-accumulates of an image."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe that differ from those of the study, among them `variations`."""
    paper: Paper = Paper()
    """What the paper says of it."""
    note: Text = ""
    """What a reader must know, such as a size that could not be matched; empty if nothing."""


@validated
class Curves:
    """How a run went: training loss, and evaluations on the held-out images."""

    step: tuple[NonNegativeInt, ...] = ()
    """Steps after which `train_loss` was logged."""
    train_loss: tuple[Number, ...] = ()
    """Mean loss of an image since the value before, with augmentation and smoothing."""
    held_out_step: tuple[NonNegativeInt, ...] = ()
    """Steps after which the held-out images were measured."""
    held_out_loss: tuple[Number, ...] = ()
    """Mean cross-entropy of the held-out images."""
    held_out_top1: tuple[Probability, ...] = ()
    """Fraction of the held-out images that were classified right."""

    def __post_init__(self) -> None:
        if len(self.step) != len(self.train_loss):
            raise UserError(f"train_loss has {len(self.train_loss)} values for {len(self.step)} steps")
        if not len(self.held_out_step) == len(self.held_out_loss) == len(self.held_out_top1):
            raise UserError("held_out_step, held_out_loss and held_out_top1 must be of one length")


@validated
class Figures:
    """What a finished run reached, with its averaged weights where it averages them."""

    top1: Probability
    """Fraction of all held-out images that are classified right."""
    held_out_loss: NonNegativeFloat
    """Mean cross-entropy of the held-out images."""
    train_top1: Probability
    """As `top1`, of training images without augmentation."""
    train_loss: NonNegativeFloat
    """Mean cross-entropy of the same training images."""
    n: PositiveInt
    """Number of held-out images."""
    n_train: PositiveInt
    """Number of training images that `train_top1` and `train_loss` were measured on."""


Status = Literal["planned", "finished", "failed"]


@validated
class Run:
    """One training: a member, a number of training images, a seed, a learning rate."""

    member: Text
    """Name of the member."""
    size: PositiveInt
    """Number of training images."""
    seed: NonNegativeInt
    """Same seed and size: the same images in the same order, for every member."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    steps: PositiveInt
    """Optimizer steps, the same for all members."""
    folder: Text
    """The run folder, relative to that of the study."""
    status: Status = "planned"
    """Where it stands."""
    reason: Text | None = None
    """Why it failed."""
    seconds: NonNegativeFloat = 0.0
    """How long it took, or will take if it is planned."""
    curves: Curves = Curves()
    """How it went."""
    figures: Figures | None = None
    """What it reached, if it is finished."""


@validated
class SplitContent:
    """The images of a split, as `Splits.content` describes them."""

    images: NonNegativeInt
    """How many there are."""
    sha256: Text
    """Hash of their names and labels."""


@validated
class Study:
    """A study: its question, its data, its members, and all its runs."""

    format: Literal[1]
    """Version of this format."""
    question: Text
    """layouts, attention, ..., or the name of one's own grid."""
    title: Text
    """The question in words."""
    data: Text
    """Where the images come from, as it was given first."""
    held_out: PositiveInt
    """Number of held-out images."""
    resolution: tuple[PositiveInt, PositiveInt]
    """Height and width of the images in pixels."""
    classes: PositiveInt
    """Number of classes."""
    command: Text
    """The command that makes the study."""
    versions: dict[str, str]
    """Versions of the software by name."""
    machine: Text
    """Where the first runs were made."""
    recipe: dict[str, Any]
    """Fields of the recipe that all runs have."""
    members: tuple[Member, ...]
    """The networks that are compared; the first is what the others differ from."""
    sizes: tuple[PositiveInt, ...]
    """Numbers of training images, ascending; smaller ones are parts of larger ones."""
    seeds: tuple[NonNegativeInt, ...]
    """Seeds of every member."""
    learning_rates: tuple[PositiveFloat, ...]
    """Peak learning rates that every member is trained with."""
    threads: PositiveInt = 1
    """Threads of a run on CPUs; with another number the last bits of its sums may differ."""
    asked: dict[str, Any] = field(default_factory=dict)
    """Options of the command that the plan follows from; `file` is what its YAML file asks, see `Question.asked`."""
    content: dict[str, SplitContent] = field(default_factory=dict)
    """The images of each split; empty in a study that an earlier release began."""
    runs: tuple[Run, ...] = ()
    """All trainings, in the order in which they are made."""

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if not names or len(set(names)) < len(names):
            raise UserError("members must be one or more, with different names")
        if unknown := {run.member for run in self.runs}.difference(names):
            raise UserError(f"runs name {min(unknown)!r}, which is not a member")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The study of a folder. Raises UserError if its study.json is missing, damaged or of a later release."""
        path = folder / RECORD
        if not path.exists():
            raise UserError(f"{path} cannot be read: there is no such file")
        try:
            values = dict(read_json_object(path))
        except UserError as error:
            raise UserError(f"{error}; {_WAY_OUT}") from None
        if (found := values.get("format")) != FORMAT and isinstance(found, int):
            raise UserError(f"{path} has format {found!r}; this release of coatnet reads {FORMAT}")
        try:
            return cls(**values)
        except (UserError, TypeError) as error:
            raise UserError(f"{path}: {error}; {_WAY_OUT}") from None

    def require_plan(self, folder: Path) -> None:
        """Raise UserError unless all that a start goes on by is in the study, which was read from this folder."""
        asked = self.asked
        counts = {"planned_steps": asked.get("planned_steps"), "evaluations": asked.get("evaluations", 1)}
        wrong = [
            f"asked.{name} is {value!r:.80}, not a number of 1 or more"
            for name, value in counts.items()
            if not isinstance(value, int) or value < 1
        ]
        if not isinstance(self.recipe.get("batch_size"), int):
            wrong.append("recipe has no batch_size")
        trained = {run.member for run in self.runs}
        wrong += [f"member {member.name} has no runs" for member in self.members if member.name not in trained]
        wrong += [f"{name} is empty" for name in ("sizes", "seeds", "learning_rates") if not getattr(self, name)]
        for run in self.runs:
            if run.status == "finished" and run.figures is None:
                wrong.append(f"{run.folder} is finished without figures")
            if run.steps != asked.get("planned_steps"):
                wrong.append(f"{run.folder} has {run.steps} steps, not asked.planned_steps")
        file = asked.get("file", {"members": {}})
        if not isinstance(file, dict) or not isinstance(file.get("members"), dict):
            wrong.append("asked.file has no members")
        if wrong:
            raise UserError(f"{folder / RECORD} is damaged: {wrong[0]}; {_WAY_OUT}")

    def write(self, folder: Path) -> None:
        """Write study.json, whole or not at all. Raises UserError if the disk refuses."""
        with translate_write_errors(folder / RECORD, "the same command goes on where the study stopped"):
            atomic_write(folder / RECORD, json.dumps(asdict(self), indent=None, separators=(",", ":")))

    def with_run(self, run: Run) -> Self:
        """The study with a run in the place of that of the same folder."""
        return replace(self, runs=tuple(run if each.folder == run.folder else each for each in self.runs))

    def finished(self) -> tuple[Run, ...]:
        """The runs that have figures."""
        return tuple(run for run in self.runs if run.status == "finished" and run.figures is not None)
