"""The training of a network: state, step, loop, evaluation and checkpoints, resumable to the last bit.

Shapes: B images of a batch on this process, C channels, R side of the images, K classes.
"""

import math
import platform
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic
from rich.console import Console
from torch import Tensor

from coatnet.bundle import Bundle, load
from coatnet.bundle.bundle import place_name, without_places
from coatnet.data.loader import BadImages, bytes_of_batch, sampler_of, seconds_to_read, training_batches
from coatnet.data.mixing import mix
from coatnet.data.sampler import hash_words
from coatnet.data.splits import Splits
from coatnet.data.transforms import EvaluationTransform
from coatnet.data.worker_processes import may_start_processes, require_shared_memory
from coatnet.errors import NotFinite, UserError, is_memory_shortage
from coatnet.evaluation.calibrate import MAX_TRAINING_IMAGES
from coatnet.evaluation.metrics import Metrics, main_figure
from coatnet.inference.logits import infer, workers_for
from coatnet.model.network import create_model
from coatnet.system.hardware import (
    choose_device,
    describe_device,
    explain_compiler,
    multiplies_bf16,
)
from coatnet.training.async_checkpoint import CheckpointWriter
from coatnet.training.checkpoint import (
    RUN_STATE,
    Checkpoint,
    CorruptCheckpoint,
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    open_checkpoint,
    step_name,
)
from coatnet.training.config import TrainingConfig
from coatnet.training.defaults import head_first_steps
from coatnet.training.distillation import Teacher
from coatnet.training.distributed.parallelize import build_network, choose_parallelism, parallelize
from coatnet.training.distributed.processes import (
    SINGLE_PROCESS,
    Processes,
    batch_share,
    share_cores,
    translate_errors,
)
from coatnet.training.distributed.shards import fill
from coatnet.training.duration import Duration
from coatnet.training.initialization import (
    HeadFirst,
    describe_init,
    init_batch_norm_statistics,
)
from coatnet.training.interruption import Interrupted, Interruption, Synchronization, exit_code
from coatnet.training.loggers import Loggers, open_loggers
from coatnet.training.optimizer import (
    balancing_weights,
    build_loss,
    build_optimizers,
    clip_gradients,
    gradient_norm,
    learning_rate_at,
    named_parameters,
    update_weights,
)
from coatnet.training.progress import TrainingProgress
from coatnet.training.run_folder import RunFolder
from coatnet.version import __version__

LOGS_PER_RUN = 400
MIN_EVALUATION_BATCH = 64  # images
INITIALIZATION_STEP = -1  # the step number whose random numbers the untrained weights are drawn from
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # of AdamW and Muon, for each parameter
NOT_WRITTEN = Path("not written")  # the folder of a trainer that only takes the time
BEST = "best"  # name of the checkpoint of the best evaluation


