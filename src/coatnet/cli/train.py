"""`coatnet train`: train on images, evaluate, and write the trained model."""

import argparse
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from coatnet.cli.parser import DATA_HELP, Parser
from coatnet.errors import UserError
from coatnet.system.launcher import is_main_process
from coatnet.system.terminal import echo, echo_summary

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from coatnet.training.config import Recipe

# What most people set; every other field of a configuration is an option too.
MAIN_OPTIONS = (
    "data",
    "model",
    "init",
    "freeze",
    "head_first_epochs",
    "teacher",
    "epochs",
    "batch_size",
    "resolution",
    "max_minutes",
    "seed",
    "device",
)


def parse_arguments(arguments: Sequence[str]) -> "tuple[Recipe, argparse.Namespace]":
    """The recipe that is asked for (a named one, --config over it, options over both), and the other arguments."""
    from coatnet.training.config import Recipe, merge, read_yaml
    from coatnet.training.recipes import named_recipe

    parser = train_parser()
    for option in {argument.partition("=")[0] for argument in arguments if argument.startswith("--variations.")}:
        parser.add_argument(option, type=_read_value, default=argparse.SUPPRESS)
    given = vars(parser.parse(arguments))
    program = argparse.Namespace(
        **{
            name: given.pop(name)
            for name in ("recipe", "config", "out", "print_config", "dry_run", "lr_range", "price", "tune", "folds")
        }
    )
    asked: dict[str, Any] = {}
    for name, value in given.items():
        section, _, key = name.rpartition(".")
        (asked.setdefault(section, {}) if section else asked)[key] = value
    values: dict[str, Any] = {}
    if program.config:
        Recipe.from_yaml(program.config)  # its errors name the file
        values = read_yaml(program.config)
        if program.folds or _is_divided_otherwise(values, asked):  # then other copies may be parted: look for them
            values.pop("kept_together", None)
    name = program.recipe or values.get("name") or "scratch"
    recipe = named_recipe(name, merge(values, asked) | {"name": name})
    for option, value in (("--data", recipe.data), ("--out", program.out or program.dry_run)):
        if not value and not program.print_config:
            raise UserError(f"train needs {option}; `coatnet train --help` shows how")
    return recipe, program


def _is_divided_otherwise(values: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether options ask for other images than the values of a file, or hold others of them out."""
    from coatnet.data.open import data_path
    from coatnet.data.splits import SplitRule

    other = "data" in asked and data_path(asked["data"]) != data_path(str(values.get("data") or ""))
    return other or not SplitRule.of(values).holds_out_as(SplitRule.of({**values, **asked}))


def train_parser() -> Parser:
    """The parser with an option for every field of `TrainingConfig`, the sections' with dotted names."""
    from coatnet.system.validated import fields_of
    from coatnet.training.config import SECTIONS, TrainingConfig, options
    from coatnet.training.recipes import RECIPES

    purposes = "\n".join(f"  {name:25} {row.purpose}" for name, row in RECIPES.items())
    parser = Parser(
        "train",
        "Train on images, evaluate, and leave in RUN the recipe, curves, the report and the trained model\n"
        "(RUN/bundle). The same command again resumes where it stopped; Ctrl-C stops it safely.",
        "examples:\n"
        "  coatnet train fashion-mnist --data fashion-mnist-small --out runs/clothes\n"
        "  coatnet train --data path/to/folder --init auto --out runs/mine\n"
        "  coatnet train --data path/to/folder --out runs/mine --epochs 20 --optimizer.learning_rate 4e-3\n"
        "  coatnet train finetune --init runs/mine/bundle --data other/folder --out runs/other\n"
        "  coatnet train --config runs/mine/recipe.yaml --out runs/again     # repeats a run\n\n"
        f"{DATA_HELP}\n\nrecipes:\n{purposes}",
    )
    parser.usage = "coatnet train [RECIPE] --data X --out RUN [options]"
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="what the values start from, see below (scratch)")
    main = parser.add_argument_group("the main options")
    main.add_argument("--out", metavar="RUN", help="Folder of the run, new or to be resumed.")
    main.add_argument("--config", metavar="FILE", help="YAML with values over the recipe's; options go over both.")
    main.add_argument("--print_config", action="store_true", help="Print what is asked for as YAML and do not train.")
    main.add_argument(
        "--dry_run",
        action="store_true",
        help="Take a few steps, print all that the data decides, the expected minutes and memory, and do not train.",
    )
    main.add_argument(
        "--lr_range", action="store_true", help="With --dry_run: test which learning rates let the loss fall."
    )
    main.add_argument(
        "--price", type=float, metavar="PER_HOUR", help="With --dry_run: of an hour of this machine, for the cost."
    )
    main.add_argument(
        "--tune",
        type=float,
        metavar="MINUTES",
        help="Search so long for learning rate, weight decay and strength of augmentation, then train with the best.",
    )
    main.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="Cross-validate first, for few images: K trainings in RUN/folds, each measured on another K-th of them.",
    )
    rest = parser.add_argument_group("other options", "What is not given is decided by the recipe, or by the data.")
    parser.add_max_megapixels()
    groups = {name: parser.add_argument_group(name, fields_of(TrainingConfig)[name].description) for name in SECTIONS}
    for name, field in options().items():
        if name != "name":  # given as RECIPE
            group = main if name in MAIN_OPTIONS else groups.get(name.partition(".")[0], rest)
            _add_option(group, name, field)
    return parser


