"""What the commands share: the argument parser with examples in its help, exit codes, errors of one line."""

import argparse
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from coatnet.errors import UserError, cut, nearest, nearest_option, one_line, without_credentials
from coatnet.public_names import renamed_message
from coatnet.system.files import output_path
from coatnet.system.interrupt import INTERRUPTED as INTERRUPTED
from coatnet.system.terminal import echo

MAX_MEGAPIXELS = "COATNET_MAX_MEGAPIXELS"  # read by `data.decode`
_OUTPUTS = ("out", "write", "html", "tile_maps")  # arguments that name what is written

FAILED = 1  # unreadable images, an unhealthy data source, a file that the system refuses
USER_ERROR = 2  # a wrong argument or value; nothing was done
PIPE_CLOSED = 141  # 128 + SIGPIPE
TERMINATED = 143  # 128 + SIGTERM


def print_unreadable(reasons: Mapping[str, str]) -> int:
    """Print one error line for each image that was left out, by its name; return the exit code, FAILED if any."""
    for name, reason in reasons.items():
        echo(cut(one_line(f"coatnet: error: {without_credentials(name)}: {reason}")), error=True)
    return FAILED if reasons else 0


DATA_HELP = """\
DATA is one of:
  path/to/folder        images in one folder for each class, or in train/ and val/ with such folders in them
  labels.csv            a manifest (.csv, .tsv, .parquet) with the columns path, label and, optionally, split;
                        several labels of one image are separated by ; or |
  fashion-mnist-small   12,000 images of clothes that come with the package; also: digits
  fashion-mnist         all 70,000 of them, if they are on this machine or can be downloaded"""

BUNDLE_HELP = (
    "trained model: a bundle such as RUN/bundle, its run folder RUN, or an id of the Hugging Face hub such as "
    "timm/coatnet_0_rw_224.sw_in1k"
)


class Layout(argparse.RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of descriptions and leaves room for dotted options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=42, width=110)


class _Positional(str):
    """An argument behind `--`, which is not an option whatever it begins with."""


