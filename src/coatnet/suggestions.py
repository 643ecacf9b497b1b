"""Words for messages: the nearest right one to a wrong one, and the first of many."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def nearest(given: str, known: Iterable[str], most: int = 1) -> str:
    """` (did you mean 'x' or 'y'?)` to append to a message, `most` names at the most; empty if nothing is near."""
    matches = get_close_matches(given, list(known), n=most)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""


def few(names: Sequence[str]) -> str:
    """`cat, dog, fox, hen, owl and 7 more`: the first five of them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
