"""The nearest right word to a wrong one, for error messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(given: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` to append to a message; empty if nothing is near."""
    matches = get_close_matches(given, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
