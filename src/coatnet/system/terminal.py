"""Text on the terminal: everything that the program prints goes through `echo`.

Class names, notes and file names come from outside. `one_line` keeps them from moving the cursor, colouring the
screen, hiding text or turning its direction.
"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from coatnet.errors import UNPRINTABLE, one_line

TELL_SECONDS = 2.0


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


def warn(message: str) -> None:
    """Print one line of warning to standard error."""
    echo(one_line(f"coatnet: warning: {message}"), error=True)


def escape_lines(text: str) -> str:
    """Lines of text as they can be shown: control characters are escaped, but not the line breaks."""
    return "\n".join(map(one_line, text.split("\n")))


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Say on standard error what the block does, such as "loading the model", if it takes more than two seconds."""
    timer = threading.Timer(TELL_SECONDS, echo, (f"coatnet: {what}",), {"error": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
