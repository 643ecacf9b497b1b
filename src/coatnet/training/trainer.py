"""Training from a recipe to a measured bundle: one loop over optimizer steps, resumable to the last bit."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.utils.deterministic
from rich.console import Console

from coatnet.bundle import Bundle, load
from coatnet.data.open import open_dataset
from coatnet.evaluation.evaluate import evaluate
from coatnet.evaluation.plots import draw_curves
from coatnet.evaluation.report import Report
from coatnet.evaluation.report_markdown import write_report
from coatnet.system.hardware import keep_freed_memory
from coatnet.training.config import Recipe
from coatnet.training.defaults import resolve
from coatnet.training.distributed.processes import joined
from coatnet.training.duration import plan_for
from coatnet.training.interruption import Interrupted, Interruption, exit_code
from coatnet.training.learner import Learner
from coatnet.training.loggers import check_loggers
from coatnet.training.progress import TrainingProgress
from coatnet.training.run_folder import RunFolder
from coatnet.training.session import Session


def train(recipe: Recipe, out: str | Path, *, console: Console | None = None) -> Report:
    """Train, measure, and leave a run folder `out` with recipe, log, curves, report, checkpoints and bundle.

    On the folder of an unfinished run it goes on where the last checkpoint stands; the result is that of a
    run never interrupted. The bundle holds the averaged weights of the last step, or of the best evaluation
    if patience ended the run. Progress goes to `console` (standard error if None). Started by `torchrun`, all processes
    share the work, the first of them prints and writes, and each returns the report.

    Raises:
        UserError: the recipe, the data or the folder do not fit together, or the loss is not finite.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 arrived; everything is saved, and the same call resumes.
    """
    keep_freed_memory()
    began = time.monotonic()
    with joined() as processes:
        progress = TrainingProgress(console if processes.is_main else Console(quiet=True))
        with processes.collective():
            run = RunFolder(out, recipe)
            splits = open_dataset(run.given.data, validation_fraction=run.given.validation_fraction)
            init = load(run.given.init) if run.given.init else None
            config = run.settle(resolve(run.given, splits, init), splits.classes)
            check_loggers(config.loggers)
        if run.finished:
            progress.say(f"{run.path} is finished; its bundle is measured again (more epochs would extend the run)")
            return processes.first_does(lambda: evaluate(load(run.bundle), splits))

        with repeatable():
            with processes.collective():
                learner = Learner(config, splits.training, init, processes)
                plan = plan_for(config, len(splits.training), len(splits.validation))
                session = Session(learner, plan, splits, run, progress, began)
                if processes.is_main:
                    run.start()
            progress.say(splits.describe())  # only now: a mistake before here is answered by one line
            session.resume()
            progress.say(f"{learner.describe()}; {plan.describe()}; run folder {run.path}")
            try:
                with progress, Interruption() as interruption:
                    learn(session, interruption)
                if session.out_of_patience:
                    session.restore_best()
                bundle = learner.bundle(splits.training, record={"recipe": config.to_dict()})
                return processes.first_does(lambda: finish(session, bundle))
            finally:
                session.loggers.close()


def finish(session: Session, bundle: Bundle) -> Report:
    """Measure what was learned and write report, curves and bundle."""
    recipe, splits, run, progress = session.recipe, session.splits, session.run, session.progress
    report = evaluate(bundle, splits, num_workers=None if recipe.num_workers == "auto" else recipe.num_workers)
    report = replace(report, bad_images={**session.bad_images.records, **report.bad_images})
    if report.bad_images:
        progress.say(f"{len(report.bad_images)} images could not be used; {run.path}/report.md names them")
    session.log({**report.figures, "bad_images": len(report.bad_images)})
    write_report(report, run.path)
    draw_curves(run.metrics, run.path / "curves.png")
    replace(bundle, record={**bundle.record, "report": report.to_dict()}).save(run.bundle)
    return report


def learn(session: Session, interruption: Interruption) -> None:
    """The loop: from where the session stands to the end of its plan, saved at the end.

    Raises Interrupted when a signal came to any process, after saving; NotFinite, with the weights of the step before.
    """
    plan, told = session.plan, lambda: interruption.signal
    with closing(session.batches()) as batches:
        batch = next(batches, None)
        session.catch_up(told)
        while not (session.over or session.agreement.stop):
            began = time.monotonic()
            assert batch is not None
            outcome = session.step(*batch)
            batch = next(batches, None)  # what goes wrong with it is known before the processes meet
            session.count(outcome, session.agree(time.monotonic() - began, told()))
            if plan.evaluation_due(session.position.step, session.position.seconds):
                session.measure(told)
            if not session.agreement.stops(told()):
                session.save_if_due()
        session.save()
    if stop := session.agreement.stop:
        session.progress.say(f"stopped by {stop.name} and saved; the same command resumes")
        raise Interrupted(exit_code(stop))


@contextmanager
def repeatable() -> Iterator[None]:
    """On the CPU, have torch choose algorithms whose sums do not depend on the timing of threads."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # pyrefly: ignore[missing-attribute]
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        # It costs time, and nothing here reads such memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # pyrefly: ignore[missing-attribute]
