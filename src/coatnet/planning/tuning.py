"""A search for learning rate, weight decay and strength of augmentation by successive halving, before a run.

Successive halving (Jamieson and Talwalkar, 2016, arXiv:1502.07943), asynchronous as in Li et al., 2020,
arXiv:1810.05934: a trial goes on after a ninth and a third of its steps only if it is among the best third there. Its
values come from a tree-structured Parzen estimator (Bergstra et al., 2011). Both are Optuna's.
"""

import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from coatnet.bundle import Bundle
from coatnet.data.splits import Splits
from coatnet.errors import NotFinite, UserError, counted, import_extra
from coatnet.evaluation.metrics import (
    Interval,
    Metrics,
    discordant,
    main_figure,
    may_be_chance,
    mcnemar,
    paired_difference,
    wilson_interval,
)
from coatnet.system.files import MAX_LOG_BYTES, atomic_write, read_regular, translate_write_errors
from coatnet.system.json_reader import read_json_object
from coatnet.training.config import MAY_CHANGE, Recipe, TrainingConfig, merge
from coatnet.training.defaults import num_steps, resolve
from coatnet.training.distributed.processes import SINGLE_PROCESS, require_single_process
from coatnet.training.duration import EVALUATION_COST
from coatnet.training.image_cache import cached_images
from coatnet.training.interruption import Interrupted, Interruption, Synchronization, exit_code
from coatnet.training.pace import measure_pace
from coatnet.training.progress import TrainingProgress
from coatnet.training.run import prepare
from coatnet.training.run_folder import RunFolder
from coatnet.training.trainer import Trainer, deterministic_on_cpu

# Factors on what recipe and defaults say, so that what short trials find holds for the whole run as well.
LEARNING_RATE_FACTORS = (1 / 6, 6.0)
WEIGHT_DECAY_FACTORS = (0.1, 10.0)
AUGMENTATION_STRENGTHS = (0.0, 2.0)
DEFAULT_FACTORS = {"learning_rate": 1.0, "weight_decay": 1.0, "augmentation": 1.0}

REDUCTION = 3
RUNGS = (1, 3, 9)  # ninths of a trial's steps after which it is measured
WHOLE_TRIALS = 6  # chosen: so many trials would fit if none were stopped; with halving, some twenty
RANDOM_TRIALS = 8  # at the start, before the estimator proposes values


def tune(recipe: Recipe, out: str | Path, minutes: float, *, console: Console | None = None) -> Recipe:
    """Search for `minutes` and give the recipe with the best values found; the next run in `out` may begin with it.

    `out` gets tuning.journal, from which an interrupted search goes on, and at the end tuning.json and tuning.md. With
    tuning.json there the search is over, and its values are given; with more minutes than it had, it goes on. A trial
    that was cut off is repeated. The held-out images choose the values, so figures on them are too favorable
    afterwards; reports say so.

    Args:
        recipe: what is asked of the run.
        out: its folder, new or that of an earlier call.
        minutes: how long to search, over all calls; a run of the whole recipe is not included.
        console: where progress goes; standard error if None.

    Raises:
        UserError: Optuna is not installed, recipe, data and folder do not fit together, the time is too short, or
            several processes train together.
        Interrupted: a stop signal arrived; the same call goes on.
    """
    require_single_process("tune")
    if not 0 < minutes < math.inf:
        raise UserError(f"tune must be minutes above 0, such as 30, got {minutes:g}")
    progress = TrainingProgress(console)
    folder = RunFolder(out, recipe)
    result = folder.tuning
    if result.exists() and (folder.resumed is not None or minutes <= 1.01 * _limit_of(result)):
        return _with_values(recipe, result, progress)
    if folder.resumed is not None:
        raise UserError(
            f"{folder.path} holds a run that began without a search: leave tune out to resume it, or give another "
            "folder for out"
        )
    import_extra("optuna", "tune", "tune")
    began = time.monotonic()
    given, splits, init, config = prepare(recipe, folder, SINGLE_PROCESS, progress, began)
    with translate_write_errors(folder.path, "choose another folder for out"):
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.hold()
    try:
        with deterministic_on_cpu(config.device), translate_write_errors(folder.path), ExitStack() as cleanup:
            cleanup.callback(torch.set_num_threads, torch.get_num_threads())
            strongest = tuned_config(config, {**DEFAULT_FACTORS, "augmentation": AUGMENTATION_STRENGTHS[1]})
            # Before images are decoded: it refuses a time that is too short, and what cannot be trained.
            search = Search(given, _asked(recipe), config, splits, init, folder, 60 * minutes, progress)
            search.images, kept = cleanup.enter_context(cached_images(strongest, splits, quiet=progress.console.quiet))
            if kept:
                progress.say(kept)
            search.run()
            search.write()
    finally:
        folder.release()
    return _with_values(recipe, result, progress)


