"""What a training would take on this machine, from a few real steps that are then forgotten."""

import math
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
from torch import Tensor

from coatnet.data.loader import seconds_to_read
from coatnet.data.pixel_cache import CachedDataset
from coatnet.errors import UserError, counted
from coatnet.planning.lr_range import LearningRateRange, find_range
from coatnet.system.hardware import num_cores
from coatnet.training.config import Recipe, TrainingConfig
from coatnet.training.distributed.processes import SINGLE_PROCESS, require_single_process
from coatnet.training.image_cache import cached_images
from coatnet.training.initialization import suggest_init
from coatnet.training.progress import TrainingProgress
from coatnet.training.run import prepare
from coatnet.training.run_folder import RunFolder
from coatnet.training.trainer import NOT_WRITTEN, Trainer, deterministic_on_cpu

MEASURED_SECONDS = 10.0  # at least two steps, at most those of this time
MAX_MEASURED_STEPS = 30


@dataclass(frozen=True)
class DryRun:
    """What a training would take.

    Attributes:
        config: everything that would be done.
        description: data, model and device, in two lines.
        images_per_second: training images, of which the first two steps are not counted if there are more.
        steps: optimizer steps until the end; with a limit in minutes, those that fit.
        epochs: passes over the training images in these steps.
        minutes: duration until the report is written.
        memory_bytes: most memory: of the GPU, or of this process with all images that are kept decoded.
        cores: of this machine that the run may use; 0 on a GPU, of which it uses one.
        price: of an hour of this machine, in any currency; None if it was not given.
        learning_rates: what the range test found; None without one.
        tested: whether there was a range test.
    """

    config: TrainingConfig
    description: str
    images_per_second: float
    steps: int
    epochs: float
    minutes: float
    memory_bytes: int
    cores: int = 0
    price: float | None = None
    learning_rates: LearningRateRange | None = None
    tested: bool = False

    def describe(self) -> str:
        """The configuration as YAML, then the figures."""
        asked = self.config.epochs
        epochs = f"{asked:g} epochs"
        if self.epochs < 0.995 * asked:
            epochs = f"{self.epochs:.3g} of {asked:g} epochs, which fit into {self.config.max_minutes:g} minutes"
        return (
            f"{self.config.to_yaml()}\n{self.description}\n{epochs}, {self.steps:,} steps: about {self.minutes:.1f} "
            f"minutes at {self.images_per_second:.3g} images/s, {self.memory_bytes / 1e9:.1f} GB of memory. "
            f"{self._describe_cost()}. {self._describe_rates()}Nothing was trained or written."
        )

    def _describe_cost(self) -> str:
        """`That is 2.4 core-hours on 2 cores, or 0.60 at 0.5 an hour`."""
        hours = self.minutes / 60
        used = f"{hours * self.cores:.3g} core-hours on {counted(self.cores, 'core')}" if self.cores else ""
        cost = "" if self.price is None else f", or {hours * self.price:.2f} at {self.price:g} an hour"
        return f"That is {used or f'{hours:.3g} GPU-hours'}{cost}"

    def _describe_rates(self) -> str:
        """The learning rates of the range test, if there was one."""
        if not self.tested:
            return ""
        found = self.learning_rates
        if found is None:
            return "A range test found nothing: too few steps fit into half a minute, or no rate made the loss fall. "
        return f"{found.describe()} "


def dry_run(recipe: Recipe, *, price: float | None = None, lr_range: bool = False) -> DryRun:
    """Resolve a recipe and take a few steps of its training, without a run folder.

    Args:
        recipe: what is asked of the run.
        price: of an hour of this machine, in any currency, for the cost of the run.
        lr_range: whether to test learning rates as well, which takes half a minute at most.

    Raises:
        UserError: as `train` does for a recipe and data that do not fit together, a price is negative, or several
            processes were started.
    """
    require_single_process("dry_run")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"price must be that of an hour, 0 or more, got {price:g}")
    progress, began = TrainingProgress(None), time.monotonic()
    recipe, splits, init, config = prepare(recipe, None, SINGLE_PROCESS, progress, began)
    if suggestion := suggest_init(recipe, splits):
        progress.say(suggestion)
    beforehand = time.monotonic() - began  # seconds before the first step
    with deterministic_on_cpu(config.device), ExitStack() as cleanup:
        trainer = Trainer(config, splits, RunFolder(NOT_WRITTEN, recipe), init=init)
        description = f"{splits.describe()}\n{trainer.describe()}"
        trainer.head_first.steps = 0  # steps of the classifier alone would stand for the longer ones
        cleanup.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(trainer.cores.threads)
        num_steps, started = min(MAX_MEASURED_STEPS, trainer.duration.recipe_steps), time.monotonic()
        trainer.images, kept = cleanup.enter_context(cached_images(config, splits, num_steps=num_steps))
        if kept:  # all images are decoded
            images = len(splits.training) + len(splits.validation)
            decoded = min(len(splits.training), num_steps * config.batch_size)
            beforehand += (time.monotonic() - started) * images / decoded
        trainer.duration.reading_seconds = trainer.reading_seconds()
        counted_steps, last_images = time_steps(trainer)
        if trainer.teacher is not None:
            reading = 0.0 if splits.training.in_memory else seconds_to_read(splits.training) / num_cores()
            beforehand += trainer.teacher_seconds(last_images, reading) * len(splits.training)
        memory = memory_of(trainer)
        learning_rates = None
        if lr_range:
            step_seconds = sum(counted_steps) / len(counted_steps)
            learning_rates = find_range(config, splits, trainer.images, step_seconds, init)
    duration = trainer.duration
    duration.resume(len(counted_steps), sum(counted_steps))
    duration.last_evaluation = 0.0
    duration.update(0, beforehand)
    left = duration.seconds_left(0, beforehand)
    assert left is not None
    seconds = left + beforehand
    return DryRun(
        config,
        description,
        config.batch_size * len(counted_steps) / sum(counted_steps),
        duration.total_steps,
        min(config.epochs, duration.total_steps * config.batch_size / len(splits.training)),
        math.ceil(seconds / 6) / 10,
        memory,
        cores=num_cores() if trainer.device.type == "cpu" else 0,
        price=price,
        learning_rates=learning_rates,
        tested=lr_range,
    )


def memory_of(trainer: Trainer) -> int:
    """Most bytes that a training takes: of the GPU, or of this process and all images that it keeps decoded."""
    if trainer.device.type == "cuda":
        return torch.cuda.max_memory_allocated(trainer.device)
    import resource  # not on Windows

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    kept = trainer.images.training
    if trainer.config.cache == "memory" and isinstance(kept, CachedDataset) and (num_kept := kept.kept.sum()):
        others = len(kept) - int(num_kept) + len(trainer.splits.validation)  # of which none was kept to try some steps
        memory += kept.num_bytes // int(num_kept) * others
    return memory


def time_steps(trainer: Trainer) -> tuple[list[float], Tensor]:
    """Take up to 30 steps within ten seconds, at least two.

    Returns:
        The seconds of each, without the first two if there are more, which wait for workers and allocate memory; and
        the images of the last one.
    """
    durations: list[float] = []
    with closing(trainer.batches()) as batches:
        started = before = time.monotonic()
        for batch in batches:
            trainer.step_or_skip(*batch)
            now = time.monotonic()
            durations.append(now - before)
            before = now
            if len(durations) >= MAX_MEASURED_STEPS or (len(durations) > 1 and now - started > MEASURED_SECONDS):
                break
    return durations[2:] or durations[-1:], batch[0]
