"""One run in progress: where it stands, what it logs, how it is measured on the way, saved and resumed."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from coatnet.data.loading import BadImages, evaluation_batches, training_batches
from coatnet.data.splits import Splits
from coatnet.errors import UserError
from coatnet.evaluation.metrics import Metrics
from coatnet.training.checkpoint import (
    Checkpoint,
    CorruptCheckpoint,
    latest_checkpoint,
    load_checkpoint,
    retain,
    save_checkpoint,
)
from coatnet.training.learner import Learner
from coatnet.training.optimization import learning_rate_at
from coatnet.training.plan import Plan
from coatnet.training.progress import TrainingProgress
from coatnet.training.recipe import parts
from coatnet.training.run_folder import RunFolder

LOGS_PER_RUN = 400
BEST = "best"


@dataclass(frozen=True)
class Position:
    """Where a run stands: all that a resumption needs beside tensors. Sums are since the last log."""

    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    since_log: int = 0
    best: float = -1.0
    evaluations_since_best: int = 0


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
        self.recipe = learner.recipe
        self.position = Position(seconds=time.monotonic() - began)
        num_pictures = len(splits.training) + len(splits.validation)
        self.bad_images = BadImages(num_pictures, self.recipe.bad_image_budget)
        self._log_steps = max(1, plan.recipe_steps // LOGS_PER_RUN)
        self._saved_at = self._logged_at = time.monotonic()

    @property
    def epoch(self) -> float:
        """Passes over the training pictures so far."""
        return round(self.position.step * self.plan.batch_size / len(self.splits.training), 4)

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        optimizer, schedule, *_ = parts(self.recipe)
        return learning_rate_at(self.position.step, self.plan.total_steps, optimizer.learning_rate, schedule)

    @property
    def out_of_patience(self) -> bool:
        """Whether as many evaluations as the recipe has patience for brought nothing better."""
        return self.recipe.patience is not None and self.position.evaluations_since_best >= self.recipe.patience

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that are still to come."""
        recipe, whole = self.recipe, parts(self.recipe)
        return training_batches(
            self.splits.training,
            preprocessing=whole.preprocessing,
            augmentation=whole.augmentation,
            batch_size=self.plan.batch_size,
            seed=recipe.seed,
            first_step=self.position.step,
            num_steps=self.plan.recipe_steps - self.position.step,
            num_workers=recipe.num_workers,
            balanced=recipe.balance == "sampler",
            bad_images=self.bad_images,
        )

    @property
    def over(self) -> bool:
        """Whether the plan has no further step; a plan in minutes is made anew here."""
        self.plan.update(self.position.step, self.position.seconds)
        return self.position.step >= self.plan.total_steps or self.out_of_patience

    def count(self, loss: float, norm: float, seconds: float) -> None:
        """Take in one optimizer step; log at every interval."""
        at = self.position
        self.position = at = replace(
            at,
            step=at.step + 1,
            seconds=at.seconds + seconds,
            loss_sum=at.loss_sum + loss,
            norm_sum=at.norm_sum + norm,
            since_log=at.since_log + 1,
        )
        self.plan.timed(seconds)
        if at.step % self._log_steps == 0 or at.step >= self.plan.total_steps:
            self._log_training(at.loss_sum / at.since_log, at.norm_sum / at.since_log)
            self.position = replace(at, loss_sum=0.0, norm_sum=0.0, since_log=0)

    def measure(self) -> None:
        """Evaluate the averaged weights on the held-out pictures; keep the best, for patience."""
        began = time.monotonic()
        figures = self._figures()
        score = figures.get("top1", figures.get("mean_average_precision", 0.0))
        better = score > self.position.best
        waited = 0 if better else self.position.evaluations_since_best + 1
        took = time.monotonic() - began
        seconds = self.position.seconds + took
        self.position = replace(
            self.position, seconds=seconds, best=max(score, self.position.best), evaluations_since_best=waited
        )
        self.plan.evaluated(seconds, took)
        self.log(figures)
        self.progress.evaluated(self.position.step, self.epoch, figures)
        if better and self.recipe.patience is not None:
            self._publish(BEST)

    def save(self) -> None:
        """Publish a checkpoint of this step and remove the older ones."""
        self._publish(f"step-{self.position.step:09d}")
        retain(self.run.checkpoints)
        self._saved_at = time.monotonic()

    def save_if_due(self) -> None:
        """Save after the minutes that the recipe sets. A save that fails is told, and training goes on."""
        if time.monotonic() - self._saved_at < 60 * self.recipe.checkpoint_every_minutes:
            return
        try:
            self.save()
        except UserError as error:
            self.progress.say(f"warning: {error}; training goes on")
            self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Go back to the last whole checkpoint of the run folder, if there is one."""
        checkpoint = latest_checkpoint(self.run.checkpoints, lambda text: self.progress.say(f"warning: {text}"))
        if checkpoint is not None:
            self.learner.restore(checkpoint)
            saved = Position(**checkpoint.state["position"])
            self.position = replace(saved, seconds=saved.seconds + self.position.seconds)
            for name, reason in checkpoint.state["bad_images"].items():
                self.bad_images.add(name, reason)
            self.plan.resumed(self.position.step, self.position.seconds)
            self.progress.say(f"resuming {self.run.path} at step {self.position.step:,}")
        self.run.rewind(self.position.step)

    def restore_best(self) -> None:
        """Take the weights of the best evaluation."""
        try:
            self.learner.restore(load_checkpoint(self.run.checkpoints / BEST))
        except CorruptCheckpoint as reason:
            self.progress.say(f"warning: the best weights are lost ({reason}); the last ones are taken")

    def log(self, values: Mapping[str, float]) -> None:
        """A line in the run's log, with where the run stands."""
        self.run.log({"step": self.position.step, "epoch": self.epoch, **values})

    def _publish(self, name: str) -> None:
        state = {"position": asdict(self.position), "bad_images": dict(self.bad_images.records)}
        save_checkpoint(self.run.checkpoints, name, Checkpoint(self.learner.tensors(), state))

    def _log_training(self, loss: float, norm: float) -> None:
        now = time.monotonic()
        speed = self.position.since_log * self.plan.batch_size / max(now - self._logged_at, 1e-9)
        self._logged_at = now
        values = {"loss": loss, "learning_rate": self.learner.last_learning_rate, "grad_norm": norm}
        self.log({**values, "images_per_second": round(speed, 1), "seconds": round(self.position.seconds, 3)})
        self.progress.update(
            self.position.step,
            self.plan.total_steps,
            epoch=self.epoch,
            loss=loss,
            learning_rate=self.learner.last_learning_rate,
            images_per_second=speed,
        )

    @torch.inference_mode()
    def _figures(self) -> dict[str, float]:
        dataset, model = self.splits.validation, self.learner.average.model
        metrics = Metrics(len(dataset.classes), dataset.multilabel)
        training = model.training
        model.eval()
        for images, labels, _ in evaluation_batches(
            dataset,
            preprocessing=parts(self.recipe).preprocessing,
            batch_size=max(self.plan.batch_size, 64),
            num_workers=self.recipe.num_workers,
            bad_images=self.bad_images,
        ):
            with self.learner.autocast():
                logits = model(images.to(self.learner.device))
            metrics.update(logits.float(), labels)
        model.train(training)
        return metrics.compute()
