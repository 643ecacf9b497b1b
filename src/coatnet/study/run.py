"""The runs of a study: each trained by a process of its own, several at once, taken up again where they stopped."""

import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from rich.console import Console

from coatnet.bundle import Bundle
from coatnet.data.datasets import ArrayDataset, Dataset, FileDataset, select
from coatnet.data.loader import BadImages, seconds_to_read
from coatnet.data.splits import choose_training
from coatnet.errors import NotFinite, UserError, counted, explain_memory_shortage, first_line, is_memory_shortage
from coatnet.evaluation.metrics import Metrics
from coatnet.inference.logits import infer
from coatnet.study.record import FIGURES, Curves, Figures, Run, Study
from coatnet.system.files import MAX_LOG_BYTES, atomic_write, file_lock, read_regular
from coatnet.system.json_reader import read_json_object
from coatnet.system.launcher import read_launcher
from coatnet.system.parents import end_with_parent
from coatnet.training.config import Recipe
from coatnet.training.defaults import open_splits, resolve
from coatnet.training.distributed.processes import SINGLE_PROCESS
from coatnet.training.interruption import Interrupted, Interruption, exit_code
from coatnet.training.pace import measure_pace
from coatnet.training.run import run_training, write_results
from coatnet.training.trainer import Trainer, deterministic_on_cpu

