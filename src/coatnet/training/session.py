"""One run in progress: where it stands, what it logs, how it is measured on the way, saved and resumed.

With several processes each has a session, and all call every method together; the first one's clock counts.
"""

import signal
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import Tensor

from coatnet.data.loader import BadImages, sampler_of, training_batches
from coatnet.data.splits import Splits
from coatnet.errors import UserError
from coatnet.training.async_checkpoint import CheckpointWriter
from coatnet.training.checkpoint import CorruptCheckpoint, latest_checkpoint, load_checkpoint, open_checkpoint
from coatnet.training.distributed.batch_split import workers_of_one
from coatnet.training.distributed.sync import Agreement
from coatnet.training.duration import Plan
from coatnet.training.learner import Learner, NotFinite
from coatnet.training.loggers import Loggers, open_loggers
from coatnet.training.optimizer import learning_rate_at
from coatnet.training.position import Position
from coatnet.training.progress import TrainingProgress
from coatnet.training.run_folder import RunFolder
from coatnet.training.validation import measure

LOGS_PER_RUN = 400
BEST = "best"


class Session:
    """Holds the parts of a run together; `position` is replaced at every step."""

    def __init__(
        self,
        learner: Learner,
        plan: Plan,
        splits: Splits,
        run: RunFolder,
        progress: TrainingProgress,
        began: float,
    ) -> None:
        """`began` is when this process took up the run, on the monotonic clock."""
        self.learner, self.plan, self.splits, self.run, self.progress = learner, plan, splits, run, progress
        self.recipe, self.processes = learner.recipe, learner.processes
        self.saver = CheckpointWriter(
            run.checkpoints, self.processes, self.recipe.keep_checkpoints, self.recipe.keep_every_hours or 0.0
        )
        self.agreement, self.loggers = Agreement(self.processes), Loggers({}, progress.say)
        self.position = Position(seconds=time.monotonic() - began)
        num_images = len(splits.training) + len(splits.validation)
        self.bad_images = BadImages(num_images, self.recipe.bad_image_budget)
        self._log_steps = max(1, plan.recipe_steps // LOGS_PER_RUN)
        self._saved_at = self._logged_at = time.monotonic()

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return round(self.position.step * self.plan.batch_size / len(self.splits.training), 4)

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        peak, schedule = self.recipe.optimizer.learning_rate, self.recipe.schedule
        return learning_rate_at(self.position.step, self.plan.total_steps, peak, schedule)

    @property
    def out_of_patience(self) -> bool:
        """Whether as many evaluations as the recipe has patience for brought nothing better."""
        return 0 < self.recipe.patience <= self.position.evaluations_since_best

    def batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This process's share of the batches that are still to come."""
        recipe = self.recipe
        return training_batches(
            self.splits.training,
            preprocessing=recipe.preprocessing,
            augmentation=recipe.augmentation,
            batch_size=self.plan.batch_size,
            seed=recipe.seed,
            first_step=self.position.step,
            num_steps=self.plan.recipe_steps - self.position.step,
            num_workers=workers_of_one(recipe.num_workers, self.processes),
            balanced=recipe.balance == "sampler",
            bad_images=self.bad_images,
            batch_indices=self.learner.share.places,
        )

    @property
    def over(self) -> bool:
        """Whether the plan has no further step; a plan in minutes is made anew here."""
        self.plan.update(self.position.step, self.position.seconds)
        return self.position.step >= self.plan.total_steps or self.out_of_patience

    def step(self, images: Tensor, labels: Tensor) -> tuple[float, float] | None:
        """One optimizer step: loss and norm of the gradients. None if they were not finite and the step is left out.

        Raises NotFinite, and logs whose images they were, once the recipe has no budget for it (left).
        """
        at = self.position
        try:
            return self.learner.step(images, labels, step=at.step, learning_rate=self.learning_rate)
        except NotFinite as error:
            size, balanced = self.plan.batch_size, self.recipe.balance == "sampler"
            order = sampler_of(self.splits.training, self.recipe.seed, balanced)
            indices, _ = order.sample(np.arange(at.step * size, (at.step + 1) * size))
            if self.processes.is_main:
                self.run.log({"step": at.step + 1, "not_finite": True, "pictures": indices.tolist()})
            if at.left_out >= self.recipe.non_finite_budget:
                raise self.processes.error_on_main(error) from None
            self.progress.say(f"warning: {error}; the step is left out")
            return None

    def agree(self, seconds: float, told: signal.Signals | None) -> float:
        """After a step: how long it took, whether anyone was told to stop, whether it is time to save; the seconds."""
        due = time.monotonic() - self._saved_at >= 60 * self.recipe.checkpoint_every_minutes
        return self.agreement.after_step(seconds, told, save_due=due, written=self.saver.written)

    def count(self, outcome: tuple[float, float] | None, seconds: float) -> None:
        """Take in what came of one optimizer step; log at every interval."""
        self.position = at = self.position.after_step(outcome, seconds)
        self.plan.timed(seconds)
        self.progress.moved(at.step, self.plan.total_steps, self.plan.seconds_left(at.step, at.seconds))
        if at.since_log and (at.step % self._log_steps == 0 or at.step >= self.plan.total_steps):
            self._log_training(at.loss_sum / at.since_log, at.norm_sum / at.since_log)
            self.position = at.after_log()

    def catch_up(self, told: Callable[[], signal.Signals | None]) -> None:
        """Make the evaluation that was due at this step, if the run was stopped in it."""
        step = self.position.step
        if step > self.position.measured and self.plan.evaluation_due(step, self.position.seconds):
            self.measure(told)

    def measure(self, told: Callable[[], signal.Signals | None]) -> None:
        """Evaluate the averaged weights on the held-out images; keep the best, for patience.

        Once `told` gives a signal on any process it is given up, to be made when the run is resumed.
        """
        began = time.monotonic()
        figures = measure(
            self.learner,
            self.splits.validation,
            batch_size=self.plan.batch_size,
            num_workers=workers_of_one(self.recipe.num_workers, self.processes),
            bad_images=self.bad_images,
            told_to_stop=lambda: self.agreement.stops_measuring(told()),
        )
        if figures is None:
            return
        score = figures.get("top1", figures.get("mean_average_precision", 0.0))
        better, took = score > self.position.best, self.processes.broadcast(time.monotonic() - began)
        self.position = self.position.after_evaluation(score, took)
        self.plan.evaluated(self.position.seconds, took)
        self._gather_bad_images()
        self.log({**figures, "bad_images": len(self.bad_images.records)})
        self.progress.evaluated(self.position.step, self.epoch, figures)
        if better and self.recipe.patience:
            self.saver.finish_or_warn(self.progress.say)
            self._begin_saving(BEST)
            self.saver.finish()

    def save(self) -> None:
        """Publish a checkpoint of this step, and wait for it. Raises UserError if it can not be written."""
        self.saver.finish_or_warn(self.progress.say)
        if any(self.processes.gather(self.saver.last != (self._name, self._state))):  # bad images differ
            self._begin_saving(self._name)
            self.saver.finish()

    def save_if_due(self) -> None:
        """Publish what has been written meanwhile, and begin to save after the minutes that the recipe sets.

        A save that fails is told, and training goes on.
        """
        if self.agreement.written:
            self.saver.finish_or_warn(self.progress.say)
        if self.agreement.save_due and not self.saver.busy:
            self._saved_at = time.monotonic()
            try:
                self._begin_saving(self._name)
            except UserError as error:
                self.progress.say(f"warning: {error}; training goes on")

    def resume(self) -> None:
        """Go back to the last whole checkpoint of the run folder, if there is one."""
        checkpoint = None
        if self.processes.is_main:
            checkpoint = latest_checkpoint(self.run.checkpoints, lambda text: self.progress.say(f"warning: {text}"))
        path = self.processes.broadcast(checkpoint.path if checkpoint else None)
        if path is not None:
            checkpoint = checkpoint or open_checkpoint(path)
            self.learner.restore(checkpoint)
            saved = Position(**checkpoint.state["position"])
            self.position = replace(saved, seconds=saved.seconds + self.position.seconds)
            for name, reason in checkpoint.state["bad_images"].items():
                self.bad_images.add(name, reason)
        self.position = self.processes.broadcast(self.position)  # or processes would end a plan in minutes apart
        if path is not None:
            self.saver.last = (path.name, self._state)
            self.plan.resumed(self.position.step, self.position.seconds)
            self.progress.say(f"resuming {self.run.path} at step {self.position.step:,}")
        if self.processes.is_main:
            self.run.rewind(self.position.step)
            self.loggers = open_loggers(self.recipe.loggers, self.run.path, self.position.step, self.progress.say)
            self.loggers.log_config(self.recipe.to_dict())

    def restore_best(self) -> None:
        """Take the weights of the best evaluation."""
        try:
            self.learner.restore(load_checkpoint(self.run.checkpoints / BEST))
        except CorruptCheckpoint as reason:
            self.progress.say(f"warning: the best weights are lost ({reason}); the last ones are taken")

    def log(self, values: Mapping[str, float]) -> None:
        """A line in the run's log, with where the run stands."""
        if self.processes.is_main:
            self.run.log({"step": self.position.step, "epoch": self.epoch, **values})
            self.loggers.log_metrics(self.position.step, {"epoch": self.epoch, **values})

    @property
    def _name(self) -> str:
        """Of a checkpoint of this step."""
        return f"step-{self.position.step:09d}"

    @property
    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {"position": asdict(self.position), "bad_images": dict(self.bad_images.records)}

    def _begin_saving(self, name: str) -> None:
        self._gather_bad_images()
        self.saver.start(name, self.learner.tensors(), self._state)

    def _gather_bad_images(self) -> None:
        for records in self.processes.gather(dict(self.bad_images.records)):
            for image, reason in records.items():
                self.bad_images.add(image, reason)

    def _log_training(self, loss: float, norm: float) -> None:
        now = time.monotonic()
        speed = self.position.since_log * self.plan.batch_size / max(now - self._logged_at, 1e-9)
        self._logged_at = now
        values = {"loss": loss, "learning_rate": self.learner.last_learning_rate, "images_per_second": round(speed, 1)}
        self.log({**values, "grad_norm": norm, "seconds": round(self.position.seconds, 3)})
        self.progress.logged(epoch=self.epoch, **values)
