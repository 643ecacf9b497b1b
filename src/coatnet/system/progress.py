"""Progress bars: on standard error, gone when the work is done; a line if that is not a terminal."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from coatnet.system.terminal import report_wait

T = TypeVar("T")


class ProgressBar:
    """A bar for the duration of a `with` block.

    If standard error is not a terminal, a line says what is being done once it takes more than two seconds.

    Args:
        description: what is being done, such as "packing".
        total: the amount of work; None if `update` will say it.
        unit: of the amounts, such as "images".
        shown: False hides the bar, for all but one of several processes.
    """

    def __init__(self, description: str, total: float | None = None, unit: str = "", *, shown: bool = True) -> None:
        console = Console(stderr=True, highlight=False)
        amount = "{task.percentage:>3.0f}%" if total is None else "{task.completed:,.0f}/{task.total:,.0f} " + unit
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn(amount),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        hidden = not (shown and console.is_terminal)
        self._line = report_wait(description) if shown and hidden else nullcontext()
        self._progress = Progress(*columns, console=console, transient=True, disable=hidden)
        self._task = self._progress.add_task(description, total=total)

    def __enter__(self) -> "ProgressBar":
        self._line.__enter__()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._progress.disable:  # before version 14, rich ends a line for a bar that is not shown
            self._progress.stop()
        self._line.__exit__(kind, error, traceback)

    def advance(self, amount: float = 1) -> None:
        """Add to the work done."""
        self._progress.advance(self._task, amount)

    def update(self, done: float, total: float) -> None:
        """Set the work done and the total."""
        self._progress.update(self._task, completed=done, total=total)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield the items and advance a bar after each."""
    with ProgressBar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()
