"""What each verb of the command line accepts, its help, and the one line that answers a mistake."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from coatnet.errors import UserError
from coatnet.suggestions import nearest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from coatnet.training.recipe import Recipe

DATA_HELP = """\
data (what --data takes):
  path/to/folder        pictures in one folder for each class; train/ and val/ folders are honoured
  labels.csv            a manifest (.csv, .tsv, .parquet) with columns path,label and perhaps split;
                        several labels for a picture are separated by ; or |
  fashion-mnist-small   12,000 pictures of clothes that come with the package; also: digits
  fashion-mnist         all 70,000 of them, if they are on this machine or can be fetched"""

BUNDLE_HELP = "folder of a finished model, such as RUN/bundle"


def refuse_unknown_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Raises UserError with the nearest right option: a slip costs one look, not the whole help."""
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        option = argument.partition("=")[0]
        if option == "--":
            return
        if option.startswith("--") and option not in known and not option.startswith("--variations."):
            part, _, name = option.partition(".")
            names = [other.removeprefix(f"{part}.") for other in known if other.startswith(f"{part}.")]
            hint = f"{nearest(name, names)}; {part[2:]} has {', '.join(names)}"
            if not names:
                hint = f"{nearest(option, known)}; --help lists them"
            raise UserError(f"{parser.prog} has no option {option}{hint}")


class Layout(argparse.RawDescriptionHelpFormatter):
    """Help with room for dotted options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=42, width=110)


class Parser(argparse.ArgumentParser):
    """argparse with examples in its help and one line for a mistake."""

    def __init__(self, verb: str, description: str, epilog: str) -> None:
        super().__init__(f"coatnet {verb}", None, description, epilog, formatter_class=Layout, allow_abbrev=False)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        refuse_unknown_options(self, arguments)
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows how")


def evaluate_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "evaluate",
        "Measure a finished model: top-1, top-5, likelihood, calibration, every class (several labels: mAP).",
        "examples:\n"
        "  coatnet evaluate runs/clothes/bundle --data fashion-mnist-small\n"
        "  coatnet evaluate runs/mine/bundle --data other/pictures --split all --json > report.json\n\n"
        f"{DATA_HELP}",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--data", required=True, metavar="X", help="what to measure on; classes are matched by name")
    parser.add_argument("--split", choices=("validation", "training", "all"), default="validation", help="which part")
    parser.add_argument("--json", action="store_true", help="numbers for a program rather than a page for people")
    return parser.parse(arguments)


def predict_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "predict",
        "Classify pictures, one line each. A file that is no picture gets its own line, and exit code 1.",
        "examples:\n"
        "  coatnet predict runs/mine/bundle holiday.jpg more/pictures\n"
        "  coatnet predict runs/mine/bundle more/pictures --top-k 1 --json > answers.jsonl",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="pictures, and folders of pictures")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="answers for each picture (5)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at once (32)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line rather than words")
    return parser.parse(arguments)


def models_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "models",
        "The family: parameters, and multiply-accumulates of one image at 224, 384 and 512 pixels (the table:\n"
        "only of the paper's rows), counted as you wait, with the paper's figures beside them.",
        "examples:\n  coatnet models\n  coatnet models coatnet-0 coatnet-1 --json",
    )
    parser.add_argument("names", nargs="*", metavar="MODEL", help="only these")
    parser.add_argument("--json", action="store_true", help="numbers for a program rather than a table for people")
    return parser.parse(arguments)


def doctor_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "doctor",
        "Read every picture and say what is there: which files are bad and why, and which pictures stand\n"
        "both in training and in validation. Exit code 1 if something is wrong.",
        f"examples:\n  coatnet doctor path/to/folder\n  coatnet doctor labels.csv --strict\n\n{DATA_HELP}",
    )
    parser.add_argument("data", metavar="DATA", help="a data source, see below")
    parser.add_argument("--strict", action="store_true", help="also name files that decode only with a warning")
    return parser.parse(arguments)


# What most people set; every other value of a recipe is an option too.
MAIN_OPTIONS = {
    "data": "what to learn from, see below",
    "model": "a name of `coatnet models`; auto: chosen for the data",
    "init": "bundle to start from, for fine-tuning",
    "epochs": "passes over the training pictures",
    "batch_size": "pictures of one optimizer step",
    "resolution": "side of the square pictures that the model sees, pixels",
    "max_minutes": "time limit; the schedule is planned to end there",
    "seed": "another number, another run",
}


def train_arguments(arguments: Sequence[str]) -> "tuple[Recipe, argparse.Namespace]":
    """The recipe that is meant (a named one, --config over it, options over both), and the rest."""
    from coatnet.training.recipe import Recipe
    from coatnet.training.recipes import merge, named
    from coatnet.training.values import read_yaml

    spelt = [_underscored(argument) for argument in arguments]
    parser = _train_parser()
    refuse_unknown_options(parser, spelt)
    try:
        given = parser.parse_args(spelt, defaults=False).as_dict()
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

    from coatnet.training.recipe import options
    from coatnet.training.recipes import RECIPES

    purposes = "\n".join(f"  {name:25} {row.purpose}" for name, row in RECIPES.items())
    parser = ArgumentParser(
        "coatnet train",
        usage="coatnet train [RECIPE] --data X --out RUN [options]",
        description="Train on pictures, measure, and leave in RUN recipe, curves, report and a finished\n"
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
    for name, hint in options().items():
        if name in MAIN_OPTIONS:
            main.add_argument(f"--{name}", type=_read_as(hint), metavar="X", help=MAIN_OPTIONS[name])
        elif name == "variations":
            rest.add_argument("--variations", type=dict, metavar="X", help="such as --variations.downsample depthwise")
        elif hint is bool:
            rest.add_argument(f"--{name}", type=Any, nargs="?", const=True, metavar="X", help=_in_words(hint))
        elif name != "name":
            rest.add_argument(f"--{name}", type=_read_as(hint), metavar="X", help=_in_words(hint))
    return parser


def _read_as(hint: Any) -> Any:
    """Texts stay texts; anything else is read as YAML is, and the recipe says what is wrong with it."""
    return hint if hint in (str, str | None) else Any


def _in_words(hint: Any) -> str:
    from coatnet.training.values import describe

    return describe(hint).removesuffix(" or null")


def _underscored(argument: str) -> str:
    """--batch-size as --batch_size: both spellings are right."""
    option, equals, value = argument.partition("=")
    return option[:2] + option[2:].replace("-", "_") + equals + value if option.startswith("--") else argument