def _limit_of(result: Path) -> float:
    """The minutes that the search of a tuning.json was given; infinite for one of an earlier release."""
    limit = read_json_object(result).get("limit_minutes")
    return float(limit) if isinstance(limit, int | float) else math.inf


def _with_values(recipe: Recipe, result: Path, progress: TrainingProgress) -> Recipe:
    """The recipe with the values of a tuning.json."""
    found = read_json_object(result)
    _require_same(found.get("asked"), _asked(recipe), result)
    values, summary = found.get("values"), found.get("summary")
    if not isinstance(values, Mapping) or not isinstance(summary, str):
        raise UserError(f"{result} is damaged: it has no values; remove it to search again")
    progress.say(summary)
    return recipe.changed(values)


def _asked(recipe: Recipe) -> dict[str, Any]:
    """What must be the same for the search to go on."""
    return {name: value for name, value in recipe.to_dict().items() if name not in MAY_CHANGE}


def _require_same(before: Any, asked: dict[str, Any], place: Path) -> None:
    """Raises UserError if the search was for another recipe."""
    now = json.loads(json.dumps(asked))
    if before != now:
        names = [name for name in {**now, **(before or {})} if now.get(name) != (before or {}).get(name)]
        raise UserError(
            f"{place} is of a search with another {', '.join(names) or 'recipe'}: give the same to go on, or another "
            "folder for out"
        )


