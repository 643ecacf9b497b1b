"""The learning-rate range test: a short training whose rate grows exponentially, to see where the loss falls.

Smith, 2017, "Cyclical learning rates for training neural networks", arXiv:1506.01186, section 3.3; the exponential
growth, the smoothing and the end at a multiple of the least loss are those of fast.ai's learning-rate finder.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from coatnet.bundle import Bundle
from coatnet.data.splits import Splits
from coatnet.errors import NotFinite
from coatnet.training.config import Recipe, TrainingConfig
from coatnet.training.progressive_resizing import ProgressiveResizing
from coatnet.training.run_folder import RunFolder
from coatnet.training.trainer import NOT_WRITTEN, Trainer

STEPS = (30, 100)  # fewer leave no curve, more tell nothing new
MAX_SECONDS = 30.0
FACTORS = (3e-3, 100.0)  # of the chosen rate, at the first step and at the last one of the longest test
SMOOTHING = 0.9  # of the mean loss, a step
DIVERGED = 4.0  # times the least mean loss ends the test
# Behind the loss by what the smoothing takes, some ten steps of 11 %; also what fast.ai's "minimum" is divided by, 10.
MARGIN = 3.0


@dataclass(frozen=True)
class LearningRateRange:
    """What the test found.

    Attributes:
        chosen: the peak learning rate of the configuration.
        steps: optimizer steps of the test.
        lowest: at which half of the way down is done.
        highest: at which the mean loss is least.
    """

    chosen: float
    steps: int
    lowest: float
    highest: float

    def describe(self) -> str:
        """The range beside the chosen rate."""
        if self.chosen < self.lowest:
            place = "lies below"
        else:
            place = "lies in it" if self.chosen <= self.highest else "lies above"
        return (
            f"A range test of {self.steps} steps suggests learning rates from {self.lowest:.1e} to {self.highest:.1e}; "
            f"the chosen {self.chosen:.1e} {place}. It sees the first steps only, and long runs may need less."
        )


class RangeTrainer(Trainer):
    """A training whose learning rate grows exponentially from step to step."""

    growth: tuple[float, float]  # at step 0; factor of a step

    @property
    def learning_rate(self) -> float:
        """Learning rate of the step to come."""
        first, factor = self.growth
        return first * factor**self.state.step


def find_range(
    config: TrainingConfig, splits: Splits, images: Splits, step_seconds: float, init: Bundle | None = None
) -> LearningRateRange | None:
    """Test learning rates on a training of its own, of which nothing is kept.

    Args:
        config: that of the run; the whole network learns at full image size, whatever it says of the first epochs.
        splits: the data.
        images: the data, decoded.
        step_seconds: duration of a step, by which the number of steps is chosen.
        init: the bundle to start from.

    Returns:
        The range; None if too few steps fit into half a minute, or if no rate made the loss fall.
    """
    steps = min(STEPS[1], int(MAX_SECONDS / step_seconds))
    if steps < STEPS[0]:
        return None
    chosen, (first, last) = config.optimizer.learning_rate, FACTORS
    epochs = (steps - 0.5) * config.batch_size / len(splits.training)
    short = replace(config, epochs=epochs, head_first_epochs=0.0, progressive_resizing=ProgressiveResizing())
    trainer = RangeTrainer(short, splits, RunFolder(NOT_WRITTEN, Recipe(data=config.data)), init=init)
    trainer.images, trainer.growth = images, (first * chosen, (last / first) ** (1 / (steps - 1)))
    rates: list[float] = []
    losses: list[float] = []
    started = time.monotonic()
    with closing(trainer.batches()) as batches:
        for batch in batches:
            rate = trainer.learning_rate
            try:
                loss, _ = trainer.step(*batch)
            except NotFinite:
                break
            rates.append(rate)
            losses.append(loss)
            if smoothed(losses)[-1] > DIVERGED * smoothed(losses).min() or time.monotonic() - started > 2 * MAX_SECONDS:
                break
    found = falling_range(rates, losses)
    return None if found is None else LearningRateRange(chosen, len(losses), *found)


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """The exponential mean of the losses so far, (N,), without its bias to zero at the start."""
    means, mean = [], 0.0
    for number, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**number))
    return np.array(means)


def falling_range(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """The rates, less a margin, at which half of the way down is done and at which the mean loss is least.

    None if the mean never fell by a twentieth, which is noise.
    """
    if len(losses) < STEPS[0] // 2:
        return None
    means = smoothed(losses)
    least = int(means.argmin())
    start = float(means[: STEPS[0] // 3].mean())
    if means[least] > 0.95 * start:
        return None
    begun = next(index for index, mean in enumerate(means) if mean <= (start + means[least]) / 2)
    return rates[begun] / MARGIN, rates[least] / MARGIN
