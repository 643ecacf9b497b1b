"""Ctrl-C while modules are imported ends the program at once, with one line.

The first seconds of a command are imports. There a KeyboardInterrupt would be a traceback, before `main` is reached, or
whatever a half-imported C extension makes of it. `coatnet/__init__.py` imports this module first, and it does nothing
in other programs.
"""

import os
import signal
import sys

TYPE_CHECKING = False  # as in typing, which takes longer to import than the rest of `coatnet --help`
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def is_program(command_line: "Sequence[str]") -> bool:
    """Whether a command line of Python runs the program `coatnet`: as a script, or by `-m coatnet`."""
    first = next((argument for argument in command_line[1:] if not argument.startswith("-")), "")
    return os.path.splitext(os.path.basename(first))[0] == "coatnet"


def end_if_importing(number: int, frame: "FrameType | None") -> None:
    """Handle SIGINT: end the process if an import is in progress. Raises KeyboardInterrupt otherwise."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"coatnet: interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


if is_program(getattr(sys, "orig_argv", ())) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_if_importing)
