"""The command line: a verb reads its arguments, calls one function of the package and prints what it returns.

Only what a verb needs is imported, when it runs: `coatnet --help` does not wait for torch.
"""

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from coatnet import __version__
from coatnet.arguments import (
    doctor_arguments,
    evaluate_arguments,
    models_arguments,
    predict_arguments,
    train_arguments,
)
from coatnet.errors import UserError
from coatnet.runtime import best_device
from coatnet.suggestions import nearest

if TYPE_CHECKING:
    from coatnet.evaluation.prediction import Prediction

HELP = """\
coatnet: from a folder of pictures to a measured, finished classifier

  coatnet train [RECIPE] --data X --out RUN   train on pictures, measure, leave a finished model (a bundle)
  coatnet evaluate BUNDLE --data X            measure a finished model
  coatnet predict BUNDLE PATH...              classify pictures and folders of pictures
  coatnet models                              the family, with the paper's figures beside the counted ones
  coatnet doctor DATA                         find bad files, duplicates and leaks before they cost a training

a first hour:
  coatnet train --data fashion-mnist-small --out runs/clothes    # pictures that come with the package
  coatnet train --data path/to/folder --out runs/mine            # yours: a folder of pictures for each class
  coatnet predict runs/mine/bundle some/picture.jpg

`coatnet VERB --help` tells the rest; `coatnet --version` tells the version."""

FAILED, USER_MISTAKE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141


def train(arguments: Sequence[str]) -> int:
    """Train, measure, and leave a finished model."""
    recipe, given = train_arguments(arguments)
    if given.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    from coatnet.training.trainer import train as train_recipe

    print(train_recipe(recipe, given.out).headline())
    print(f"The whole report is {given.out}/report.md, the finished model {given.out}/bundle.")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Measure a finished model."""
    given = evaluate_arguments(arguments)
    from coatnet.bundle import load
    from coatnet.evaluation.evaluate import evaluate as evaluate_bundle

    bundle = load(given.bundle)
    bundle.model.to(best_device())
    report = evaluate_bundle(bundle, given.data, split=given.split)
    print(report.to_json() if given.json else report.to_markdown(), end="")
    return 0


def predict(arguments: Sequence[str]) -> int:
    """Classify pictures."""
    given = predict_arguments(arguments)
    from coatnet.bundle import load
    from coatnet.evaluation.prediction import predict as predict_pictures

    bad = 0
    bundle = load(given.bundle)
    bundle.model.to(best_device())
    for answer in predict_pictures(bundle, given.paths, top_k=given.top_k, batch_size=given.batch_size):
        show_prediction(answer, given.json)
        bad += answer.error is not None
    return FAILED if bad else 0


def show_prediction(answer: "Prediction", as_json: bool) -> None:
    """One line; what is wrong with a bad file goes to standard error, so that the answers stay clean."""
    found = dict(zip(answer.classes, answer.probabilities, strict=True))
    if as_json:
        line = {"path": str(answer.path), "error": answer.error, "probabilities": found}
        print(json.dumps(line, ensure_ascii=False), flush=True)
    elif answer.error is not None:
        print(f"coatnet: error: {answer.path}: {answer.error}", file=sys.stderr)
    else:
        print(f"{answer.path}: {', '.join(f'{name} {100 * p:.1f} %' for name, p in found.items())}", flush=True)


def models(arguments: Sequence[str]) -> int:
    """The family."""
    given = models_arguments(arguments)
    from rich.console import Console

    from coatnet.family import measure_family, show_family

    rows = measure_family(given.names, shown_only=not given.json)
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        show_family(rows, Console(highlight=False))
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Look a data source over before training on it."""
    given = doctor_arguments(arguments)
    from coatnet.data.inspection import inspect

    inspection = inspect(given.data, strict=given.strict)
    print(inspection.describe())
    return 0 if inspection.healthy else FAILED


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "models": models,
    "doctor": doctor,
}


def dispatch(arguments: Sequence[str]) -> int:
    """Runs the verb and gives its exit code."""
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if verb == "--version":
        print(f"coatnet {__version__}")
        return 0
    if verb not in VERBS:
        raise UserError(f"there is no verb {verb!r}{nearest(verb, VERBS)}; there are {', '.join(VERBS)}")
    return VERBS[verb](rest)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program `coatnet`: a mistake of the person at the keyboard is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name need not be text in this encoding
    try:
        code = dispatch(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"coatnet: error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("coatnet: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Or the interpreter complains at its exit, when it flushes what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:  # a full disk, a folder that is not ours; without a file name it is a mistake of ours
        if error.filename is None:
            raise
        print(f"coatnet: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return FAILED
