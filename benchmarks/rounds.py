"""Measure contenders in alternating rounds, so that a change of the machine meets all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name")


def alternate(
    works: Mapping[Name, Callable[[], float]], rounds: int, warming: int, rest: float = 0.0
) -> dict[Name, list[float]]:
    """What each work returns, such as its seconds (`timed`), in each counted round.

    Args:
        works: by name; they are called in turn.
        rounds: that are counted.
        warming: rounds before them.
        rest: seconds to wait before each call.
    """
    figures: dict[Name, list[float]] = {name: [] for name in works}
    for number in range(warming + rounds):
        for name, work in works.items():
            time.sleep(rest)
            figure = work()
            if number >= warming:
                figures[name].append(figure)
    return figures


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A function that does the work and returns the seconds that it took."""

    def seconds() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return seconds


def spread(values: Sequence[float], form: str = ".2f", unit: str = "", between: str = "to") -> str:
    """The median, then the least and the greatest value: `1.04 (0.98 to 1.11)`."""
    middle, low, high = (format(each, form) for each in (statistics.median(values), min(values), max(values)))
    return f"{middle}{unit} ({low.strip()} {between} {high.strip()})"
