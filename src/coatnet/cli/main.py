"""The program `coatnet`: its commands, and what becomes of an error.

Each command is a module of this folder with a function `run`, imported when the command is given: `coatnet --help` does
not wait for torch.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from coatnet.cli.parser import FAILED, INTERRUPTED, PIPE_CLOSED, USER_ERROR
from coatnet.errors import (
    UserError,
    address_space,
    explain_memory_shortage,
    is_memory_shortage,
    nearest_option,
    one_line,
)
from coatnet.system.terminal import echo, prepare_streams
from coatnet.version import __version__

# In the order of a person's work: what to give, and what it does.
COMMANDS = {
    "doctor": (
        "DATA [--labels --model BUNDLE]",
        "find unreadable images, copies, leaks and wrong labels before training",
    ),
    "models": ("[MODEL ...]", "list the models: size, cost, published accuracy, pretrained weights"),
    "plan": ("MODEL --gpus N --gpu-memory GB", "estimate memory, days and the launch command of a large training"),
    "pack": ("DATA OUT", "write images as tar shards, for disks and object stores"),
    "train": ("[RECIPE] --data DATA --out RUN", "train, evaluate, and write the trained model (RUN/bundle)"),
    "evaluate": ("BUNDLE --data DATA", "measure a trained model on labeled images"),
    "calibrate": ("BUNDLE --data DATA", "calibrate its probabilities, novelty scores and prediction sets"),
    "study": ("QUESTION --data DATA --out STUDY", "compare architectures of equal cost on your images"),
    "compare": ("RUN RUN ...", "compare runs on the same images: paired intervals, where they disagree"),
    "runs": ("FOLDER", "list the runs in a folder with their figures"),
    "predict": ("BUNDLE PATH ... [--out FILE]", "classify images, as lines or into a .parquet or .csv file"),
    "explain": ("BUNDLE IMAGE ...", "write what mattered in images as heat maps; or the relative biases"),
    "features": ("BUNDLE --data DATA --out FILE", "write the features of images to a .npy or .parquet file"),
    "probe": (
        "BUNDLE --data DATA [--out FOLDER]",
        "fit a linear classifier to frozen features: its accuracy, and a model in minutes",
    ),
    "suggest": ("BUNDLE --images PATH --out FILE.csv", "rank images without labels: which to label next"),
    "soup": ("RUN RUN ... --out BUNDLE", "average the weights of models fine-tuned from the same start"),
    "extend": (
        "BUNDLE --data NEW --out BUNDLE",
        "add classes from a few images each, in seconds, and say what it costs",
    ),
    "shrink": ("BUNDLE --drop A --merge NEW=A,B --out BUNDLE", "leave classes out, or make one of several"),
    "rename": ("BUNDLE OLD=NEW ... --out BUNDLE", "give classes other names"),
    "export": ("BUNDLE --format F --out FOLDER", "export to ONNX, OpenVINO, torch, Triton or timm, and check it"),
    "serve": ("BUNDLE ...", "serve models over HTTP: a page, predictions, metrics"),
    "push": ("BUNDLE OWNER/NAME", "publish a model on the Hugging Face hub"),
}

LEAST_ADDRESS_SPACE = 1e9  # chosen: less than any build of torch takes when it is imported
COMPUTING = (
    "train",
    "evaluate",
    "calibrate",
    "compare",
    "features",
    "probe",
    "soup",
    "extend",
    "study",
    "suggest",
)  # commands that compute with torch, for minutes or hours

HELP = """\
coatnet: from a folder of images to a trained and measured classifier

commands:
{commands}

examples:
  coatnet train fashion-mnist --data fashion-mnist-small --out runs/clothes    # images of the package
  coatnet train --data path/to/folder --init auto --out runs/mine             # yours: a folder of images for each class
  coatnet predict runs/mine some/image.jpg                                    # BUNDLE is RUN/bundle, or RUN itself

`coatnet COMMAND --help` explains a command and its options; `coatnet --version` prints the version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; an error that the user can correct is one line and exit code 2."""
    prepare_streams()
    try:
        try:
            return run_command(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except UserError as error:
        echo(one_line(f"coatnet: error: {error}"), error=True)
        return USER_ERROR
    except KeyboardInterrupt:
        echo("coatnet: interrupted", error=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes standard output at its exit, which would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # a full disk, a folder without permission
            reason = f"{error.filename}: {error.strerror}"
        elif isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # of tempfile, for a library
            reason = f"{error.strerror}; TMPDIR names another"
        elif is_memory_shortage(error):
            reason = explain_memory_shortage(error)
        else:
            raise  # a bug
        echo(one_line(f"coatnet: error: {reason}"), error=True)
        return FAILED


def run_command(arguments: Sequence[str]) -> int:
    """Run the command that the arguments begin with and return its exit code."""
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "help"):
        echo(help_text())
        return 0
    if command in ("-V", "--version"):
        echo(f"coatnet {__version__}")
        return 0
    if command not in COMMANDS:
        raise UserError(
            f"there is no command {command!r}{nearest_option(command, COMMANDS)}; there are {', '.join(COMMANDS)}"
        )
    if address_space() < LEAST_ADDRESS_SPACE and not {"-h", "--help"} & set(rest):
        raise MemoryError  # before a library of numpy's or torch's ends the process in its own way
    if command in COMPUTING and not {"-h", "--help"} & set(rest):
        from coatnet.system import hardware

        if "torch" not in sys.modules:
            hardware.sleep_while_waiting_if_busy()
        # 64 images of 224 pixels through coatnet_nano_rw_224: 73 ms of CPU time an image, otherwise 155.
        hardware.keep_freed_memory()
    return import_module(f"coatnet.cli.{command}").run(rest)


def help_text() -> str:
    """The text of `coatnet --help`."""
    usages = {f"coatnet {name} {given}": purpose for name, (given, purpose) in COMMANDS.items()}
    width = max(map(len, usages))
    return HELP.format(commands="\n".join(f"  {usage:{width}}  {purpose}" for usage, purpose in usages.items()))
