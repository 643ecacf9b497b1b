"""What learns: a network, its averaged weights and its optimizer, moved together one step at a time."""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.mixing import mix
from coatnet.data.sampler import hash_words
from coatnet.errors import UserError
from coatnet.system.hardware import best_device, multiplies_bf16
from coatnet.training.checkpoint import Checkpoint
from coatnet.training.config import TrainingConfig
from coatnet.training.defaults import head_first_steps
from coatnet.training.distributed.batch_split import share_of
from coatnet.training.distributed.parallelize import build_network, parallelism_of, scale
from coatnet.training.distributed.processes import SINGLE_PROCESS, Processes, translate_errors
from coatnet.training.distributed.shards import fill
from coatnet.training.initialization import HeadFirst, describe_start, start_statistics
from coatnet.training.losses import balancing_weights, build_loss
from coatnet.training.oom import shortage_explained
from coatnet.training.optimizer import build_optimizer, gradient_norm, take_step

INITIALISATION = -1  # the step whose randomness the untrained weights come from


class NotFinite(UserError):
    """The loss or a gradient is NaN or infinite; the weights are those of the step before."""


class Learner:
    """Model, averaged weights and optimizer; all randomness of a step follows from its number."""

    def __init__(
        self, recipe: TrainingConfig, dataset: Dataset, init: Bundle | None, processes: Processes = SINGLE_PROCESS
    ) -> None:
        """Raises UserError if recipe, bundle and processes do not fit together."""
        self.recipe, self.num_classes, self.processes = recipe, len(dataset.classes), processes
        self.device, self.bf16 = best_device(), runs_bf16(recipe.precision, best_device())
        self.share = share_of(recipe.batch_size, recipe.mixing, processes)
        self.parallelism = parallelism_of(recipe, init, processes)
        seed_step(recipe.seed, INITIALISATION)
        self.model = build_network(recipe, dataset, init, self.parallelism).train()
        self.parallel, self.average = scale(
            self.model, recipe, processes, self.device, parallelism=self.parallelism, bf16=self.bf16
        )
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self._parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self._head_first = HeadFirst(self.model, head_first_steps(recipe, len(dataset)))
        weights = balancing_weights(dataset.labels, self.num_classes) if recipe.balance == "weights" else None
        self._loss = build_loss(recipe.loss, weights if weights is None else weights.to(self.device))
        self._start = describe_start(recipe, dataset, init)
        self.last_learning_rate = 0.0

    def describe(self) -> str:
        """Model, where its weights come from, size and precision in half a line."""
        size, learning = (sum(p.numel() for p in each) for each in (self.model.parameters(), self._parameters.values()))
        told = [f"{self.recipe.model}{self._start}", f"{size / 1e6:.2f} M parameters"]
        if learning < size:
            told.append(f"{(size - learning) / 1e6:.2f} M of them frozen")
        if self._head_first.steps:
            told.append(f"for {self._head_first.steps:,} steps only the classifier learns")
        told.append(f"{'bf16' if self.bf16 else 'fp32'} on {self.device.type}")
        if not self.processes.alone:
            told.append(f"{self.processes.world_size} processes ({self.parallelism})")
        return ", ".join(told)

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the recipe: weights in fp32, and matrix products in bf16 where it says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=True)

    def step(self, images: Tensor, labels: Tensor, *, step: int, learning_rate: float) -> tuple[float, float]:
        """Optimizer step `step` (0 is the first) on this process's share of a batch: loss an image, and norm of the
        gradients, both of the whole batch.

        Raises NotFinite, on all processes and before anything is updated; UserError if the memory is too small.
        """
        self._head_first.enter(step)
        self.parallel.prepare()
        buffers = list(self.model.buffers()) if self.recipe.non_finite_budget else []
        before = [buffer.clone() for buffer in buffers]
        at_once = min(self.recipe.micro_batch_size, len(self.share.places) - self.share.num_extra)
        with translate_errors(), shortage_explained(step, at_once, self.recipe.resolution):
            total = self._accumulate(images, labels, step)
            parameters = list(self._parameters.values())
            total, norm = self.parallel.agree(total, gradient_norm(parameters))
            loss_value, norm_value = torch.stack((total, norm)).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, value in zip(buffers, before, strict=True):  # BatchNorm has counted the batch already
                buffer.copy_(value)
            raise NotFinite(
                f"step {step}: loss {loss_value:.4g}, gradient norm {norm_value:.4g}; nothing was updated. "
                "Lower optimizer.learning_rate, or use precision fp32"
            )
        self.last_learning_rate = learning_rate
        take_step(self.optimizer, parameters, learning_rate, norm, self.recipe.optimizer.grad_clip_norm)
        self.average.update(step)
        return loss_value, norm_value

    def _accumulate(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Add up the gradients of a batch, part by part; this process's part of its mean loss."""
        recipe, (_, num_extra), alone = self.recipe, self.share, self.processes.alone
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        # What is averaged over processes is divided by their mean share.
        num_images = len(images) if alone else recipe.batch_size / self.processes.world_size
        micro = recipe.micro_batch_size
        if step == 0 and not recipe.init:
            with nullcontext() if alone else self.autocast():  # the weights of shards may come in bf16
                start_statistics(self.model, images[num_extra:][:micro])
        seed_step(recipe.seed, step, self.processes.rank)
        seed = step_seed(recipe.seed, step)
        images, targets = mix(images, labels, num_classes=self.num_classes, mixing=recipe.mixing, seed=seed)
        image_parts, target_parts = images[num_extra:].split(micro), targets[num_extra:].split(micro)
        total = torch.zeros((), device=self.device)
        for number, (part, part_targets) in enumerate(zip(image_parts, target_parts, strict=True), start=1):
            with nullcontext() if number == len(image_parts) else self.parallel.accumulating():
                with self.autocast():
                    logits = self.parallel(part)
                loss = self._loss(logits, part_targets) / num_images
                loss.backward()
            total += loss.detach()
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name: model, average and optimizer."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average.decay > 0:
            tensors |= {f"average.{name}": value for name, value in self.average.tensors().items()}
        for name, parameter in self._parameters.items():
            tensors |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        return {name: value.detach() for name, value in tensors.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to what `tensors` gave."""
        stored = checkpoint.tensors
        self.optimizer.state.clear()
        for name, target in self.tensors().items():
            fill(target, partial(stored.read, name))
        for name, parameter in self._parameters.items():
            # in the memory order of the parameter: the fused step walks both side by side
            moments = {key: torch.empty_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            state = {"step": torch.zeros((), device=self.device), **moments}
            # a parameter that has not learned yet has no state
            for key in [key for key in state if f"optimizer.{key}.{name}" in stored]:
                fill(state[key], partial(stored.read, f"optimizer.{key}.{name}"))
                self.optimizer.state[parameter][key] = state[key]

    def bundle(self, dataset: Dataset, record: dict) -> Bundle:
        """The averaged weights as a finished model; all processes must ask for it."""
        recipe = self.recipe
        return Bundle(self.average.whole(), dataset.classes, recipe.preprocessing, dataset.multilabel, record)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for the randomness of one step on one process, the same after a resume."""
    return int(hash_words(seed, step, *([rank] if rank else []))[0] >> 1)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch for a step: stochastic depth draws from here (`torch.manual_seed` takes 78 µs, this 1)."""
    torch.default_generator.manual_seed(step_seed(seed, step, rank))
    if torch.cuda.is_available():
        torch.cuda.manual_seed(step_seed(seed, step, rank))


def runs_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16; "auto" is yes where the hardware multiplies it."""
    return multiplies_bf16(device) if precision == "auto" else precision == "bf16"
