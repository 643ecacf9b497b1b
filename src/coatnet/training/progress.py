"""What a person sees of a training: a bar on a terminal, a line every ten seconds elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows the state of a run on a console; while entered, the bar stands on its last line."""

    def __init__(self, console: Console | None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._last_line = 0.0
        columns = (
            TextColumn("{task.fields[place]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        self._bar = Progress(*columns, console=self.console, refresh_per_second=2, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=None, place="starting")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def update(
        self,
        step: int,
        total_steps: int,
        *,
        epoch: float,
        loss: float,
        learning_rate: float,
        images_per_second: float,
    ) -> None:
        """Show where the run is: after `step` of `total_steps`."""
        numbers = f"loss {loss:.3f}  learning rate {learning_rate:.1e}  {images_per_second:,.0f} images/s"
        place = f"step {step:,}/{total_steps:,}"
        self._bar.update(self._task, completed=step, total=total_steps, place=place, description=numbers)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"{place}  epoch {epoch:.2f}  {numbers}")

    def evaluated(self, step: int, epoch: float, figures: dict[str, float]) -> None:
        """A line with the figures of an evaluation."""
        shown = [(name, figures[name]) for name in ("top1", "mean_average_precision", "top5", "nll") if name in figures]
        parts = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown]
        self.say(f"epoch {epoch:.2f} (step {step:,}) on held-out pictures: " + "  ".join(parts))
