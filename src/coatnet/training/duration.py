"""The length of a run: the steps of its epochs, or what fits into its limit in minutes."""

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median

from coatnet.errors import counted
from coatnet.training.config import TrainingConfig
from coatnet.training.defaults import num_steps
from coatnet.training.progressive_resizing import ProgressiveResizing

RESERVE_SECONDS = 8.0  # for the report, its plots and the bundle
WARMUP_STEPS = 10  # compilation and first touches of memory say nothing about the speed to come
STEPS_PER_MEAN = 8  # averaged before the median is taken: every n-th step may wait for the n worker processes
RECENT_MEANS = 64  # such means that the speed is the median of
EVALUATION_COST = 1 / 3  # of a training image's time: there is no backward pass
FINAL_EVALUATION_COST = 1.5  # of the time of an evaluation on the way: features are gathered, in float32
MAX_EVALUATIONS = 12  # if evaluate_every is auto
EVALUATION_SHARE = 1 / 20  # of the time, if evaluate_every is auto


@dataclass
class Duration:
    """The step at which a run ends. Without a limit in minutes it is that of its epochs and never changes.

    With a limit, `update` estimates it from the speed so far, so that the learning rate has come down when the time is
    over. All times are seconds of training, over all resumptions.

    Attributes:
        recipe_steps: steps of the configured epochs, the most that are taken.
        evaluate_steps: steps between two evaluations.
        limit_seconds: the limit, or None.
        num_validation_images: images of an evaluation.
        batch_size: images of a step.
        resizing: how the size of the images grows, with which a step takes longer.
        paced: whether evaluations wait until all of them have taken a twentieth of the time.
        num_other_final_images: images that are measured at the end, beside those of an evaluation.
        num_processes: that share an evaluation on the way; one of them makes the last.
        reading_seconds: what an image takes longer at the end, since its file is read again.
        total_steps: the estimate of the last step.
        last_evaluation: seconds after which the last evaluation ended.
    """

    recipe_steps: int
    evaluate_steps: int
    limit_seconds: float | None
    num_validation_images: int
    batch_size: int
    resizing: ProgressiveResizing = field(default_factory=ProgressiveResizing)
    paced: bool = False
    num_other_final_images: int = 0
    num_processes: int = 1
    reading_seconds: float = 0.0
    total_steps: int = field(init=False)
    last_evaluation: float = 0.0
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_MEANS))
    _unfinished: list[float] = field(default_factory=list)  # steps of the mean to come
    _evaluations: list[float] = field(default_factory=list)
    _evaluating: float = 0.0  # seconds of all evaluations, over all resumptions
    _warming_up: int = WARMUP_STEPS

    def __post_init__(self) -> None:
        self.total_steps = self.recipe_steps

    @classmethod
    def of(
        cls,
        config: TrainingConfig,
        num_images: int,
        num_validation_images: int,
        num_other_final_images: int = 0,
        num_processes: int = 1,
    ) -> "Duration":
        """The length of a run over `num_images` training images.

        Where `evaluate_every` is auto, evaluations depend on measured times only if the weights of the bundle do not
        depend on them: with `patience` and without a limit in minutes, the numbers of images alone decide.
        """
        every, chosen = config.evaluate_every, config.evaluate_every == "auto"
        if every == "auto":
            epochs = EVALUATION_COST * num_validation_images / num_images / config.progressive_resizing.cost_after(0.0)
            every = max(1.0, math.ceil(epochs / EVALUATION_SHARE))
            every = every if config.max_minutes else max(every, round(config.epochs / MAX_EVALUATIONS))
        return cls(
            recipe_steps=num_steps(config.epochs, num_images, config.batch_size),
            evaluate_steps=num_steps(every, num_images, config.batch_size),
            paced=chosen and bool(config.max_minutes or not config.patience),
            limit_seconds=60 * config.max_minutes if config.max_minutes else None,
            num_validation_images=num_validation_images,
            batch_size=config.batch_size,
            num_other_final_images=num_other_final_images,
            num_processes=num_processes,
            resizing=config.progressive_resizing,
        )

    @property
    def num_final_images(self) -> int:
        """Images that are measured at the end."""
        return self.num_validation_images + self.num_other_final_images

    def describe(self) -> str:
        """The length in words."""
        limit = "" if self.limit_seconds is None else f" or {self.limit_seconds / 60:g} minutes"
        return f"{counted(self.recipe_steps, 'step')} of {counted(self.batch_size, 'image')}{limit}"

    def add_step(self, seconds: float, cost: float = 1.0) -> None:
        """Take in the duration of a step, whose images have `cost` times the pixels of full size."""
        if self._warming_up > 0:
            self._warming_up -= 1
            return
        self._unfinished.append(seconds / cost)
        if len(self._unfinished) == STEPS_PER_MEAN:
            self._recent.append(fmean(self._unfinished))
            self._unfinished.clear()

    def add_evaluation(self, seconds: float, duration: float) -> None:
        """Take in an evaluation that ended after `seconds` and its duration."""
        self.last_evaluation = seconds
        self._evaluations.append(duration)
        self._evaluating += duration

    def resume(self, step: int, seconds: float) -> None:
        """Continue after `step` steps of earlier processes; their speed is the first estimate."""
        self.last_evaluation = seconds
        self._evaluating = EVALUATION_SHARE * seconds  # at most
        if step:
            passed = self.progress(step)
            cost = (self.resizing.cost_after(0.0) - (1 - passed) * self.resizing.cost_after(passed)) / passed
            self._recent.append(seconds / step / cost)

    def update(self, step: int, seconds: float) -> None:
        """Estimate the last step again, after `step` steps in `seconds`."""
        if self.limit_seconds is None:
            return
        left = self.limit_seconds - seconds - self._reserve_seconds(self.limit_seconds)
        if left <= 0:
            self.total_steps = min(max(1, step), self.recipe_steps)  # at least one, so that the weights are trained
        elif step_seconds := self._step_seconds():
            seconds_a_step = step_seconds * self.resizing.cost_after(self.progress(step))
            steps = max(1, int(left * self._fraction_for_steps() / seconds_a_step))
            self.total_steps = min(self.recipe_steps, step + steps)

    def seconds_left(self, step: int, seconds: float) -> float | None:
        """Seconds from `step`, reached after `seconds`, to the written report. None before a speed is known."""
        if not (step_seconds := self._step_seconds()):
            return None
        cost = self.resizing.cost_after(self.progress(step))
        steps = max(0, self.total_steps - step) * cost * step_seconds / self._fraction_for_steps()
        needed = steps + self._final_seconds()
        return needed if self.limit_seconds is None else min(needed, max(0.0, self.limit_seconds - seconds))

    def evaluation_due(self, step: int, seconds: float) -> bool:
        """Whether to evaluate after `step` steps; the end of the run has an evaluation of its own."""
        if step % self.evaluate_steps or step >= self.total_steps:
            return False
        if not self.paced:
            return True
        if seconds - self.last_evaluation < (self.limit_seconds or 0.0) / MAX_EVALUATIONS:
            return False
        return self._evaluating + self._evaluation_seconds() <= EVALUATION_SHARE * seconds

    def progress(self, step: int) -> float:
        """The part of the run that `step` steps are, by the present estimate of its length, 0 to 1."""
        return min(1.0, step / self.total_steps) if self.total_steps else 1.0

    def _step_seconds(self) -> float:
        """Median duration of the recent steps at full size, which a slow one now and then does not change; 0 before
        any."""
        unfinished = [fmean(self._unfinished)] if self._unfinished else []
        return median([*self._recent, *unfinished]) if self._recent or unfinished else 0.0

    def _evaluation_seconds(self) -> float:
        if self._evaluations:
            return median(self._evaluations)
        return EVALUATION_COST * self._step_seconds() * self.num_validation_images / self.batch_size

    def _fraction_for_steps(self) -> float:
        """Fraction of the time to come that steps take; evaluations between them take the rest."""
        between = self.evaluate_steps * self._step_seconds()
        if self.paced:
            between = max(between, (self.limit_seconds or 0.0) / MAX_EVALUATIONS)
        fraction = between / (between + self._evaluation_seconds())
        return max(fraction, 1 - EVALUATION_SHARE) if self.paced else fraction

    def _final_seconds(self) -> float:
        """Seconds from the last step to the written report."""
        evaluation = self.num_processes * self._evaluation_seconds()
        seconds_an_image = FINAL_EVALUATION_COST * evaluation / max(1, self.num_validation_images)
        return RESERVE_SECONDS + self.num_final_images * (seconds_an_image + self.reading_seconds)

    def _reserve_seconds(self, limit_seconds: float) -> float:
        """Seconds to leave for the end of the run; at most half of the limit while no evaluation has been timed."""
        return self._final_seconds() if self._evaluations else min(self._final_seconds(), limit_seconds / 2)
