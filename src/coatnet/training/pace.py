"""How fast a run is, found with a few steps that are not kept, and the epochs that fit into a limit in minutes."""

import time
from contextlib import closing
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch

from coatnet.bundle import Bundle
from coatnet.data.loader import seconds_to_read
from coatnet.data.splits import Splits
from coatnet.data.transforms import EvaluationTransform
from coatnet.errors import NotFinite
from coatnet.system.hardware import num_cores
from coatnet.training.config import Recipe, TrainingConfig
from coatnet.training.defaults import resolve
from coatnet.training.distributed.processes import CoreShare, Processes
from coatnet.training.progress import TrainingProgress
from coatnet.training.progressive_resizing import ProgressiveResizing
from coatnet.training.run_folder import RunFolder
from coatnet.training.trainer import NOT_WRITTEN, Trainer, deterministic_on_cpu

# At most so many seconds, this share of the limit, and so many steps; of two steps, the first allocates its memory.
MEASURED_SECONDS, MEASURED_SHARE, MAX_MEASURED_STEPS = 2.0, 0.02, 20
FRACTION_FOR_STEPS = 0.9  # of a limit in minutes; the rest are start, evaluations and report
# What depends on the number of epochs that fit, by field of the configuration.
CHOSEN_BY_LENGTH = {
    "augmentation": "augmentation",
    "mixing": "mixing",
    "stochastic_depth": "stochastic depth",
    "schedule": "warm-up",
    "ema_decay": "averaging",
}


def resolve_within_limit(
    config: TrainingConfig,
    recipe: Recipe,
    splits: Splits,
    init: Bundle | None,
    processes: Processes,
    progress: TrainingProgress,
    started: float,
) -> TrainingConfig:
    """The configuration for the epochs that fit into what is left of `max_minutes`, by the time of some steps that are
    then forgotten.

    A line says how many fit, if they are not all.

    Args:
        config: what `resolve` makes of the recipe.
        started: when the run began, on the monotonic clock; copies may have been looked for since then.
    """
    if not config.max_minutes:
        return config
    config = replace(config, cache=processes.broadcast(config.cache))  # machines may have other memory
    with deterministic_on_cpu(config.device):
        images = splits.with_scale(config.preprocessing.scale)
        pace = processes.broadcast(measure_pace(config, recipe, images, init, processes, 60 * config.max_minutes))
    beside = processes.broadcast(time.monotonic() - started) + pace.beside
    left = max(pace.step, FRACTION_FOR_STEPS * 60 * config.max_minutes - beside)
    steps = left / (pace.step * config.progressive_resizing.cost_after(0.0))
    epochs = steps * config.batch_size / len(splits.training)
    if epochs >= config.epochs:
        return config
    enough = (beside + left * config.epochs / epochs) / FRACTION_FOR_STEPS / 60
    with processes.collective():
        shorter = resolve(recipe, splits, init, epochs_that_fit=epochs)
    changed = [name for field, name in CHOSEN_BY_LENGTH.items() if getattr(config, field) != getattr(shorter, field)]
    chosen = f", by which {', '.join(changed)} are chosen" if changed else ""
    progress.say(
        f"about {epochs:.{0 if epochs >= 10 else 1}f} of {config.epochs:g} epochs fit into {config.max_minutes:g} "
        f"minutes{chosen}; all would take {enough:,.0f}"
    )
    before, after = config.preprocessing, shorter.preprocessing
    if after.size != before.size:
        more = epochs * before.side**2 / after.side**2
        progress.say(
            f"images are seen at {after.side} pixels instead of {before.side}, of which about {more:.1f} epochs fit; "
            f"--resolution {before.side} keeps that size"
        )
    return shorter


class Pace(NamedTuple):
    """How long the parts of a run take, found with a few steps and images.

    Attributes:
        step: seconds of a step at full size, or of loading its images where that takes longer.
        beside: seconds that no step has: decoding the images that are kept, a teacher's answers for fixed views, and
            reading images again for the report.
    """

    step: float
    beside: float


def measure_pace(
    config: TrainingConfig,
    recipe: Recipe,
    splits: Splits,
    init: Bundle | None,
    processes: Processes,
    limit_seconds: float,
) -> Pace:
    """Find out how fast a run is, in a small part of the time that it has."""
    whole = replace(config, head_first_epochs=0.0, progressive_resizing=ProgressiveResizing())
    with processes.collective():
        trainer = Trainer(whole, splits, RunFolder(NOT_WRITTEN, recipe), init=init, processes=processes)
    (workers, threads), threads_before = trainer.cores, torch.get_num_threads()
    trainer.cores = CoreShare(0, threads)  # no worker processes are started for one batch
    limit = min(MEASURED_SECONDS, MEASURED_SHARE * limit_seconds)
    durations: list[float] = []
    torch.set_num_threads(threads)
    try:
        with closing(trainer.batches()) as batches:
            with processes.collective():
                batch = next(batches)
            while len(durations) < 2 or (len(durations) < MAX_MEASURED_STEPS and sum(durations) < limit):
                started = time.monotonic()
                try:
                    trainer.step_or_skip(*batch)
                except NotFinite as error:
                    raise processes.error_on_main(error) from None
                durations.append(processes.broadcast(time.monotonic() - started))
        step, beside, reading = median(durations[1:]), 0.0, 0.0
        cores = max(1, num_cores() // processes.local_world_size)
        if not splits.training.in_memory:
            with processes.collective():
                reading = seconds_to_read(splits.training, EvaluationTransform(config.preprocessing))
        if config.cache == "none":
            loading = reading * len(trainer.share.positions)
            step = max(step, loading / workers) if workers else step + loading / cores
        else:
            num_kept, num_read_again = len(splits.training) + len(splits.validation), trainer.duration.num_final_images
            beside += reading * (num_kept / num_cores() + num_read_again)
        beside += trainer.teacher_seconds(batch[0], reading / cores) * len(splits.training) / processes.world_size
        return Pace(step, beside)
    finally:
        torch.set_num_threads(threads_before)
