"""The nearest right word to a wrong one, for error messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(given: str, known: Iterable[str], most: int = 1) -> str:
    """` (did you mean 'x' or 'y'?)` to append to a message, `most` names at the most; empty if nothing is near."""
    matches = get_close_matches(given, list(known), n=most)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""