def _add_option(group: Any, name: str, field: "FieldInfo") -> None:
    """A text is taken as it is; anything else is read as YAML is, and the recipe says what is wrong with it."""
    optional_value = {"nargs": "?", "const": True} if field.annotation is bool else {}
    read = str if field.annotation is str else _read_value
    help_text = describe_option(field).replace("%", "%%")
    group.add_argument(f"--{name}", type=read, default=argparse.SUPPRESS, metavar="X", help=help_text, **optional_value)


def describe_option(field: "FieldInfo") -> str:
    """What a field means, the values that it may have if they are few, and its default."""
    from coatnet.system.validated import describe

    sentences = [" ".join((field.description or "").split())]
    if typing.get_origin(field.annotation) is Literal:
        sentences.append(f"{describe(field.annotation).capitalize()}.")
    default = "" if field.is_required() else field.get_default(call_default_factory=True)
    if "default" not in sentences[0] and default not in ((), {}, ""):
        sentences.append(f"Default: {_as_option(default)}.")
    return " ".join(sentences)


def _as_option(value: Any) -> str:
    """A value as it is written on the command line: `0.5`, `[0.9,0.999]`, `false`."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_as_option, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _read_value(text: str) -> Any:
    from coatnet.training.config import read_value

    return read_value(text)


def run(arguments: Sequence[str]) -> int:
    """Train, evaluate, and write the trained model."""
    recipe, program = parse_arguments(arguments)
    if not program.dry_run and (program.lr_range or program.price is not None):
        raise UserError(f"{'lr_range' if program.lr_range else 'price'} is for --dry_run: give that as well")
    if program.tune is not None and program.dry_run:
        raise UserError("tune trains, and dry_run does not: give one of them")
    if program.folds is not None and (program.dry_run or recipe.fold):
        raise UserError("folds trains on all folds: leave dry_run and fold out")
    if program.print_config:
        echo(recipe.to_yaml(), end="")
        return 0
    if program.dry_run:
        from coatnet.planning.dry_run import dry_run

        echo(dry_run(recipe, price=program.price, lr_range=program.lr_range).describe())
        return 0
    from coatnet.training.run import train

    if program.tune is not None:
        from coatnet.planning.tuning import tune

        recipe = tune(recipe, program.out, program.tune)
    if program.folds is not None:
        from coatnet.training.cross_validation import cross_validate

        recipe = cross_validate(recipe, program.out, program.folds)
    report = train(recipe, program.out)
    if is_main_process():  # of several processes, the first one prints
        echo_summary(report.headline())
        for note in report.notes:
            echo_summary(note)
        echo_summary(f"The whole report is {program.out}/report.md, the trained model {program.out}/bundle.")
    return 0
