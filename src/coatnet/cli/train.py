"""`coatnet train`: train on images, evaluate, and write the trained model."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coatnet.cli.parser import DATA_HELP, Layout, spell_options
from coatnet.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from coatnet.training.config import Recipe

# What most people set; every other value of a recipe is an option too.
MAIN_OPTIONS = {
    "data": "what to learn from, see below",
    "model": "a name of `coatnet models`; auto: chosen for the data",
    "init": "model to start from: a bundle, or an id of the hub such as timm/coatnet_0_rw_224.sw_in1k",
    "freeze": "with init: parts that do not learn, such as stem,stages.0",
    "head_first_epochs": "with init: epochs in which only the classifier learns",
    "epochs": "passes over the training images",
    "batch_size": "images of one optimizer step",
    "resolution": "side of the square images that the model sees, pixels",
    "max_minutes": "time limit; the schedule is planned to end there",
    "seed": "another number, another run",
}


def parse_arguments(arguments: Sequence[str]) -> "tuple[Recipe, argparse.Namespace]":
    """The recipe that is meant (a named one, --config over it, options over both), and the rest."""
    from coatnet.training.config import Recipe, merge, read_yaml
    from coatnet.training.recipes import named

    parser = _train_parser()
    known = [option for action in parser._actions for option in action.option_strings]
    try:
        given = parser.parse_args(
            spell_options(parser.prog, known, arguments, open_group="variations"), defaults=False
        ).as_dict()
    except argparse.ArgumentError as error:
        message = " ".join(str(error).split()).replace("<class 'dict'>", "mapping such as {downsample: depthwise}")
        raise UserError(f"{message}; `coatnet train --help` shows how") from None
    shell = {key: given.pop(key, None) for key in ("recipe", "config", "out", "print_config")}
    values: dict[str, Any] = {}
    if shell["config"]:
        Recipe.from_yaml(shell["config"])  # says what is wrong with it in the file's name
        values = read_yaml(shell["config"])
    name = shell["recipe"] or values.get("name", "scratch")
    recipe = named(name, merge(values, given) | {"name": name})
    for option, value in (("--data", recipe.data), ("--out", shell["out"])):
        if not value and not shell["print_config"]:
            raise UserError(f"train needs {option}; `coatnet train --help` shows how")
    return recipe, argparse.Namespace(**shell)


def _train_parser() -> "ArgumentParser":
    """An option for every value of a recipe, parts dotted; the recipe itself checks what it is given."""
    from jsonargparse import ArgumentParser

    from coatnet.training.config import options
    from coatnet.training.recipes import RECIPES

    purposes = "\n".join(f"  {name:25} {row.purpose}" for name, row in RECIPES.items())
    parser = ArgumentParser(
        "coatnet train",
        usage="coatnet train [RECIPE] --data X --out RUN [options]",
        description="Train on images, measure, and leave in RUN recipe, curves, report and a finished\n"
        "model (RUN/bundle). The same command again resumes where it stopped; Ctrl-C stops it safely.",
        epilog="examples:\n"
        "  coatnet train --data fashion-mnist-small --out runs/clothes\n"
        "  coatnet train --data path/to/folder --out runs/mine --epochs 20 --optimizer.learning_rate 3e-4\n"
        "  coatnet train finetune --init runs/mine/bundle --data other/folder --out runs/other\n"
        "  coatnet train --config runs/mine/recipe.yaml --out runs/again     # repeats a run\n\n"
        f"{DATA_HELP}\n\nrecipes:\n{purposes}",
        formatter_class=Layout,
        allow_abbrev=False,
        exit_on_error=False,
        print_config=None,
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="what the values start from, see below (scratch)")
    main = parser.add_argument_group("the main options")
    rest = parser.add_argument_group("every other value", "What is not given is decided by the recipe, or by the data.")
    main.add_argument("--out", metavar="RUN", help="folder of the run, new or to be resumed")
    main.add_argument("--config", metavar="FILE", help="YAML with values over the recipe's; options go over both")
    main.add_argument("--print_config", action="store_true", help="print the recipe as YAML and do not train")
    for name, each in options().items():
        hint = each.annotation
        if name in MAIN_OPTIONS:
            main.add_argument(f"--{name}", type=_read_as(hint), metavar="X", help=MAIN_OPTIONS[name])
        elif name == "variations":
            rest.add_argument("--variations", type=dict, metavar="X", help="such as --variations.downsample depthwise")
        elif name == "loggers":
            rest.add_argument("--loggers", type=Any, metavar="X", help="told the figures too: tensorboard,wandb,mlflow")
        elif hint is bool:
            rest.add_argument(f"--{name}", type=Any, nargs="?", const=True, metavar="X", help=_in_words(hint))
        elif name != "name":
            rest.add_argument(f"--{name}", type=_read_as(hint), metavar="X", help=_in_words(hint))
    return parser


def _read_as(hint: Any) -> Any:
    """Texts stay texts; anything else is read as YAML is, and the recipe says what is wrong with it."""
    return hint if hint is str else Any


def _in_words(hint: Any) -> str:
    from coatnet.system.validated import describe

    return describe(hint)


def run(arguments: Sequence[str]) -> int:
    """Train, evaluate, and write the trained model."""
    recipe, given = parse_arguments(arguments)
    if given.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    from coatnet.training.trainer import train

    report = train(recipe, given.out)
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one prints
        print(report.headline())
        print(f"The whole report is {given.out}/report.md, the trained model {given.out}/bundle.")
    return 0
