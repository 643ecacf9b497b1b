"""A whole training: from a recipe to a run folder with the trained model, its figures and its report."""

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console

from coatnet.bundle import Bundle, load
from coatnet.bundle.bundle import place_name
from coatnet.data.loader import require_readable
from coatnet.data.splits import SplitRule, Splits
from coatnet.errors import UserError, counted
from coatnet.evaluation.calibrate import calibrate_and_evaluate
from coatnet.evaluation.evaluate import EVALUATED_TOGETHER, SplitOutputs, evaluate, recorded_rule, was_trained_on
from coatnet.evaluation.metrics import wilson_interval
from coatnet.evaluation.plots import draw_curves
from coatnet.evaluation.report import Report
from coatnet.evaluation.report_markdown import write_report
from coatnet.system.files import atomic_files, translate_write_errors
from coatnet.system.hardware import keep_freed_memory
from coatnet.training.config import Recipe, TrainingConfig
from coatnet.training.defaults import open_splits, resolve
from coatnet.training.distributed.processes import Processes, distributed_processes
from coatnet.training.image_cache import cached_images
from coatnet.training.initialization import load_init, suggest_init
from coatnet.training.loggers import check_loggers
from coatnet.training.pace import resolve_within_limit
from coatnet.training.progress import TrainingProgress
from coatnet.training.run_folder import RunFolder, cross_validated
from coatnet.training.trainer import Trainer, deterministic_on_cpu

Value = TypeVar("Value")

FEW_MEASURED = 100  # chosen: a figure of 80 % is within 8 points either way
ADVISED_FOLDS = 5  # each with two images or more
SELECTED_BY_SEARCH = (
    "A search (tuning.md) chose values of the recipe by these same images, so these figures are too favorable."
)


def train(recipe: Recipe, out: str | Path, *, splits: Splits | None = None, console: Console | None = None) -> Report:
    """Train, evaluate, and leave a run folder `out` with recipe, log, curves, report, checkpoints and bundle.

    In the folder of an unfinished run it resumes from the last checkpoint; the result is that of a run that was never
    interrupted. The bundle holds the averaged weights of the last step, or of the best evaluation if patience ended the
    run. Started by `torchrun`, all processes share the work, the first of them prints and writes, and each returns the
    report.

    Args:
        recipe: what is asked of the run.
        out: the run folder, new or to be resumed.
        splits: the images, in place of opening `recipe.data`, which then only names them; the same for a resumed run.
        console: where progress goes; standard error if None.

    Returns:
        The evaluation of the bundle on the validation images.

    Raises:
        UserError: the recipe, the data or the folder do not fit together, or the loss is not finite.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 arrived; everything is saved, and the same call resumes.
    """
    return run_training(recipe, out, write_results, splits, console)