MAX_TRAINING_IMAGES = 10_000  # that the training loss is measured on at the end
MAX_POINTS = 100  # of the curve of the training loss
MEASURED_SECONDS = 100.0  # of which `measure_pace` takes a fiftieth for each member
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def recipe_of(study: Study, run: Run) -> Recipe:
    """The recipe of a run: that of the study, with the fields of its member, size, seed, learning rate and steps."""
    member = next(each for each in study.members if each.name == run.member)
    recipe = Recipe.from_dict(study.recipe).changed(member.changes)
    batch_size = recipe.batch_size
    assert batch_size is not None
    evaluations = max(1, study.asked.get("evaluations", 1))

    def epochs(steps: int) -> float:
        return (steps - 0.5) * batch_size / run.size  # they are rounded up to whole steps

    warmup = {"warmup_steps": max(1, run.steps // 20)}
    values = {
        "training_images": run.size,
        "seed": run.seed,
        "epochs": epochs(run.steps),
        "evaluate_every": epochs(max(1, run.steps // (evaluations + 1))),
        "optimizer": {"learning_rate": run.learning_rate},
        "schedule": warmup | recipe.to_dict().get("schedule", {}),
    }
    return recipe.changed(values)


def train_run(recipe: Mapping[str, Any], folder: Path, keep_weights: bool) -> None:
    """Train a run in its folder, or go on with it, and leave `figures.json`.

    Raises:
        UserError: as `train`.
    """

    def finish(trainer: Trainer, bundle: Bundle) -> None:
        trained, images = time.monotonic(), trainer.images
        held_out = measure(bundle, images.validation)
        learned = images.training  # kept decoded, perhaps
        if len(learned) > MAX_TRAINING_IMAGES:
            learned = _some(trainer.splits.training, trainer.config.seed)
        training = measure(bundle, learned)
        trainer.log({"top1": held_out["top1"], "nll": held_out["nll"]})
        figures = Figures(
            top1=held_out["top1"],
            held_out_loss=held_out["nll"],
            train_top1=training["top1"],
            train_loss=training["nll"],
            n=int(held_out["n"]),
            n_train=int(training["n"]),
        )
        result = {
            "recipe": dict(recipe),
            "figures": asdict(figures),
            "curves": asdict(read_curves(trainer.folder.metrics)),
            "seconds": trainer.state.seconds + time.monotonic() - trained,
        }
        atomic_write(folder / FIGURES, json.dumps(result))
        if keep_weights:
            write_results(trainer, bundle)

    run_training(Recipe.from_dict(recipe), folder, finish, console=Console(quiet=True))
    if not keep_weights:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _some(dataset: Dataset, seed: int) -> Dataset:
    """At most 10,000 images of a dataset, as many of each class."""
    if not isinstance(dataset, ArrayDataset | FileDataset):
        return dataset
    chosen = np.zeros(len(dataset), bool)
    chosen[choose_training(dataset.labels, seed)[:MAX_TRAINING_IMAGES]] = True
    return select((dataset,), chosen)


def measure(bundle: Bundle, dataset: Dataset) -> dict[str, float]:
    """Figures of a bundle on images, without augmentation."""
    metrics = Metrics(len(bundle.classes), bundle.multilabel)
    batches = infer(
        bundle.model,
        dataset,
        preprocessing=bundle.preprocessing,
        batch_size=64,
        num_workers=0,
        bad_images=BadImages(len(dataset), budget=1.0),
    )
    with closing(batches):
        for batch in batches:
            metrics.update(batch.outputs, batch.labels)
    return metrics.compute()


def read_curves(log: Path) -> Curves:
    """The curves of a run's metrics.jsonl, the training loss averaged down to 100 points."""
    lines = [json.loads(line) for line in read_regular(log, MAX_LOG_BYTES).decode().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluated = {line["step"]: (line["nll"], line["top1"]) for line in lines if "nll" in line}
    every = max(1, -(-len(losses) // MAX_POINTS))
    groups = [losses[start : start + every] for start in range(0, len(losses), every)]
    return Curves(
        step=tuple(group[-1][0] for group in groups),
        train_loss=tuple(round(sum(loss for _, loss in group) / len(group), 6) for group in groups),
        held_out_step=tuple(evaluated),
        held_out_loss=tuple(round(nll, 6) for nll, _ in evaluated.values()),
        held_out_top1=tuple(top1 for _, top1 in evaluated.values()),
    )


def time_members(recipes: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds of an optimizer step by each of some recipes on the same data, of the opening of the data, and to decode
    an image for a run that keeps it decoded, 0 if none does."""
    started = time.monotonic()
    recipe = Recipe.from_dict(recipes[0])
    recipe, splits = open_splits(recipe, lambda text: None)
    opening = time.monotonic() - started
    members = [Recipe.from_dict(values) for values in recipes]
    configs, seconds = [resolve(recipe, splits) for recipe in members], []
    for recipe, config in zip(members, configs, strict=True):
        with deterministic_on_cpu(config.device):
            try:
                seconds.append(measure_pace(config, recipe, splits, None, SINGLE_PROCESS, MEASURED_SECONDS).step)
            except NotFinite:  # its runs will fail, and the others are made
                seconds.append(math.nan)
    mean = np.nanmean(seconds) if not np.isnan(seconds).all() else 0.0
    decoding = seconds_to_read(splits.training) / torch.get_num_threads() if configs[0].cache != "none" else 0.0
    return [*np.where(np.isnan(seconds), mean, seconds).tolist(), opening, decoding]


# Processes


@dataclass
class Worker:
    """A process that calls a function once; `result` is what came back: a status and a value."""

    process: Any
    connection: Connection
    slot: int
    run: Run | None = None
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, function: Callable[..., Any], *arguments: Any, threads: int, slot: int = 0) -> "Worker":
        """Start a process. It is forked from a server that has imported torch, in a fraction of a second."""
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if context.get_start_method() == "forkserver":
            # The last is imported with the switch to deterministic algorithms, and takes two seconds.
            context.set_forkserver_preload(["__main__", __name__, "torch._inductor"])
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_call, args=(theirs, threads, function, arguments))
        process.start()
        theirs.close()
        return cls(process, ours, slot)

    def finish(self) -> tuple[str, Any]:
        """Wait for the end: "done" and what the function returned, "failed" and why, or "stopped" and the exit code."""
        try:
            outcome = self.connection.recv()
        except EOFError:
            outcome = None
        self.process.join()
        self.connection.close()
        if outcome is not None:
            return outcome
        code = self.process.exitcode
        if code is not None and code > 0:
            return "stopped", code
        return "failed", f"its process was ended by signal {-(code or 0)}, as the system does when memory runs out"


def _call(connection: Connection, threads: int, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    end_with_parent()
    for name in LAUNCHER_VARIABLES:  # the run is trained by one process
        os.environ.pop(name, None)
    torch.set_num_threads(threads)
    try:
        outcome = "done", function(*arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except UserError as error:
        outcome = "failed", str(error)
    except Exception as error:  # a run that fails must not end the others
        reason = explain_memory_shortage(error) if is_memory_shortage(error) else first_line(error)
        outcome = "failed", f"{type(error).__name__}: {reason}"
    connection.send(outcome)


def measure_steps(recipes: Sequence[Mapping[str, Any]], jobs: int, threads: int, devices: Sequence[str]) -> list[float]:
    """As `time_members`, measured by as many processes at once as there will be, on the devices in turn; the mean over
    these.

    Raises:
        UserError: a member cannot be trained.
    """
    of_device = [[{**recipe, "device": device} for recipe in recipes] for device in devices]
    workers = [Worker.start(time_members, of_device[number % len(devices)], threads=threads) for number in range(jobs)]
    outcomes = [worker.finish() for worker in workers]
    for status, value in outcomes:
        if status != "done":
            raise UserError(f"a few steps to measure their time failed: {value}")
    return [sum(each) / len(each) for each in zip(*(value for _, value in outcomes), strict=True)]


# The runs of a study


@dataclass(frozen=True)
class Part:
    """Which of the runs are this process's: every `count`-th, from `index` on; and the GPU that it computes on."""

    index: int = 0
    count: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def lock(self) -> str:
        """Name of the file in the folder of a study that its only process holds."""
        return ".lock" if self.count == 1 else f".lock-{self.index}-of-{self.count}"

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Part":
        """By the variables of a SLURM array, or else of torchrun. Raises UserError if they do not fit together."""
        array = [environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "MIN", "COUNT")]
        if all(text.isascii() and text.isdecimal() for text in array):
            number, first, count = map(int, array)
            if first <= number < first + count:
                return cls(number - first, count)
            raise UserError("the tasks of a SLURM array must be numbered in a row, such as --array=0-7")
        launched = read_launcher(environment)
        return cls(launched.rank, launched.world_size, launched.local_rank, launched.local_world_size)


def run_study(
    folder: Path,
    *,
    jobs: int,
    devices: Sequence[str],
    part: Part,
    keep_weights: bool,
    say: Callable[[str], None],
) -> Study:
    """Train all runs of a part that are not finished, and give the study with their figures.

    Args:
        folder: of the study, with its study.json; `hold_study` keeps other processes from the part.
        jobs: processes at once.
        devices: what they compute on, in turn.
        part: which runs are ours.
        keep_weights: whether the models stay.
        say: takes a line of progress.

    Raises:
        Interrupted: a stop signal arrived; every unfinished run has saved a checkpoint.
        UserError: the study cannot be written; the training processes were sent SIGTERM, at which each saves a
            checkpoint.
    """
    study = Study.read(folder)
    mine = study.runs[part.index :: part.count]
    todo = [run for run in mine if run.status != "finished"]
    progress = _Progress(len(mine), sum(run.seconds for run in todo), jobs)
    progress.done = len(mine) - len(todo)
    running: list[Worker] = []
    with Interruption() as interruption:
        try:
            while (todo or running) and interruption.signal is None:
                while todo and len(running) < jobs:
                    run = todo.pop(0)
                    slot = min(set(range(jobs)) - {worker.slot for worker in running})
                    if damage := _damage(folder, study, run):
                        say(f"{damage}; the run is trained again")
                    running.append(_begin(folder, study, run, slot, devices, keep_weights))
                for worker in _ended(running):
                    running.remove(worker)
                    run = _outcome(folder, study, worker)
                    if run is None:  # stopped by a signal that is ours too
                        continue
                    study = update(folder, run)
                    say(progress.line(run, worker))
        finally:
            # After a signal or an error; else the interpreter would wait at its exit until these are finished.
            for worker in running:
                worker.process.terminate()
        if interruption.signal is not None:
            say(f"stopping by {interruption.signal.name}: {counted(len(running), 'run')} to be saved")
            for worker in running:
                if (run := _outcome(folder, study, worker)) is not None and run.status == "finished":
                    update(folder, run)
            raise Interrupted(exit_code(interruption.signal))
    return study


def _begin(folder: Path, study: Study, run: Run, slot: int, devices: Sequence[str], keep_weights: bool) -> Worker:
    recipe = recipe_of(study, run).to_dict()
    place = folder / run.folder
    asked = {**recipe, "device": devices[slot % len(devices)]}
    worker = Worker.start(_train_unless_finished, asked, place, keep_weights, threads=study.threads, slot=slot)
    worker.run = run
    return worker


def _train_unless_finished(recipe: Mapping[str, Any], folder: Path, keep_weights: bool) -> None:
    has_weights = (folder / "bundle").exists()
    try:
        finished = _result(folder, recipe) is not None
    except UserError as error:
        if has_weights:  # training it again would only evaluate its bundle
            raise UserError(f"{error}; remove the folder {folder} to train the run again") from None
        finished = False
    if not finished and (stored := folder / "recipe.yaml").exists():
        values = Recipe.from_yaml(stored).to_dict()
        for name in ("epochs", "evaluate_every"):  # `train` would extend the run, unlike one of this recipe
            if values.get(name) != recipe[name]:
                raise UserError(
                    f"{folder} holds a run with {name} {values.get(name)}, not {recipe[name]}: give the same steps or "
                    "a new folder for out, or remove that folder to train the run again"
                )
    if finished and not keep_weights and not has_weights:  # it was killed before it removed them
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if not finished or (keep_weights and not (folder / "report.json").exists()):  # which is written last
        train_run(recipe, folder, keep_weights)


def _result(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """Fields of a finished run from figures.json of its folder; None without one of this recipe.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FIGURES
    if not path.exists():
        return None
    found = read_json_object(path)
    try:
        result = {
            "curves": Curves(**found["curves"]),
            "figures": Figures(**found["figures"]),
            "seconds": max(0.0, float(found["seconds"])),
        }
        trained = _comparable(found["recipe"])
    except (KeyError, TypeError, ValueError) as error:  # a UserError is a ValueError
        what = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{path} is damaged: {what}") from None
    return result if trained == _comparable(json.loads(json.dumps(dict(recipe)))) else None


def _comparable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the device, which may change, and with the name of the data's folder, which may have moved."""
    return {**recipe, "device": None, "data": PurePath(str(recipe["data"])).name}


def _damage(folder: Path, study: Study, run: Run) -> str | None:
    """What is wrong with figures.json of a run that can be trained again."""
    try:
        _result(folder / run.folder, recipe_of(study, run).to_dict())
    except UserError as error:
        return None if (folder / run.folder / "bundle").exists() else str(error)
    return None


def _ended(running: Sequence[Worker]) -> list[Worker]:
    """The workers that have ended, after at most a second."""
    sentinels = {worker.process.sentinel: worker for worker in running}
    connections = {worker.connection: worker for worker in running}
    ready = wait([*sentinels, *connections], timeout=1.0)
    return [worker for worker in running if worker.process.sentinel in ready or worker.connection in ready]


def _outcome(folder: Path, study: Study, worker: Worker) -> Run | None:
    """The run of a worker that has ended; None if a signal stopped it, which leaves it to be resumed."""
    run = worker.run
    assert run is not None
    status, value = worker.finish()
    if status == "stopped" and value in (130, 143):
        return None
    if status != "done":
        reason = value if status == "failed" else f"its process ended with exit code {value}"
        return replace(run, status="failed", reason=str(reason)[:1000], seconds=time.monotonic() - worker.started)
    result = _result(folder / run.folder, recipe_of(study, run).to_dict())
    if result is None:
        return replace(run, status="failed", reason=f"{run.folder}/{FIGURES} was not written")
    return replace(run, status="finished", reason=None, **result)


def update(folder: Path, run: Run) -> Study:
    """Write a run into study.json, which other processes write too."""
    with file_lock(folder / ".study.lock"):
        study = Study.read(folder).with_run(run)
        study.write(folder)
    return study


class _Progress:
    """Counts runs, and estimates the time left from how the finished ones compare with their plan."""

    def __init__(self, total: int, planned: float, jobs: int) -> None:
        self.total, self.jobs, self.done = total, jobs, 0
        self.planned_left, self.planned_done, self.taken = planned, 1e-9, 1e-9

    def line(self, run: Run, worker: Worker) -> str:
        """A line about a run that has ended."""
        assert worker.run is not None
        self.done += 1
        self.planned_left -= worker.run.seconds
        if run.status == "finished":
            self.planned_done += worker.run.seconds
            self.taken += time.monotonic() - worker.started
        pace = self.taken / self.planned_done if self.planned_done > 1e-6 else 1.0
        at_once = max(1, min(self.jobs, self.total - self.done))
        left = timedelta(seconds=round(max(0.0, self.planned_left) * pace / at_once))
        what = f"{run.member}, {counted(run.size, 'image')}, seed {run.seed}, learning rate {run.learning_rate:g}"
        if run.figures is None:
            result = f"failed: {run.reason}"
        else:
            held, gap = 100 * run.figures.top1, 100 * (run.figures.train_top1 - run.figures.top1)
            result = f"top-1 {held:.1f} %, {gap:.1f} points below that of its training images"
        return f"run {self.done} of {self.total}: {what}: {result}; {left} left"
