"""Progress of a training on the console: a bar on a terminal, otherwise a line every ten seconds."""

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from coatnet.system.terminal import escape_lines

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows a run on a console; while entered, the bar is on its last line."""

    def __init__(self, console: Console | None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._last_line = 0.0
        self._position, self._left = "starting", ""
        columns = (
            TextColumn("{task.fields[position]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            # rich's own estimate restarts whenever the total changes, and ignores steps of half a minute
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=self.console, refresh_per_second=2, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=None, position=self._position, left=self._left)

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:  # before version 14, rich ends a line for a bar that is not shown
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print lines that stay."""
        self.console.print(escape_lines(text), markup=False, emoji=False)

    def moved(self, step: int, total_steps: int, seconds_left: float | None) -> None:
        """Show that `step` of `total_steps` are done."""
        self._position = f"step {step:,}/{total_steps:,}"
        self._left = "" if seconds_left is None else f"{timedelta(seconds=round(seconds_left))} left"
        self._bar.update(self._task, completed=step, total=total_steps, position=self._position, left=self._left)

    def logged(self, *, epoch: float, loss: float, learning_rate: float, images_per_second: float) -> None:
        """Show figures of training; without a terminal in a line, at most every ten seconds."""
        numbers = f"loss {loss:.3f}  learning rate {learning_rate:.1e}  {images_per_second:,.0f} images/s"
        self._bar.update(self._task, description=numbers)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"{self._position}  epoch {epoch:.2f}  {numbers}  {self._left}".rstrip())

    def evaluated(self, step: int, epoch: float, figures: dict[str, float]) -> None:
        """Print a line with the figures of an evaluation."""
        shown = [(name, figures[name]) for name in ("top1", "mean_average_precision", "top5", "nll") if name in figures]
        parts = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown]
        self.say(f"epoch {epoch:.2f} (step {step:,}) on held-out images: " + "  ".join(parts))