def run_training(
    recipe: Recipe,
    out: str | Path,
    measure: Callable[[Trainer, Bundle], Value],
    splits: Splits | None = None,
    console: Console | None = None,
) -> Value | Report:
    """As `train`, but `measure` measures the trained model, and writes what stays of it."""
    if not isinstance(recipe, Recipe):
        raise UserError(f"recipe must be a coatnet.Recipe, such as Recipe(data='digits'), got {recipe!r:.80}")
    keep_freed_memory()
    started = time.monotonic()
    with distributed_processes() as processes, ExitStack() as cleanup:
        progress = TrainingProgress(console if processes.is_main else Console(quiet=True))
        with processes.collective():
            folder = RunFolder(out, recipe)
            folder.warn = lambda text: progress.say(f"warning: {text}")
            cleanup.callback(folder.release)
            if processes.is_main and folder.stored is not None:
                with suppress(OSError):  # a finished run may lie where nothing can be written
                    folder.hold()
        given, splits, init, config = prepare(folder.given, folder, processes, progress, started, splits=splits)
        config = replace(config, cache=processes.broadcast(config.cache))  # machines may have other memory
        for note in folder.notes:
            progress.say(note)
        if folder.finished:
            folder.release()
            progress.say(f"{folder.path} is finished; its bundle is evaluated again (more epochs would extend the run)")
            return processes.run_on_main(
                lambda: replace(
                    evaluate(folder.bundle, splits, device=config.device, **_evaluation_options(config)),
                    notes=notes_on(folder),
                )
            )

        with deterministic_on_cpu(config.device):
            with processes.collective():
                trainer = Trainer(config, splits, folder, init=init, processes=processes, progress=progress)
                if processes.is_main:
                    folder.start()
            progress.say(splits.describe())  # only now: a mistake before here is answered by one line
            if config.preprocessing.scale is not None and config.augmentation.varies_colors:
                progress.say(
                    "augmentation moves and erases pixels only: operations on colors mean nothing for these values"
                )
            if advice := advise_folds(splits, config):
                progress.say(advice)
            cleanup.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(trainer.cores.threads)
            trainer.images, kept = cleanup.enter_context(
                cached_images(config, splits, processes, quiet=progress.console.quiet)
            )
            trainer.duration.reading_seconds = trainer.reading_seconds()
            if kept:
                progress.say(kept)
            elif config.balance == "sampler" and hasattr(splits.training, "block_size"):
                progress.say(
                    "note: balance sampler reads images of shards in no order, each with the 8 MB around it: balance "
                    "weights, or cache disk, reads every block once"
                )
            trainer.compute_teacher_logits()
            if folder.resumed is None and (suggestion := suggest_init(given, splits)):
                progress.say(suggestion)
            trainer.resume(started)
            progress.say(f"{trainer.describe()}; {trainer.duration.describe()}; run folder {folder.path}")
            if trainer.out_of_patience:
                progress.say(
                    f"the last {counted(config.patience, 'evaluation')} brought nothing better, so no more steps are "
                    "taken: a larger patience goes on"
                )
            try:
                trainer.run()
                progress.say(f"{trainer.epoch:.3g} epochs in {trainer.state.seconds / 60:.1f} minutes")
                if trainer.out_of_patience:
                    trainer.restore_best()
                bundle = trainer.bundle()
                return processes.run_on_main(lambda: measure(trainer, bundle))
            finally:
                trainer.loggers.close()


class Prepared(NamedTuple):
    """What a training begins with: the recipe with what was chosen, the images, the model to start from if any, and
    the configuration."""

    recipe: Recipe
    splits: Splits
    init: Bundle | None
    config: TrainingConfig


def prepare(
    recipe: Recipe,
    folder: RunFolder | None,
    processes: Processes,
    progress: TrainingProgress,
    started: float,
    *,
    splits: Splits | None = None,
) -> Prepared:
    """Open the images and the model to start from, choose all values, and refuse what cannot be trained.

    Args:
        recipe: what is asked of the run.
        folder: of the run, whose values stand for what a resumed run leaves open; None if nothing is written.
        processes: of the run.
        progress: where lines go.
        started: when the run began, on the monotonic clock.
        splits: the images, in place of opening those of the recipe.

    Raises:
        UserError: recipe, data, start and folder do not fit together, or no image can be read.
    """
    if splits is None:
        recipe, splits = open_splits(recipe, progress.say, processes)
    with processes.collective():
        recipe, init = load_init(recipe, splits, progress.say)
        config = resolve(recipe, splits, init)
    if folder is None or folder.resumed is None:  # else the values that were chosen stand in its recipe.yaml
        config = resolve_within_limit(config, recipe, splits, init, processes, progress, started)
    with processes.collective():
        if folder is not None:
            config = folder.check_config(config, splits.classes, splits.content)
        splits = splits.with_scale(config.preprocessing.scale)
        check_loggers(config.loggers)
        require_readable(splits.validation, "validation")
        if splits.test is not None:
            require_readable(splits.test, "the test")
        teacher = None
        if config.teacher and (folder is None or not folder.finished):  # a finished run may have outlived its teacher
            teacher = load(config.teacher)
    for model, place in ((init, config.init), (teacher, config.teacher)):
        if note := known_before(model, place, config, splits):
            progress.say(f"warning: {note}")
            if folder is not None:
                folder.report_notes.append(note)
    return Prepared(recipe, splits, init, config)


def learned_from(init: Bundle, data: str, splits: Splits) -> bool:
    """Whether a model was trained on a part of these images, as far as names of data and classes tell."""
    return splits.by_name and was_trained_on(init, data) and not {*init.classes}.isdisjoint(splits.classes)


