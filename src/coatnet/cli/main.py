"""The command line: which verbs there are, and what becomes of a mistake. `coatnet --help` does not wait for torch."""

import io
import os
import sys
from collections.abc import Callable, Sequence

from coatnet.cli.verbs.exit_codes import FAILED, INTERRUPTED, PIPE_CLOSED, USER_MISTAKE
from coatnet.cli.verbs.export import export
from coatnet.cli.verbs.finished import evaluate, features, probe, push
from coatnet.cli.verbs.looking import doctor, models, pack, plan
from coatnet.cli.verbs.predict import predict
from coatnet.cli.verbs.serve import serve
from coatnet.cli.verbs.train import train
from coatnet.errors import UserError, nearest, one_line
from coatnet.version import __version__

HELP = """\
coatnet: from a folder of images to a measured, finished classifier

  coatnet train [RECIPE] --data X --out RUN   train on images, measure, leave a finished model (a bundle)
  coatnet evaluate BUNDLE --data X            measure a finished model
  coatnet predict BUNDLE PATH... [--out F]    classify images; any number of them into a .parquet file
  coatnet features BUNDLE --data X --out F    write the features of images to a .npy or .parquet file
  coatnet probe BUNDLE --data X               judge a model's features: linear probe and nearest neighbours
  coatnet export BUNDLE --format F --out X    write it for ONNX, OpenVINO, torch, Triton or timm, and check that
  coatnet serve BUNDLE                        answer over HTTP: a page, predictions, metrics
  coatnet push BUNDLE OWNER/NAME              publish it on the Hugging Face hub
  coatnet models                              the family, with the paper's figures beside the counted ones
  coatnet doctor DATA                         find bad files, duplicates and leaks before they cost a training
  coatnet plan MODEL --gpus N --gpu-memory G  what a training on many GPUs will take, and how to start it
  coatnet pack DATA OUT                       write images as tar shards, for disks and object stores

a first hour:
  coatnet train --data fashion-mnist-small --out runs/clothes    # images that come with the package
  coatnet train --data path/to/folder --out runs/mine            # yours: a folder of images for each class
  coatnet predict runs/mine/bundle some/image.jpg

`coatnet VERB --help` tells the rest; `coatnet --version` tells the version."""


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "features": features,
    "probe": probe,
    "export": export,
    "serve": serve,
    "push": push,
    "models": models,
    "doctor": doctor,
    "plan": plan,
    "pack": pack,
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
        print(one_line(f"coatnet: error: {error}"), file=sys.stderr)
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
        print(one_line(f"coatnet: error: {error.filename}: {error.strerror}"), file=sys.stderr)
        return FAILED