class Trainer:
    """Model, averaged weights, optimizer and data of one run, and its state.

    With several processes each has a trainer, and all call every method together.
    """

    def __init__(
        self,
        config: TrainingConfig,
        splits: Splits,
        folder: RunFolder,
        *,
        init: Bundle | None = None,
        processes: Processes = SINGLE_PROCESS,
        progress: TrainingProgress | None = None,
    ) -> None:
        """Raises UserError if the configuration, the bundle to start from and the processes do not fit together."""
        self.config, self.splits, self.folder, self.processes = config, splits, folder, processes
        self.images = splits  # the same, kept decoded or not
        self.progress = progress or TrainingProgress(Console(quiet=True))
        self.device = device_of(config, processes)
        self.on_cpu = self.device.type == "cpu"
        images = "arrays" if splits.training.in_memory else "decoded" if config.cache != "none" else "files"
        self.cores = share_cores(config.num_workers, processes, on_cpu=self.on_cpu, images=images)
        self.bf16 = config.precision == "bf16"
        if config.precision == "auto":  # one precision for all: FSDP2 gathers weights in it
            self.bf16 = all(processes.gather(multiplies_bf16(self.device)))
        self.share = batch_share(config.batch_size, config.mixing, processes)
        # All processes of a machine share it.
        if self.cores.workers and not splits.training.in_memory and may_start_processes():
            bytes_per_batch = bytes_of_batch(len(self.share.positions), config.preprocessing)
            require_shared_memory(processes.local_world_size * self.cores.workers, bytes_per_batch)

        self.parallelism = choose_parallelism(config, init, processes)
        seed_step(config.seed, INITIALIZATION_STEP)
        self.model = build_network(config, splits.training, init, self.parallelism).train()
        self.parallel, self.average = parallelize(
            self.model, config, processes, self.device, parallelism=self.parallelism, bf16=self.bf16
        )
        self.optimizers = build_optimizers(self.model, config.optimizer, bf16=self.bf16)
        self.parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.head_first = HeadFirst(self.model, head_first_steps(config, len(splits.training)))
        weights = None
        if config.balance == "weights":
            weights = balancing_weights(splits.training.labels, len(splits.classes)).to(self.device)
        self.loss = build_loss(config.loss, weights)
        self.teacher: Teacher | None = None
        if config.teacher:
            self.teacher = Teacher(
                load(config.teacher), config.distillation, splits.training, config.preprocessing, self.model
            )
            self.loss = self.teacher.loss(self.loss)
            self.optimizers += self.teacher.optimizers(config.optimizer.learning_rate)

        self.state, self.last_learning_rate = TrainState(), 0.0
        num_others = min(MAX_TRAINING_IMAGES, len(splits.training)) + (0 if splits.test is None else len(splits.test))
        num_images, num_held_out = len(splits.training), len(splits.validation)
        self.duration = Duration.of(config, num_images, num_held_out, num_others, processes.world_size)
        self.size = (0, 0)  # height and width of the batch to come; they never fall
        self.bad_images = BadImages(len(splits.training) + len(splits.validation), config.bad_image_budget)
        self.writer = CheckpointWriter(folder.checkpoints, processes, config.keep_checkpoints, config.keep_every_hours)
        self.loggers = Loggers({}, self.progress.say)
        self._init_description = describe_init(config, splits.training, init)
        self._saved_at = self._logged_at = time.monotonic()
        self._timed_from = 0  # of the steps since the last log line, those of an earlier process
        self._bad_images_to_warn = 1

    @property
    def precision(self) -> str:
        """`bf16` or `fp32`, whichever is computed in."""
        return "bf16" if self.bf16 else "fp32"

    def describe(self) -> str:
        """Model, origin of its weights, size and precision in half a line."""
        size, learning = (sum(p.numel() for p in each) for each in (self.model.parameters(), self.parameters.values()))
        words = [f"{self.config.model}{self._init_description}", f"{size / 1e6:.2f} M parameters"]
        if learning < size:
            words.append(f"{(size - learning) / 1e6:.2f} M of them frozen")
        if self.head_first.steps:
            words.append(f"for {self.head_first.steps:,} steps only the classifier learns")
        if self.teacher is not None:
            words.append(f"following {place_name(self.config.teacher)} ({self.teacher.model.variant.name})")
        words.append(f"{self.precision} on {self.device.type}")
        if self.processes.is_distributed:
            words.append(f"{self.processes.world_size} processes ({self.parallelism})")
        return ", ".join(words)

    # The loop

    def run(self) -> None:
        """Train from the present state to the end of the run, evaluating and saving on the way, and save at the end.

        Raises:
            Interrupted: a process received a stop signal; everything is saved.
            NotFinite: a loss was not finite; nothing is saved, and the last checkpoint is intact.
        """
        config, state, duration = self.config, self.state, self.duration
        with self.progress, Interruption() as interruption, closing(self.batches()) as batches:
            sync = Synchronization(self.processes, interruption)
            duration.update(state.step, state.seconds)  # the size of the images follows from it
            started = time.monotonic()
            batch = next(batches, None)  # worker processes start
            state.seconds += self.processes.broadcast(time.monotonic() - started)
            duration.update(state.step, state.seconds)
            if state.step > state.measured and duration.evaluation_due(state.step, state.seconds):
                self.evaluate(sync)  # a stop signal interrupted it before, unless its interval is chosen by times
                duration.update(state.step, state.seconds)
            while state.step < duration.total_steps and not self.out_of_patience and sync.stop is None:
                started, cost = time.monotonic(), math.prod(self.size) / math.prod(config.preprocessing.size)
                assert batch is not None
                self.step_within_budget(*batch)
                batch = next(batches, None)  # an error in it is raised before the processes wait for each other
                save_due = time.monotonic() - self._saved_at >= 60 * config.checkpoint_every_minutes
                seconds = time.monotonic() - started
                seconds = sync.after_step(seconds, save_due=save_due, written=self.writer.written)
                state.seconds += seconds
                duration.add_step(seconds, cost)
                self.log_step()
                self.warn_of_bad_images()
                if duration.evaluation_due(state.step, state.seconds):
                    self.evaluate(sync)
                if sync.stop is None:
                    self.save_if_due(sync)
                duration.update(state.step, state.seconds)
            self.save()
        if sync.stop is not None:
            self.progress.say(f"stopped by {sync.stop.name} and saved; the same command resumes")
            raise Interrupted(exit_code(sync.stop))

    def batches(self) -> Generator[tuple[Tensor, ...], None, None]:
        """This process's share of the batches that are still to come: images (B, C, R, R), labels (B,) or (B, K), and
        the place of each image in the dataset (B,).

        The next one is asked for after the step on the one before: R follows `progressive_resizing`.
        """
        config = self.config
        while self.state.step < self.duration.recipe_steps:
            self.size = self.next_size()
            batches = training_batches(
                self.images.training,
                preprocessing=replace(config.preprocessing, resolution=self.size),
                augmentation=config.augmentation,
                batch_size=config.batch_size,
                seed=config.seed,
                first_step=self.state.step,
                num_steps=self.duration.recipe_steps - self.state.step,
                num_workers=self.cores.workers,
                balanced=config.balance == "sampler",
                bad_images=self.bad_images,
                batch_indices=self.share.positions,
                pin_memory=self.device.type == "cuda",
                with_indices=True,
            )
            with closing(batches):
                for batch in batches:
                    yield batch
                    if self.next_size() != self.size:
                        break

    @property
    def evaluation_workers(self) -> int | None:
        """Processes that load images for an evaluation on the way: none, where they would take longer to start."""
        decoded = self.config.cache != "none" and self.on_cpu
        if self.config.num_workers == "auto" and (decoded or workers_for(self.splits.validation, None) == 0):
            return 0
        return self.cores.workers

    def reading_seconds(self) -> float:
        """Seconds to read, decode and resize an image, found with some of them; 0 if evaluations on the way read files,
        too."""
        images = self.splits.validation
        if self.images is self.splits or not len(images):
            return 0.0
        return self.processes.broadcast(seconds_to_read(images, EvaluationTransform(self.config.preprocessing)))

    def next_size(self) -> tuple[int, int]:
        """Height and width of the images of the step to come, in pixels."""
        resizing, progress = self.config.progressive_resizing, self.duration.progress(self.state.step)
        multiple = self.model.variant.total_stride
        height, width = (
            max(now, resizing.resolution_at(progress, side, multiple))
            for now, side in zip(self.size, self.config.preprocessing.size, strict=True)
        )
        return height, width

    def compute_teacher_logits(self) -> None:
        """For fixed views, get the teacher's logits of all training images, from the run folder if they are there."""
        if self.teacher is None or self.config.distillation.views == "same":
            return
        images = str(self.splits.content["training"]["sha256"])
        try:
            self.teacher.compute_logits(
                self.splits.training,
                self.processes,
                self.folder.path / f"teacher-{self.teacher.key[:16]}-{images[:16]}.npy",
                bf16=self.bf16,
                bad_images=self.bad_images,
                num_workers=share_cores(self.config.num_workers, self.processes, on_cpu=self.on_cpu).workers,
                quiet=self.progress.console.quiet,
            )
        except OSError as error:
            if self.teacher.logits is None:  # an image, not the file
                raise
            self.progress.say(
                f"warning: the teacher's outputs cannot be kept ({error}); a resumed run computes them anew"
            )

    def teacher_seconds(self, images: Tensor, reading_seconds: float) -> float:
        """Seconds for the teacher's logits of an image for fixed views, found with images (B, C, R, R), each of which
        takes `reading_seconds` to read; 0 without."""
        if self.teacher is None or self.config.distillation.views == "same":
            return 0.0
        for _ in range(2):  # the first call loads libraries
            started = time.monotonic()
            with self.autocast():
                self.teacher(images.to(self.device), self.config.micro_batch_size).cpu()  # which waits for a GPU
            seconds = time.monotonic() - started
        return seconds / len(images) + reading_seconds

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return round(self.state.step * self.config.batch_size / len(self.splits.training), 4)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the step to come."""
        peak, schedule = self.config.optimizer.learning_rate, self.config.schedule
        return learning_rate_at(self.state.step, self.duration.total_steps, peak, schedule)

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        return 0 < self.config.patience <= self.state.evaluations_since_best

    # One step

    def step(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> tuple[float, float]:
        """Take one optimizer step on this process's share of a batch: images (B, C, R, R), labels (B,) or (B, K).

        All random numbers of a step follow from its number.

        Args:
            indices: the place of each image in the dataset, (B,), for a teacher whose logits are stored.

        Returns:
            The loss per image and the norm of the gradients before clipping, both of the whole batch.

        Raises:
            NotFinite: on all processes, before any weight is updated.
            UserError: the memory is too small for the images of a pass.
        """
        config, state = self.config, self.state
        self.head_first.prepare(state.step)
        self.parallel.prepare()
        buffers_before = [buffer.clone() for buffer in self.model.buffers()] if config.non_finite_budget else []
        parameters = list(self.parameters.values())
        images_per_pass = min(config.micro_batch_size, len(images) - self.share.num_extra)
        memory = explain_out_of_memory(state.step, images_per_pass, config.preprocessing.shown_size)
        with translate_errors(), memory, explain_compiler("set compile to false"):
            # Gradients are averaged over processes, so each divides by the mean number of images of a process.
            num_images = config.batch_size / self.processes.world_size if self.processes.is_distributed else len(images)
            images, targets = self.prepare_batch(images, labels, indices)
            micro_batches = list(zip(images.split(images_per_pass), targets.split(images_per_pass), strict=True))
            loss = torch.zeros((), device=self.device)
            for number, (micro_images, micro_targets) in enumerate(micro_batches, start=1):
                with self.parallel.accumulating() if number < len(micro_batches) else nullcontext():
                    with self.autocast():
                        logits = self.parallel(micro_images)  # (B', K)
                    micro_loss = self.loss(logits, micro_targets) / num_images
                    micro_loss.backward()
                loss += micro_loss.detach()
            if self.teacher is not None:
                self.teacher.average_gradient(self.processes)
            loss, norm = self.parallel.reduce(loss, gradient_norm(parameters))
            loss_value, norm_value = torch.stack((loss, norm)).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            for buffer, before in zip(self.model.buffers(), buffers_before, strict=False):  # none without a budget
                buffer.copy_(before)  # BatchNorm has counted the batch already
            raise NotFinite(
                f"step {state.step}: loss {loss_value:.4g}, gradient norm {norm_value:.4g}; nothing was updated. "
                "Give a lower optimizer.learning_rate or precision fp32, in a new folder if this one has checkpoints; "
                "or resume with non_finite_budget N, which skips up to N such steps"
            )
        clip_gradients(parameters, norm, config.optimizer.grad_clip_norm)
        self.last_learning_rate = self.learning_rate
        update_weights(self.optimizers, self.last_learning_rate)
        self.average.update(state.step)
        state.step += 1
        state.loss_sum += loss_value
        state.norm_sum += norm_value
        state.since_log += 1
        return loss_value, norm_value

    def prepare_batch(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Move a batch to the device, seed the step and blend the images; images (B, C, R, R) and targets (B, K), with
        the columns of the teacher if there is one."""
        config, step, extra = self.config, self.state.step, self.share.num_extra
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        seed_step(config.seed, step, self.processes.rank)  # for stochastic depth in the next pass
        if step == self.state.left_out and not config.init:  # none has counted yet
            with self.autocast() if self.processes.is_distributed else nullcontext():  # shards may gather bf16 weights
                init_batch_norm_statistics(self.model, images[extra:][: config.micro_batch_size])
            seed_step(config.seed, step, self.processes.rank)
        mix_seed, num_classes = step_seed(config.seed, step), len(self.splits.classes)
        blended, targets = mix(images, labels, num_classes=num_classes, mixing=config.mixing, seed=mix_seed)
        if self.teacher is None:
            return blended[extra:], targets[extra:]
        if config.distillation.views == "same":
            with self.autocast():
                soft_targets = self.teacher(blended, config.micro_batch_size)
        else:  # probabilities are blended like labels
            assert indices is not None
            unsmoothed = replace(config.mixing, label_smoothing=0.0)
            stored = self.teacher.stored(indices)
            _, soft_targets = mix(images, stored, num_classes=num_classes, mixing=unsmoothed, seed=mix_seed)
            # The teacher could not read some images.
            soft_targets = torch.where(soft_targets.isfinite(), soft_targets, targets)
        return blended[extra:], torch.cat([targets, soft_targets], dim=1)[extra:]

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the run: weights in fp32, matrix products in bf16 if so configured."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=True)

    def step_within_budget(self, *batch: Tensor) -> None:
        """As `step`, but skip the update if the loss is not finite, up to `non_finite_budget` times in the run.

        Raises NotFinite beyond that. The images of such a batch are in the log.
        """
        config, state = self.config, self.state
        try:
            self.step(*batch)
        except NotFinite as error:
            order = sampler_of(self.splits.training, config.seed, config.balance == "sampler")
            first = state.step * config.batch_size
            indices, _ = order.sample(np.arange(first, first + config.batch_size))
            if self.processes.is_main:
                self.folder.log({"step": state.step + 1, "not_finite": True, "indices": indices.tolist()})
            self.skip_step(self.processes.error_on_main(error))
            self.progress.say(f"warning: {error}; the step is skipped")

    def step_or_skip(self, *batch: Tensor) -> None:
        """As `step_within_budget`, for steps that are tried: nothing is logged."""
        try:
            self.step(*batch)
        except NotFinite as error:
            self.skip_step(error)

    def skip_step(self, error: BaseException) -> None:
        """Count a step whose loss was not finite as one of the `non_finite_budget`; raise the error beyond that."""
        if self.state.left_out >= self.config.non_finite_budget:
            raise error from None
        self.state.step += 1
        self.state.left_out += 1

    def warn_of_bad_images(self) -> None:
        """Say that images cannot be used, at the first one and whenever their number is ten times as large."""
        records = self.bad_images.records
        if len(records) >= self._bad_images_to_warn:
            self._bad_images_to_warn = 10 * len(records)
            name, reason = list(records.items())[-1]
            self.progress.say(
                f"warning: {len(records):,} of {self.bad_images.num_images:,} images cannot be used so far, "
                f"such as {name} ({reason}); others take their place, and the report names them"
            )

    # Evaluation

    def evaluate(self, sync: Synchronization) -> None:
        """Evaluate the averaged weights on the validation images; with patience, save them if they are the best so far.

        A stop signal to any process interrupts the evaluation. Outputs that are not finite are a warning.
        """
        state, started = self.state, time.monotonic()
        figures: dict[str, float] = {}
        try:
            metrics = self.validation_metrics(sync)
            if metrics is None:
                return
            figures = metrics.compute()
        except NotFinite as error:
            self.progress.say(f"warning: {error}; training goes on")
        seconds = self.processes.broadcast(time.monotonic() - started)
        score = figures.get(main_figure(self.splits.multilabel), -1.0)
        improved, best_before = score > state.best, state.best
        state.seconds += seconds
        state.best = max(score, state.best)
        grows = self.next_size() != tuple(self.config.preprocessing.size)  # the network has not seen full size yet
        state.evaluations_since_best = 0 if improved or grows else state.evaluations_since_best + 1
        state.measured = state.step
        self.duration.add_evaluation(state.seconds, seconds)
        self.share_bad_images()
        self.log({**figures, "bad_images": len(self.bad_images.records)})
        if figures:
            self.progress.evaluated(state.step, self.epoch, figures)
        if improved and self.config.patience:
            started = time.monotonic()
            self.writer.finish_or_warn(self.progress.say)
            try:
                self.start_saving(BEST)
                self.writer.finish()
            except UserError as error:  # such as a full disk
                self.progress.say(f"warning: {error}; training goes on")
                state.best = best_before  # of the weights that are saved
            saving = self.processes.broadcast(time.monotonic() - started)
            state.seconds += saving
            seconds += saving
        elif improved and self.processes.is_main:  # weights from when the run had a patience are not the best any more
            shutil.rmtree(self.folder.checkpoints / BEST, ignore_errors=True)
        self._logged_at += seconds  # in which no step was taken

    def validation_metrics(self, sync: Synchronization) -> Metrics | None:
        """Metrics over all validation images, which the processes share; None if a stop signal came before the end.

        Raises:
            NotFinite: on all processes, an output of the model is NaN or infinite.
        """
        processes, dataset = self.processes, self.images.validation
        metrics, first_images = Metrics(len(dataset.classes), dataset.multilabel), []
        batches = infer(
            self.average.whole(),
            dataset,
            preprocessing=self.config.preprocessing,
            batch_size=max(
                min(self.config.batch_size // processes.world_size, self.config.micro_batch_size),
                min(MIN_EVALUATION_BATCH, 4 * self.config.micro_batch_size),  # as at the end of the run
            ),
            num_workers=self.evaluation_workers,
            bad_images=self.bad_images,
            bf16=self.bf16,
            first=processes.rank,
            every=processes.world_size,
        )
        more, stopped, broken = True, False, None
        with closing(batches):
            while more and not stopped:
                batch = next(batches, None)
                if batch is not None:
                    try:
                        metrics.update(batch.outputs, batch.labels)
                    except NotFinite as error:
                        broken = error
                    first_images.append(int(batch.indices[0]))
                more = processes.sum([batch is not None])[0] > 0
                stopped = sync.stop_requested()
        if more:
            return None
        for error in processes.gather(broken and str(broken)):
            if error:
                raise NotFinite(error)
        gathered = processes.gather(list(zip(first_images, metrics.batches, strict=True)))
        # In the order of the dataset, so that not even the last bit of a sum depends on the processes.
        in_order = sorted((each for of_process in gathered for each in of_process), key=lambda each: each[0])
        metrics.batches = [batch for _, batch in in_order]
        return metrics

    # Checkpoints

    def save(self) -> None:
        """Publish a checkpoint of this step, and wait for it. Raises UserError if it cannot be written."""
        self.writer.finish_or_warn(self.progress.say)
        if any(self.processes.gather(self.writer.last != (self.checkpoint_name, self.checkpoint_state))):
            self.start_saving(self.checkpoint_name)
            self.writer.finish()

    def save_if_due(self, sync: Synchronization) -> None:
        """Publish the checkpoint that has been written meanwhile, and start another if it is time.

        A failure is a warning, and training goes on.
        """
        if sync.written:
            self.writer.finish_or_warn(self.progress.say)
        if sync.save_due and not self.writer.busy:
            self._saved_at = time.monotonic()
            try:
                self.start_saving(self.checkpoint_name)
            except UserError as error:
                self.progress.say(f"warning: {error}; training goes on")

    def start_saving(self, name: str) -> None:
        """Copy all that a step changes, and start to write it as the checkpoint `name`."""
        self.share_bad_images()
        self.writer.start(name, self.tensors(), self.checkpoint_state)

    @property
    def checkpoint_name(self) -> str:
        """Name of a checkpoint of this step."""
        return step_name(self.state.step)

    @property
    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        teacher = {"teacher": self.teacher.key} if self.teacher is not None else {}
        bad_images = dict(self.bad_images.records)
        return {"position": asdict(self.state), "bad_images": bad_images, "precision": self.precision, **teacher}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a step changes, by name: model, average and optimizer."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average.decay > 0:
            tensors |= {f"average.{name}": value for name, value in self.average.tensors().items()}
        for optimizer in self.optimizers:
            for name, parameter in named_parameters(optimizer):
                tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        if self.teacher is not None:
            tensors |= self.teacher.tensors()
        return {name: value.detach() for name, value in tensors.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Read back what `tensors` gave."""
        stored = checkpoint.tensors
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for name, target in self.tensors().items():
            fill(target, partial(stored.read, name))
        for optimizer in self.optimizers:
            for name, parameter in named_parameters(optimizer):
                # A parameter that has not learned yet has no state.
                for key in (key for key in OPTIMIZER_STATE if f"optimizer.{key}.{name}" in stored):
                    if key == "step":
                        value = torch.zeros((), device=self.device)
                    else:  # in the memory order of the parameter: the fused step walks both side by side
                        value = torch.empty_like(parameter, requires_grad=False)
                    fill(value, partial(stored.read, f"optimizer.{key}.{name}"))
                    optimizer.state[parameter][key] = value

    def resume(self, started: float) -> None:
        """Restore the last whole checkpoint of the run folder, if there is one, and open the loggers.

        Args:
            started: when this process took up the run, on the monotonic clock.
        """
        checkpoint = None
        if self.processes.is_main:
            checkpoint = latest_checkpoint(
                self.folder.checkpoints,
                lambda text: self.progress.say(f"warning: {text}"),
                state_has=RUN_STATE,
            )
        path = self.processes.broadcast(checkpoint.path if checkpoint else None)
        if path is not None:
            checkpoint = checkpoint or open_checkpoint(path)
            if self.teacher is not None:
                self.teacher.check_projection(checkpoint.tensors)
            self.restore(checkpoint)
            position = checkpoint.state["position"]
            self.state = TrainState(
                **{each.name: position[each.name] for each in fields(TrainState) if each.name in position}
            )
            self._logged_at, self._timed_from = time.monotonic(), self.state.since_log
            if self.config.patience and not (self.folder.checkpoints / BEST).exists():
                self.state.best, self.state.evaluations_since_best = -1.0, 0  # patience begins here
            for name, reason in checkpoint.state["bad_images"].items():
                self.bad_images.add(name.removeprefix(f"{self.config.data}/"), reason)  # whole in earlier releases
            if (before := checkpoint.state.get("precision", self.precision)) != self.precision:
                self.progress.say(
                    f"warning: precision auto is {self.precision} here, and was {before} where the run was stopped; "
                    "the run goes on with it, unlike one that never stopped"
                )
            if self.teacher is not None and checkpoint.state.get("teacher") != self.teacher.key:
                self.progress.say(
                    f"warning: the teacher {place_name(self.config.teacher)}, or the release of coatnet or torch, is "
                    "another than when the run began; the run goes on with it, unlike one that never stopped"
                )
        self.state.seconds += time.monotonic() - started
        self.state = self.processes.broadcast(self.state)  # or runs with a limit in minutes would end at other steps
        if path is not None:
            self.writer.last = (path.name, self.checkpoint_state)
            self.duration.resume(self.state.step, self.state.seconds)
            self.progress.say(f"resuming {self.folder.path} at step {self.state.step:,}")
        if self.processes.is_main:
            self.folder.rewind(self.state.step)
            self.loggers = open_loggers(self.config.loggers, self.folder.path, self.state.step, self.progress.say)
            self.loggers.log_config(without_places({"recipe": self.config.to_dict()})["recipe"])

    def restore_best(self) -> None:
        """Take the weights of the best evaluation."""
        try:
            self.restore(load_checkpoint(self.folder.checkpoints / BEST))
        except CorruptCheckpoint as reason:
            self.progress.say(f"warning: the best weights are lost ({reason}); the last ones are taken")

    def share_bad_images(self) -> None:
        """Take in the unreadable images of all processes."""
        for records in self.processes.gather(dict(self.bad_images.records)):
            for image, reason in records.items():
                self.bad_images.add(image, reason)

    # Logs

    def log_step(self) -> None:
        """Show the step, and log means over the steps since the last log line at every interval."""
        state, duration = self.state, self.duration
        self.progress.moved(state.step, duration.total_steps, duration.seconds_left(state.step, state.seconds))
        every = max(1, duration.total_steps // LOGS_PER_RUN)
        if not state.since_log or (state.step % every and state.step < duration.total_steps):
            return
        now = time.monotonic()
        timed = state.since_log - self._timed_from
        speed = timed * self.config.batch_size / max(now - self._logged_at, 1e-9)
        values = {
            "loss": state.loss_sum / state.since_log,
            "learning_rate": self.last_learning_rate,
            "images_per_second": round(speed, 1),
        }
        self.log({**values, "grad_norm": state.norm_sum / state.since_log, "seconds": round(state.seconds, 3)})
        self.progress.logged(epoch=self.epoch, **values)
        state.loss_sum, state.norm_sum, state.since_log = 0.0, 0.0, 0
        self._logged_at, self._timed_from = now, 0

    def log(self, values: Mapping[str, float]) -> None:
        """Write figures of this step to the run's log and the loggers."""
        if self.processes.is_main:
            self.folder.log({"step": self.state.step, "epoch": self.epoch, **values})
            self.loggers.log_metrics(self.state.step, {"epoch": self.epoch, **values})

    # The end

    def bundle(self) -> Bundle:
        """The averaged weights as a finished model; all processes must call it together."""
        dataset, size = self.splits.training, self.processes.world_size
        record = {
            "recipe": self.config.to_dict(),
            "training": {
                "epochs": round(self.epoch, 3),
                "steps": self.state.step,
                "minutes": round(self.state.seconds / 60, 2),
                "images": len(dataset),
                "hardware": f"{size} x " * (size > 1) + describe_device(self.device),
                "precision": self.precision,
                "software": f"coatnet {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
            },
        }
        model = self.average.whole()
        if model is self.model:  # no average: a network of its own, in evaluation mode, whose blocks are not compiled
            model = create_model(**self.model.config())
            model.load_state_dict(self.model.state_dict())
            model = model.to(self.device).requires_grad_(False).eval()
        return Bundle(model, dataset.classes, self.config.preprocessing, dataset.multilabel, record)


def device_of(config: TrainingConfig, processes: Processes) -> torch.device:
    """The device of this process. Raises UserError if it is not there, or is one GPU for several processes."""
    device = choose_device(config.device)
    if device.index is not None:
        if processes.is_distributed:
            raise UserError(f"device {config.device} is one GPU, and each process takes its own: give device cuda")
        torch.cuda.set_device(device)
    return device


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for the random numbers of one step on one process, the same after a resume."""
    return int(hash_words(seed, step, *([rank] if rank else []))[0] >> 1)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch for a step: stochastic depth draws from it (`torch.manual_seed` takes 78 µs, this 1)."""
    torch.default_generator.manual_seed(step_seed(seed, step, rank))
    if torch.cuda.is_available():
        torch.cuda.manual_seed(step_seed(seed, step, rank))


@contextmanager
def explain_out_of_memory(step: int, images_per_pass: int, sides: object) -> Iterator[None]:
    """Raise a UserError that says what would need less memory, where the memory is exhausted."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_memory_shortage(error):
            raise
        raise UserError(
            f"step {step}: out of memory with {images_per_pass} images of {sides} pixels at once. Give "
            f"micro_batch_size {max(1, images_per_pass // 2)}, or a smaller resolution, in another folder if this one "
            "has checkpoints; activation_checkpointing transformer (or all) may be given in this one"
        ) from error


@contextmanager
def deterministic_on_cpu(device: str) -> Iterator[None]:
    """On a CPU, use algorithms of torch whose sums do not depend on the timing of threads."""
    before = torch.are_deterministic_algorithms_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory  # pyrefly: ignore[missing-attribute]
    if choose_device(device).type == "cpu":
        torch.use_deterministic_algorithms(True)
        # It costs time, and nothing here reads such memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill_before  # pyrefly: ignore[missing-attribute]
