"""What the verbs share: argparse with room for examples, and one line for a mistake."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from coatnet.errors import UserError, nearest

DATA_HELP = """\
data (what --data takes):
  path/to/folder        images in one folder for each class; train/ and val/ folders are honoured
  labels.csv            a manifest (.csv, .tsv, .parquet) with columns path,label and perhaps split;
                        several labels for an image are separated by ; or |
  fashion-mnist-small   12,000 images of clothes that come with the package; also: digits
  fashion-mnist         all 70,000 of them, if they are on this machine or can be fetched"""

BUNDLE_HELP = "finished model: a folder such as RUN/bundle, or an id on the hub such as timm/coatnet_0_rw_224.sw_in1k"


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
