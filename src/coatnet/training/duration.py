"""How long a run is: the steps of its recipe, or what fits into its minutes."""

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median

from coatnet.training.config import TrainingConfig
from coatnet.training.defaults import steps_of

RESERVE_SECONDS = 8.0  # for the report, its plots and the bundle
WARMING_STEPS = 10  # compilation and first touches of memory say nothing about the speed to come
STEPS_TOGETHER = 8  # averaged before the median: every n-th step may wait for the n worker processes
RECENT = 64  # such averages, that the speed is taken from
EVALUATION_COST = 1 / 3  # of a training image's time: there is no backward pass
FINAL_COST = 1.5  # of an evaluation on the way: the final one also gathers its report
EVALUATIONS = 12  # at most, under a limit in minutes


@dataclass
class Plan:
    """The step at which the run ends. Without a limit in minutes it is the recipe's and never changes.

    With one, it is estimated again and again from the speed so far, so that the learning rate has come down
    when the time is over. All times are seconds of training, over all resumptions.
    """

    recipe_steps: int
    evaluate_steps: int
    limit_seconds: float | None
    final_images: int  # evaluated at the end, within the limit
    batch_size: int
    total_steps: int = field(init=False)
    last_evaluation: float = 0.0
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _together: list[float] = field(default_factory=list)
    _evaluations: list[float] = field(default_factory=list)
    _warming: int = WARMING_STEPS

    def __post_init__(self) -> None:
        self.total_steps = self.recipe_steps

    def describe(self) -> str:
        """Length of the run in words."""
        limit = "" if self.limit_seconds is None else f" or {self.limit_seconds / 60:g} minutes"
        return f"{self.recipe_steps:,} steps of {self.batch_size} images{limit}"

    def timed(self, seconds: float) -> None:
        """Take in how long a step took."""
        if self._warming > 0:
            self._warming -= 1
            return
        self._together.append(seconds)
        if len(self._together) == STEPS_TOGETHER:
            self._recent.append(fmean(self._together))
            self._together.clear()

    def resumed(self, step: int, seconds: float) -> None:
        """Take in that earlier processes made `step` steps; their speed is the first estimate."""
        self.last_evaluation = seconds
        if step:
            self._recent.append(seconds / step)

    def update(self, step: int, seconds: float) -> None:
        """Estimate the last step again, with `step` steps made in `seconds`."""
        if self.limit_seconds is None:
            return
        left = self.limit_seconds - seconds - self._reserve(self.limit_seconds)
        if left <= 0:
            self.total_steps = min(step, self.recipe_steps)
        elif step_seconds := self._step_seconds():
            steps = max(1, int(left * self._share_of_steps() / step_seconds))
            self.total_steps = min(self.recipe_steps, step + steps)

    def seconds_left(self, step: int, seconds: float) -> float | None:
        """From `step`, reached after `seconds`, to the written report. None before a speed is known."""
        if not (step_seconds := self._step_seconds()):
            return None
        steps = max(0, self.total_steps - step) * step_seconds / self._share_of_steps()
        needed = steps + RESERVE_SECONDS + FINAL_COST * self._evaluation_seconds()
        return needed if self.limit_seconds is None else min(needed, max(0.0, self.limit_seconds - seconds))

    def evaluation_due(self, step: int, seconds: float) -> bool:
        """Whether to evaluate after `step` steps; the end of the run has an evaluation of its own."""
        if step % self.evaluate_steps or step >= self.total_steps:
            return False
        return self.limit_seconds is None or seconds - self.last_evaluation >= self.limit_seconds / EVALUATIONS

    def evaluated(self, seconds: float, took: float) -> None:
        """Take in that an evaluation ended at `seconds` and how long it took."""
        self.last_evaluation = seconds
        self._evaluations.append(took)

    def _step_seconds(self) -> float:
        """Of a recent step; a slow one now and then, as the machine has other work, does not count. 0 before any."""
        unfinished = [fmean(self._together)] if self._together else []
        return median([*self._recent, *unfinished]) if self._recent or unfinished else 0.0

    def _evaluation_seconds(self) -> float:
        if self._evaluations:
            return median(self._evaluations)
        return EVALUATION_COST * self._step_seconds() * self.final_images / self.batch_size

    def _share_of_steps(self) -> float:
        """Of the time to come: what evaluations on the way will take is spread over the steps between them."""
        between = max(self.evaluate_steps * self._step_seconds(), (self.limit_seconds or 0.0) / EVALUATIONS)
        return between / (between + self._evaluation_seconds())

    def _reserve(self, limit_seconds: float) -> float:
        """What the end of the run takes. While that is a guess, it takes no more than half of the limit."""
        reserve = RESERVE_SECONDS + FINAL_COST * self._evaluation_seconds()
        return reserve if self._evaluations else min(reserve, limit_seconds / 2)


def plan_for(recipe: TrainingConfig, num_images: int, final_images: int) -> Plan:
    """The plan of a complete recipe over `num_images` training images."""
    return Plan(
        recipe_steps=steps_of(recipe.epochs, num_images, recipe.batch_size),
        evaluate_steps=steps_of(recipe.evaluate_every, num_images, recipe.batch_size),
        limit_seconds=60 * recipe.max_minutes if recipe.max_minutes else None,
        final_images=final_images,
        batch_size=recipe.batch_size,
    )