def known_before(model: Bundle | None, place: str, config: TrainingConfig, splits: Splits) -> str:
    """A sentence for a run whose held-out images the model given as `init` or `teacher` may have learned from.

    Args:
        model: what was given; None for nothing.
        place: the folder or id that it was given by.

    Returns:
        "" where it held out the same images.
    """
    if model is None or not learned_from(model, config.data, splits):
        return ""
    if recorded_rule(model).holds_out_as(SplitRule.of(config.to_dict())):
        return ""
    return (
        f"{place_name(place)} was trained on images of {splits.name} and held out others, so it has learned from "
        "some of those that this run measures on: the figures are too favorable"
    )


def advise_folds(splits: Splits, config: TrainingConfig) -> str:
    """A line for who measures on few images; empty for enough of them, or within a cross-validation."""
    n = len(splits.validation)
    if config.fold or n >= FEW_MEASURED:
        return ""
    low, high, total = *wilson_interval(round(0.8 * n), n), n + len(splits.training)
    may_fold = splits.by_name and total >= 2 * ADVISED_FOLDS
    better = f"--folds {ADVISED_FOLDS} measures on all {total:,}" if may_fold else "more would say more"
    return (
        f"note: {counted(n, 'image')} to measure on: a figure of 80 % would be certain within {100 * low:.0f} to "
        f"{100 * high:.0f} %; {better}"
    )


def write_results(trainer: Trainer, bundle: Bundle) -> Report:
    """Calibrate and evaluate the bundle; write bundle, curves and report into the run folder.

    The bundle is written first, and report.json last, which marks the end of the run.

    Raises:
        UserError: one of them cannot be written. The same command tries again.
    """
    folder, options = trainer.folder, _evaluation_options(trainer.config)
    held_out = SplitOutputs(bundle, trainer.splits, keep=True, **options)
    bundle, report = calibrate_and_evaluate(bundle, held_out)
    notes = notes_on(folder)
    report = replace(report, bad_images={**trainer.bad_images.records, **report.bad_images}, notes=notes)
    if report.bad_images:
        count = f"{len(report.bad_images):,} of {trainer.bad_images.num_images:,}"
        trainer.progress.say(f"unreadable images: {count}; {folder.path}/report.md names them")
    trainer.log({**report.network_figures(), "bad_images": len(report.bad_images)})  # as all those before
    replace(bundle, record={**bundle.record, "report": report.to_dict()}).save(folder.bundle)
    if trainer.splits.test is not None:  # measured once the model is safe, which then names the figure
        report = replace(report, notes=(*notes, _measure_test(trainer, bundle)))
        replace(bundle, record={**bundle.record, "report": report.to_dict()}).save(folder.bundle)
    try:
        with atomic_files(folder.path / "curves.png") as (staged,):
            draw_curves(folder.metrics, staged)
    except OSError as error:
        trainer.progress.say(f"warning: {folder.path}/curves.png cannot be drawn ({error.strerror or error})")
    try:
        write_report(report, folder.path)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {folder.path} ({error.strerror or error}): the trained model is in "
            f"{folder.bundle}; once that is fixed, the same command writes the report"
        ) from None
    return report


def _measure_test(trainer: Trainer, bundle: Bundle) -> str:
    """Measure the test split, write its report, and return its figure in a line."""
    tested = evaluate(bundle, trainer.splits, split="test", **_evaluation_options(trainer.config))
    with translate_write_errors(trainer.folder.path / "test"):
        write_report(tested, trainer.folder.path / "test")
    return f"Test split, measured once: {tested.headline()}; test/report.md has the rest."


def _evaluation_options(config: TrainingConfig) -> dict[str, Any]:
    """Worker processes of a run, and images at once: a pass without gradients has room for some times as many."""
    return {
        "num_workers": None if config.num_workers == "auto" else config.num_workers,
        "batch_size": min(EVALUATED_TOGETHER, 4 * config.micro_batch_size),
    }


def notes_on(folder: RunFolder) -> tuple[str, ...]:
    """What a reader of the report of a run should know besides: a search, a cross-validation."""
    return (*([SELECTED_BY_SEARCH] if folder.tuned else []), *folder.report_notes, *cross_validated(folder))
