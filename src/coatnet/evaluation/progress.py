"""A bar for whoever sits at a terminal, and nothing for anyone else."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, track

Item = TypeVar("Item")


def with_bar(items: Iterable[Item], doing: str, total: int) -> Iterable[Item]:
    """The same items, with a bar meanwhile."""
    console = Console(stderr=True)
    return track(items, doing, total, console=console, disable=not console.is_terminal)


@contextmanager
def counting_bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """What to call with the number done and the number in all, to move a bar."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
