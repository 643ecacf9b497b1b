"""Text on the terminal: everything that the program prints goes through `echo`.

Class names, notes and file names come from outside. `one_line` keeps them from moving the cursor, coloring the
screen, hiding text or turning its direction.
"""

import html
import io
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from coatnet.errors import UNPRINTABLE, UserError, one_line

REPORTED_WAIT_SECONDS = 2.0


def echo(text: str, *, error: bool = False, end: str = "\n", is_json: bool = False) -> None:
    """Print lines, with control characters escaped.

    Args:
        text: lines; the caller has escaped line breaks within names (`one_line`).
        error: print to standard error.
        end: what follows the text.
        is_json: the text is JSON and stays so: what is escaped is escaped as JSON does.
    """
    if is_json:
        shown = UNPRINTABLE.sub(lambda found: found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1], text)
    else:
        shown = escape_lines(text)
    stream = sys.stderr if error else sys.stdout
    if stream is not None:  # a daemon may have closed it
        print(shown, end=end, file=stream, flush=True)


def echo_summary(text: str) -> None:
    """Print what a command has done whose result is in files: if it cannot be printed, that is a warning."""
    try:
        echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        warn(f"{error.filename}: {error.strerror}; the work is done")


@contextmanager
def summary_of_a_write(text: str) -> Iterator[None]:
    """Print what a command has found behind a block that writes it; also where the block fails, such as on a full disk,
    and then nothing is said if it cannot be printed."""
    try:
        yield
    except UserError:
        with suppress(OSError):
            echo(text)
        raise
    echo_summary(text)


class StandardStream(io.FileIO):
    """Standard output or error: its errors name it, and after one it takes everything and keeps nothing.

    So the flush at the interpreter's exit does not fail once more. A closed pipe stays a BrokenPipeError, as other
    programs of Unix have it. What standard error does not take is lost.
    """

    failed = False

    def write(self, data: Any) -> int | None:
        """Write to the descriptor. Raises OSError with the stream as its file name."""
        if not self.failed:
            try:
                return super().write(data)
            except BrokenPipeError:
                raise
            except OSError as error:
                self.failed = True
                if self.fileno() == 1:
                    raise OSError(error.errno, error.strerror, "standard output") from None
        return memoryview(data).nbytes


def prepare_streams() -> None:
    """Make the standard streams such that every text can be printed, and that their errors say what they are of.

    A closed one is opened to nowhere: otherwise the next file would get its number, and what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  it lives as long as the process
        elif isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = StandardStream(descriptor, "wb", closefd=False)
            # The encoding may lack characters of a file name.
            wrapped = io.TextIOWrapper(
                io.BufferedWriter(raw),
                stream.encoding,
                "backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, wrapped)


def warn(message: str) -> None:
    """Print one line of warning to standard error."""
    echo(one_line(f"coatnet: warning: {message}"), error=True)


def escape_lines(text: str) -> str:
    """Lines of text as they can be shown: control characters are escaped, but not the line breaks."""
    return "\n".join(map(one_line, text.split("\n")))


@contextmanager
def report_wait(what: str) -> Iterator[None]:
    """Say on standard error what the block does, such as "loading the model", if it takes more than two seconds."""
    timer = threading.Timer(REPORTED_WAIT_SECONDS, echo, (f"coatnet: {what}",), {"error": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def escape_markdown(text: str, *, begins_line: bool = True) -> str:
    """A name as a piece of a Markdown page: no markup, links, images, mentions, formulas or line breaks.

    A cell of a table begins no line, so that what would be a list or a heading there is none: `-1.20` stays as it is.
    """
    flat = one_line(" ".join(text.split()))
    flat = re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(flat, quote=False))
    # GitHub and the hub make links of bare addresses, and of a mention. An entity is no markup.
    flat = flat.replace("://", ":&#47;&#47;").replace("@", "&#64;").replace("$", "&#36;")
    flat = re.sub(r"(?i)\b(www)\.", r"\1&#46;", flat)
    if not begins_line:
        return flat
    return re.sub(r"^([#+=-]|\d+(?=[.)](?:\s|$)))", lambda found: f"{found[0][:-1]}&#{ord(found[0][-1])};", flat)