def tuned_values(config: TrainingConfig, factors: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Values of a recipe: those of a configuration times learning-rate, weight-decay and augmentation factors.

    The strength scales how much of an image a crop may leave out, shifts, RandAugment's magnitude, erasing and mixing;
    TrivialAugment is off below one half. At 0 there are none of these. Mirroring and label smoothing stay.
    """
    strength, augmentation, mixing = factors["augmentation"], config.augmentation, config.mixing
    smallest, largest = augmentation.crop_scale
    magnitude = min(30, round(strength * augmentation.rand_augment_magnitude))
    return {
        "optimizer": {
            "learning_rate": _rounded(config.optimizer.learning_rate * factors["learning_rate"]),
            "weight_decay": _rounded(config.optimizer.weight_decay * factors["weight_decay"]),
        },
        "augmentation": {
            "crop_scale": [min(largest, max(smallest / 2, _rounded(1 - strength * (1 - smallest)))), largest],
            "shift": round(strength * augmentation.shift),
            "rand_augment_layers": augmentation.rand_augment_layers if magnitude else 0,
            "rand_augment_magnitude": magnitude,
            "trivial_augment": augmentation.trivial_augment and strength >= 0.5,  # it has no strength of its own
            "erasing_rate": min(1.0, _rounded(strength * augmentation.erasing_rate)),
        },
        "mixing": {
            "mixup_alpha": _rounded(strength * mixing.mixup_alpha),
            "cutmix_alpha": _rounded(strength * mixing.cutmix_alpha),
        },
    }


def tuned_config(config: TrainingConfig, factors: Mapping[str, float]) -> TrainingConfig:
    """A configuration with `tuned_values`."""
    return TrainingConfig.from_dict(merge(config.to_dict(), tuned_values(config, factors)))


def _rounded(value: float) -> float:
    """Four significant digits; a value that has no more stays as it is."""
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Trial:
    """One trial as the report tells it: its factors, the steps it took and the figure on the held-out images then."""

    number: int
    learning_rate: float
    weight_decay: float
    augmentation: float
    steps: int
    score: float | None
    outcome: str  # "whole", "stopped", "out of time" or "diverged"

    @property
    def factors(self) -> dict[str, float]:
        """The factors by name, as `tuned_values` takes them."""
        return {name: getattr(self, name) for name in DEFAULT_FACTORS}


class Search:
    """A search in a run folder, which this process holds."""

    def __init__(
        self,
        recipe: Recipe,
        asked: dict[str, Any],
        config: TrainingConfig,
        splits: Splits,
        init: Bundle | None,
        folder: RunFolder,
        limit_seconds: float,
        progress: TrainingProgress,
    ) -> None:
        self.recipe, self.asked, self.config, self.init = recipe, asked, config, init
        self.splits = self.images = splits  # the second may be replaced by decoded ones
        self.folder, self.limit_seconds, self.progress = folder, limit_seconds, progress
        self.multilabel = splits.multilabel
        self.study = self._open_study(folder.path / "tuning.journal")
        self.spent = sum(trial.user_attrs.get("seconds", 0.0) for trial in self.study.trials)
        if "steps" not in self.study.user_attrs:
            self._plan()
        self.steps, self.run_steps, self.step_seconds = (
            self.study.user_attrs[name] for name in ("steps", "run_steps", "step_seconds")
        )
        epochs = (self.steps - 0.5) * config.batch_size / len(splits.training)  # they are rounded up to whole steps
        changes: dict[str, Any] = {
            "epochs": epochs,
            "max_minutes": 0.0,
            "resolution": config.preprocessing.resolution,  # which may follow from the minutes
        }
        if recipe.head_first_epochs:
            changes["head_first_epochs"] = recipe.head_first_epochs * epochs / config.epochs
        self.short = resolve(recipe.changed(changes), splits, init)

    def _open_study(self, journal: Path) -> Any:
        """The study of the journal; of a trial that was cut off only its values stay, which are tried again."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if journal.exists() and not (lines := read_regular(journal, MAX_LOG_BYTES)).endswith(b"\n"):
            atomic_write(journal, lines[: lines.rfind(b"\n") + 1])  # a line that was not written to its end
        journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)  # of a killed process: the folder is ours
        try:
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(journal))),
                study_name="tuning",
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=RUNGS[0], reduction_factor=REDUCTION),
            )
            trials = study.trials
        except OSError:
            raise
        except Exception as error:  # whatever a damaged line makes it say
            raise UserError(f"{journal} is damaged; remove it to search again") from error
        # A resumed search must not draw the values of the first trials again.
        study.sampler = optuna.samplers.TPESampler(
            seed=(self.config.seed + len(trials)) % 2**32, n_startup_trials=RANDOM_TRIALS
        )
        if "asked" in study.user_attrs:
            _require_same(study.user_attrs["asked"], self.asked, journal)
        else:
            study.set_user_attr("asked", self.asked)
        if not trials:
            study.enqueue_trial(DEFAULT_FACTORS)
        for trial in trials:
            if trial.state == optuna.trial.TrialState.RUNNING:
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                study.enqueue_trial({**trial.params, **trial.system_attrs.get("fixed_params", {})})
        return study

    def _trainer(self, config: TrainingConfig) -> Trainer:
        trainer = Trainer(config, self.splits, self.folder, init=self.init)
        trainer.images = self.images
        torch.set_num_threads(trainer.cores.threads)
        trainer.compute_teacher_logits()
        return trainer

    def _plan(self) -> None:
        """Choose the steps of a trial: a sixth of the time for those of a whole one, and no more than the recipe's."""
        config, num_images = self.config, len(self.splits.training)
        pace = measure_pace(config, self.recipe, self.splits, self.init, SINGLE_PROCESS, self.limit_seconds)
        seconds = pace.step
        evaluation = EVALUATION_COST * seconds * len(self.splits.validation) / config.batch_size
        fit = int((self.limit_seconds / WHOLE_TRIALS - len(RUNGS) * evaluation) / seconds)
        if fit < RUNGS[-1]:
            (self.folder.path / "tuning.journal").unlink()  # nothing is in it yet
            needed = WHOLE_TRIALS * (RUNGS[-1] * seconds + len(RUNGS) * evaluation) / 60
            raise UserError(
                f"tune {self.limit_seconds / 60:g} is too short: a trial would have {max(0, fit)} steps of "
                f"{seconds:.2g} s; give at least {math.ceil(10 * needed) / 10:g} minutes"
            )
        run_steps = num_steps(config.epochs, num_images, config.batch_size)
        if config.max_minutes:
            run_steps = min(run_steps, max(RUNGS[-1], int(60 * config.max_minutes / seconds)))
        self.study.set_user_attr("step_seconds", seconds)
        self.study.set_user_attr("run_steps", run_steps)
        self.study.set_user_attr("steps", min(fit, run_steps))

    def run(self) -> None:
        """Make trials until the time is over; the first one has the values that there would be without a search."""
        import optuna

        self.progress.say(
            f"searching for {self.limit_seconds / 60:g} minutes with trials of {counted(self.steps, 'step')}, where "
            f"the whole run has {self.run_steps:,}"
        )
        first_rung = self.steps * RUNGS[0] / RUNGS[-1] * self.step_seconds
        with self.progress, Interruption() as interruption:
            sync = Synchronization(SINGLE_PROCESS, interruption)
            while self.spent + first_rung < self.limit_seconds or not self._trials():
                trial, started = self.study.ask(), time.monotonic()
                factors = {
                    "learning_rate": trial.suggest_float("learning_rate", *LEARNING_RATE_FACTORS, log=True),
                    "weight_decay": trial.suggest_float("weight_decay", *WEIGHT_DECAY_FACTORS, log=True),
                    "augmentation": trial.suggest_float("augmentation", *AUGMENTATION_STRENGTHS),
                }
                try:
                    outcome = self._try(trial, factors, sync, started)
                except NotFinite:
                    reported = self.study.trials[trial.number].intermediate_values
                    trial.report(0.0, next(rung for rung in RUNGS if rung not in reported))
                    outcome = "diverged"
                trial.set_user_attr("seconds", time.monotonic() - started)  # of one that is cut off, too
                if sync.stop is not None:
                    self.progress.say(f"stopped by {sync.stop.name}; the same command goes on with the search")
                    raise Interrupted(exit_code(sync.stop))
                self.spent += time.monotonic() - started
                trial.set_user_attr("outcome", outcome)
                if outcome == "whole":
                    self.study.tell(trial, self.study.trials[trial.number].intermediate_values[RUNGS[-1]])
                elif outcome == "diverged":
                    self.study.tell(trial, 0.0)  # of a pruned trial the sampler would take the last figure for good
                else:
                    self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                self.progress.say(self._describe(self._trials()[-1]))

    def _try(self, trial: Any, factors: Mapping[str, float], sync: Synchronization, started: float) -> str:
        """Train with factors and report to the study at every rung; how it ended."""
        trainer = self._trainer(tuned_config(self.short, factors))
        total = trainer.duration.total_steps
        rungs = {math.ceil(total * rung / RUNGS[-1]): rung for rung in RUNGS}
        trial.set_user_attr("steps", 0)
        compared_with = factors == DEFAULT_FACTORS  # by all others, so it is never stopped
        with closing(trainer.batches()) as batches:
            for batch in batches:
                trainer.step_or_skip(*batch)
                step, seconds = trainer.state.step, time.monotonic() - started
                self.progress.moved(step, total, max(0.0, self.limit_seconds - self.spent - seconds))
                if sync.stop is not None:
                    break
                if step in rungs:
                    metrics = trainer.validation_metrics(sync)
                    if metrics is None:
                        break
                    score = metrics.compute()[main_figure(metrics.multilabel)]
                    trial.report(score, rungs[step])
                    trial.set_user_attr("score", score)
                    trial.set_user_attr("steps", step)
                    if step == total:
                        trial.set_user_attr("correct", _packed(metrics))
                    elif trial.should_prune() and not compared_with:
                        return "stopped"
                if step < total and not compared_with and self.spent + seconds > self.limit_seconds:
                    return "out of time"
        return "whole"

    # What was found

    def _whole_trials(self) -> list[Any]:
        """The trials that took all their steps."""
        return [
            trial
            for trial in self.study.trials
            if trial.state.name == "COMPLETE" and trial.user_attrs.get("outcome") == "whole"
        ]

    def _trials(self) -> list[Trial]:
        """All trials that ended, in their order."""
        return [
            Trial(
                trial.number,
                **{name: _rounded(trial.params[name]) for name in DEFAULT_FACTORS},
                steps=trial.user_attrs["steps"],
                score=trial.user_attrs.get("score"),
                outcome=trial.user_attrs["outcome"],
            )
            for trial in self.study.trials
            if trial.state.name in ("COMPLETE", "PRUNED")
        ]

    def _describe(self, trial: Trial) -> str:
        """A trial in a line."""
        values = tuned_values(self.short, trial.factors)["optimizer"]
        name = "mean average precision" if self.multilabel else "top-1"
        measured = "" if trial.score is None else f"{name} {100 * trial.score:.1f} % after "
        return (
            f"trial {trial.number}: learning rate {values['learning_rate']:.2g}, weight decay "
            f"{values['weight_decay']:.2g}, augmentation {trial.augmentation:.2g}: {measured}"
            f"{counted(trial.steps, 'step')} ({trial.outcome})"
        )

    def write(self) -> None:
        """Write tuning.md and tuning.json, whose being there ends the search."""
        whole = self._whole_trials()
        if not whole:
            raise UserError(
                f"none of {counted(len(self._trials()), 'trial')} kept a finite loss to its end: lower "
                "optimizer.learning_rate, or use precision fp32"
            )
        best = max(whole, key=lambda trial: (trial.value, -trial.number))
        default = next((trial for trial in whole if trial.params == DEFAULT_FACTORS), None)
        values = tuned_values(self.config, best.params)
        num_images = len(self.splits.validation)
        difference, interval, p = None, None, None
        if default is not None:
            difference = best.value - default.value
            if not self.multilabel:
                ours, theirs = (_unpacked(trial.user_attrs["correct"]) for trial in (best, default))
                num_images = len(ours)
                interval = paired_difference(ours, theirs)
                p = mcnemar(*discordant(ours, theirs))
        found = {
            "summary": self._summary(best, default, values, difference, interval, p, len(self._trials())),
            "asked": self.asked,
            "values": values,
            "without_search": None if default is None else default.number,
            "factors": {name: _rounded(value) for name, value in best.params.items()},
            "minutes": round(self.spent / 60, 2),
            "limit_minutes": self.limit_seconds / 60,
            "steps": self.steps,
            "num_images": num_images,
            "score": best.value,
            "default_score": None if default is None else default.value,
            "difference": difference,
            "difference_interval": interval,
            "p": p,
            "trials": [asdict(trial) for trial in self._trials()],
        }
        atomic_write(self.folder.path / "tuning.md", self._markdown(found))
        atomic_write(self.folder.tuning, json.dumps(found, indent=1))

    def _summary(
        self,
        best: Any,
        default: Any,
        values: Mapping[str, Mapping[str, Any]],
        difference: float | None,
        interval: Interval | None,
        p: float | None,
        num_trials: int,
    ) -> str:
        """What was found, in a line."""
        if default is not None and best.number == default.number:
            return f"tuning: in {counted(num_trials, 'trial')}, nothing was better than the values without a search"
        optimizer = values["optimizer"]
        text = (
            f"tuning: the best of {counted(num_trials, 'trial')} has learning rate {optimizer['learning_rate']:g}, "
            f"weight decay {optimizer['weight_decay']:g} and {best.params['augmentation']:.2g} times the augmentation"
        )
        if difference is not None:
            text += f", {100 * difference:+.1f} points to the values without a search after {self.steps:,} steps"
        if interval is not None and p is not None:
            text += f" ({describe_difference(interval, p)})"
        return f"{text}; the whole run takes these values"

    def _markdown(self, found: Mapping[str, Any]) -> str:
        """tuning.md: what was found, how far it can be trusted, and all trials."""
        name = "mean average precision" if self.multilabel else "top-1"
        number = found["without_search"]
        default = "" if number is None else f" Trial {number} has the values without a search."
        rows = []
        for trial in sorted(self._trials(), key=lambda each: (-each.steps, -(each.score or 0.0))):
            values = tuned_values(self.short, trial.factors)["optimizer"]
            score, interval = "", ""
            if trial.score is not None:
                score = f"{100 * trial.score:.1f}"
                low, high = wilson_interval(round(trial.score * found["num_images"]), found["num_images"])
                interval = "" if self.multilabel else f"{100 * low:.1f} to {100 * high:.1f}"
            rows.append(
                f"| {trial.number} | {values['learning_rate']:.3g} | {values['weight_decay']:.3g} | "
                f"{trial.augmentation:.2f} | {trial.steps:,} | {score} | {interval} | {trial.outcome} |"
            )
        return "\n".join(
            (
                "# What the search found",
                "",
                f"{found['summary'][0].upper()}{found['summary'][1:]}.",
                "",
                f"{counted(len(rows), 'trial')} in {found['minutes']:.3g} minutes. A whole trial has "
                f"{self.steps:,} steps, where the run has {self.run_steps:,}: longer runs want more augmentation than "
                f"short trials show, which is why it is a factor on what suits the length.{default}",
                "",
                f"These {found['num_images']:,} held-out images chose the best of the trials, so its figure, the "
                "difference, and the figures of the run on the same images are too favorable. Images that took no part "
                "tell how good the model is.",
                "",
                f"| trial | learning rate | weight decay | augmentation | steps | {name} % | 95 % interval | outcome |",
                "|---:|---:|---:|---:|---:|---:|---|---|",
                *rows,
                "",
            )
        )


def describe_difference(interval: Interval, p: float) -> str:
    """The interval of a gain in words, and whether the gain may be chance, by the p of McNemar's test as well."""
    low, high = (100 * bound for bound in interval)
    noise = ", which may be chance" if may_be_chance(interval, p) else ""
    return f"95 % interval {low:+.1f} to {high:+.1f}{noise}"


def _packed(metrics: Metrics) -> str | None:
    """Which images were classified right, in their order, as text for the journal; None for several labels."""
    correct = metrics.correct()
    return None if correct is None else f"{len(correct)}:{np.packbits(correct).tobytes().hex()}"


def _unpacked(text: str) -> np.ndarray:
    """The array (N,) of bool that `_packed` was given."""
    size, _, bits = text.partition(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=int(size)).astype(bool)
