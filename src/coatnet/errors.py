"""Mistakes of the person at the keyboard, told apart from mistakes of ours, and each on one line."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class UserError(ValueError):
    """One line: what was given, what is wrong with it, what would be right.

    The command line prints it and exits with code 2; a traceback is for our own mistakes.
    """


def first_line(error: BaseException) -> str:
    """What an error of others says, as far as one line goes; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def one_line(text: str) -> str:
    r"""The text with its control characters, which break lines and move cursors, as \n, \x1b and the like."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def nearest(given: str, known: Iterable[str], most: int = 1) -> str:
    """` (did you mean 'x' or 'y'?)` to append to a message, `most` names at the most; empty if nothing is near."""
    matches = get_close_matches(given, list(known), n=most)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""


def few(names: Sequence[str]) -> str:
    """`cat, dog, fox, hen, owl and 7 more`: the first five of them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
