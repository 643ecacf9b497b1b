"""Exit codes of the program, and the error lines of files that were left out."""

import sys
from collections.abc import Mapping

from coatnet.errors import one_line

FAILED = 1  # unreadable images, an unhealthy data source, a file that the system refuses
USER_ERROR = 2  # a wrong argument or value; nothing was done
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE
TERMINATED = 143  # 128 + SIGTERM


def print_unreadable(reasons: Mapping[str, str]) -> int:
    """Print one error line for each image that was left out, by its name; return the exit code, FAILED if any."""
    for name, reason in reasons.items():
        print(one_line(f"coatnet: error: {name}: {reason}"), file=sys.stderr)
    return FAILED if reasons else 0