class Parser(argparse.ArgumentParser):
    """The parser of one command: options in both spellings (`--top-k`, `--top_k`), an error is one line."""

    def __init__(self, command: str, description: str, epilog: str) -> None:
        super().__init__(f"coatnet {command}", None, description, epilog, formatter_class=Layout, allow_abbrev=False)
        self._renamed: dict[str, tuple[str, str]] = {}

    def add_device(self) -> None:
        """Add the option `--device`."""
        self.add_argument(
            "--device", default="auto", metavar="D", help="cpu, cuda or cuda:N (auto: the first GPU if there is one)"
        )

    def add_batch_size(self, default: int = 64, counts: str = "images") -> None:
        """Add the option `--batch-size`."""
        self.add_argument(
            "--batch-size", type=int, default=default, metavar="N", help=f"{counts} computed together ({default})"
        )

    def add_engine(self) -> None:
        """Add the options `--engine` and `--precision`."""
        self.add_argument(
            "--engine",
            default="auto",
            metavar="E",
            help="what computes: torch, torch-compiled, openvino, onnxruntime (auto: the fastest that is installed)",
        )
        self.add_argument(
            "--precision", default="auto", metavar="P", help="fp32, or bf16 (auto: bf16 where it is faster)"
        )

    def add_views(self) -> None:
        """Add `--views`, whose values `check_views` checks: their list is not imported for the help."""
        self.add_argument(
            "--views",
            default="one",
            metavar="V",
            help="test-time augmentation, averaged over views: one, flip, five-crop, ten-crop, ten-shift (one)",
        )

    def add_calibrated(self) -> None:
        """Add the options for answers of a calibrated model; `calibrated_options` passes them on."""
        self.add_argument(
            "--reject",
            type=float,
            metavar="RATE",
            help="answer `unknown` to images that look foreign, and to this share of known ones (0.05 is 5 %%)",
        )
        self.add_argument(
            "--set",
            type=float,
            dest="coverage",
            metavar="COVERAGE",
            help="also give the smallest set of classes that holds the truth so often (0.9: for 90 %% of the images)",
        )
        self.add_argument(
            "--set-method",
            metavar="M",
            help="lac: the smallest sets; aps, raps: sets that grow with the doubt about an image (lac)",
        )
        self.add_argument("--raw", action="store_true", help="the network's own probabilities, without calibration")

    def add_form(self, printed: str) -> None:
        """Add `--json` and `--markdown`, for a command that prints a document."""
        form = self.add_mutually_exclusive_group()
        form.add_argument("--json", action="store_true", help=f"print the {printed} as JSON, for a program")
        form.add_argument("--markdown", action="store_true", help="print Markdown on a terminal too, as into a pipe")

    def add_max_megapixels(self) -> None:
        """Add the option `--max-megapixels`, which `parse` passes on to all processes in the environment."""
        self.add_argument(
            "--max-megapixels",
            default=argparse.SUPPRESS,
            type=_megapixels,
            metavar="M",
            help="Most million pixels of an image (200); a third of it in WebP, AVIF, HEIC and JPEG 2000.",
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments behind the command. Raises UserError for anything that is wrong with them."""
        options = [option for action in self._actions for option in action.option_strings]
        spelled = spell_options(self.prog, [*options, *self._renamed], arguments)
        before = spelled[: spelled.index("--")] if "--" in spelled else spelled
        behind = map(_Positional, spelled[len(before) + 1 :])
        given = self.parse_intermixed_args([*map(self._renamed_now, before), *behind])
        if megapixels := vars(given).pop("max_megapixels", None):
            os.environ[MAX_MEGAPIXELS] = megapixels
        for action in self._actions:
            path, name = vars(given).get(action.dest), (action.option_strings or [action.metavar])[0]
            if path == "" and action.dest in (*_OUTPUTS, "data"):
                self.error(f"{name} is empty: give a path")
            if path and action.dest in _OUTPUTS:
                output_path(path)  # before any work
        return given

    def _parse_optional(self, arg_string: str) -> Any:  # argparse loses a "--" before the first positional argument
        return None if isinstance(arg_string, _Positional) else super()._parse_optional(arg_string)

    def rename_option(self, old: str, new: str, *, since: str, removed_in: str) -> None:
        """Accept the old name of an option for one more release, with a warning that names the new one."""
        self._renamed[old] = (new, renamed_message(old, new, since=since, removed_in=removed_in))

    def _renamed_now(self, argument: str) -> str:
        option, equals, value = argument.partition("=")
        if option not in self._renamed:
            return argument
        new, message = self._renamed[option]
        echo(f"coatnet: warning: {message}", error=True)
        return new + equals + value

    def error(self, message: str) -> NoReturn:
        if choice := re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message):
            option, given, known = choice[1], choice[2], choice[3].replace("'", "")
            message = f"{option} {given!r} is unknown{nearest(given, known.split(', '))}; it is one of {known}"
        raise UserError(f"{message}; `{self.prog} --help` shows how")


def calibrated_options(given: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_calibrated` as arguments of `Predictor`. Raises UserError for a method without sets."""
    if given.set_method is not None and given.coverage is None:
        raise UserError("--set-method says how the sets of --set are made: give --set as well, such as --set 0.9")
    options = {name: getattr(given, name) for name in ("reject", "coverage", "raw")}
    return options | {"set_method": given.set_method or "lac"}


def _megapixels(text: str) -> str:
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number of megapixels, such as 400")
    return text


def spell_options(prog: str, known: Iterable[str], arguments: Sequence[str]) -> list[str]:
    """The arguments with every option spelled as in `known`, hyphens and underscores being equal.

    Args:
        prog: the command, for the error.
        known: all options; those of a group have dotted names, such as `--optimizer.learning_rate`.

    Raises:
        UserError: if an option is unknown; the message names the nearest one, or all of its group.
    """
    spellings = {option.replace("_", "-"): option for option in known}
    spelled = []
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--":
            return [*spelled, *arguments[index:]]
        if option.startswith("--") or re.match("-[a-zA-Z]", option):
            if (key := option.replace("_", "-")) not in spellings:
                raise UserError(f"{prog} has no option {option}{_hint(option, spellings.values())}")
            option = spellings[key]
        spelled.append(option + equals + value)
    return spelled


def _hint(option: str, known: Iterable[str]) -> str:
    """What to say about an unknown option: the names of its group, or the nearest of all options."""
    group, _, rest = option.partition(".")
    names = [other.removeprefix(f"{group}.") for other in known if other.startswith(f"{group}.")]
    if names:
        return f"{nearest_option(rest, names)}; {group.lstrip('-')} has {', '.join(names)}"
    return f"{nearest_option(option, known)}; --help lists them"
