"""What learns: a network, its averaged weights and its optimizer, moved together one step at a time."""

import math
import shutil
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.mixing import mix
from coatnet.data.order import hash_words
from coatnet.errors import UserError
from coatnet.runtime import best_device
from coatnet.training.checkpoint import Checkpoint
from coatnet.training.fitting import head_first_steps
from coatnet.training.freezing import HeadFirst
from coatnet.training.losses import balancing_weights, build_loss
from coatnet.training.optimization import WeightAverage, build_optimizer, gradient_norm, take_step
from coatnet.training.recipe import Recipe, parts
from coatnet.training.start import build_model, describe_start, start_statistics

INITIALISATION = -1  # the step whose randomness the untrained weights come from


class NotFinite(UserError):
    """The loss or a gradient is NaN or infinite; the weights are those of the step before."""


class Learner:
    """Model, averaged weights and optimizer; all randomness of a step follows from its number."""

    def __init__(self, recipe: Recipe, dataset: Dataset, init: Bundle | None) -> None:
        self.recipe, self.num_classes = recipe, len(dataset.classes)
        self.device = best_device()
        seed_step(recipe.seed, INITIALISATION)
        self.model = build_model(recipe, dataset, init).to(self.device).train()
        self.average = WeightAverage(self.model, recipe.ema_decay or 0.0)
        self.optimizer = build_optimizer(self.model, parts(recipe).optimizer)
        self._parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self._head_first = HeadFirst(self.model, head_first_steps(recipe, len(dataset)))
        weights = balancing_weights(dataset.labels, self.num_classes) if recipe.balance == "weights" else None
        self._loss = build_loss(recipe.loss or "softmax", weights if weights is None else weights.to(self.device))
        self._forward = compiled(self.model, self.device) if recipe.compile else self.model
        self._bf16 = runs_bf16(recipe.precision, self.device)
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
        told.append(f"{'bf16' if self._bf16 else 'fp32'} on {self.device.type}")
        return ", ".join(told)

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the recipe: weights in fp32, and matrix products in bf16 where it says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=True)

    def step(self, images: Tensor, labels: Tensor, *, step: int, learning_rate: float) -> tuple[float, float]:
        """Optimizer step `step` (0 is the first) on one batch: loss a picture, and norm of the gradients.

        Raises NotFinite before anything is updated.
        """
        recipe, whole, (batch_size, *_) = self.recipe, parts(self.recipe), images.shape
        seed = step_seed(recipe.seed, step)
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        micro = recipe.micro_batch_size or batch_size
        self._head_first.enter(step)
        if step == 0 and recipe.init is None:
            start_statistics(self.model, images[:micro])
        seed_step(recipe.seed, step)
        images, targets = mix(images, labels, num_classes=self.num_classes, mixing=whole.mixing, seed=seed)
        total = torch.zeros((), device=self.device)
        for part, part_targets in zip(images.split(micro), targets.split(micro), strict=True):
            with self.autocast():
                logits = self._forward(part)
            loss = self._loss(logits, part_targets) / batch_size
            loss.backward()
            total += loss.detach()
        parameters = list(self._parameters.values())
        norm = gradient_norm(parameters)
        loss_value, norm_value = torch.stack((total, norm)).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self.optimizer.zero_grad(set_to_none=True)
            raise NotFinite(
                f"step {step}: loss {loss_value:.4g}, gradient norm {norm_value:.4g}; nothing was updated. "
                "Lower optimizer.learning_rate, or use precision fp32"
            )
        self.last_learning_rate = learning_rate
        take_step(self.optimizer, parameters, learning_rate, norm, whole.optimizer.grad_clip_norm)
        self.average.update(step)
        return loss_value, norm_value

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name: model, average and optimizer."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average.decay > 0:
            tensors |= {f"average.{name}": value for name, value in self.average.model.state_dict().items()}
        for name, parameter in self._parameters.items():
            tensors |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        return {name: value.detach() for name, value in tensors.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to what `tensors` gave."""
        self.model.load_state_dict(_below("model.", checkpoint))
        if self.average.decay > 0:
            self.average.model.load_state_dict(_below("average.", checkpoint))
        for name, parameter in self._parameters.items():
            saved = {
                key: checkpoint.tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")
            }
            self.optimizer.state[parameter] = {
                # in the memory order of the parameter: the fused step walks both side by side
                key: value.clone() if key == "step" else torch.empty_like(parameter).copy_(value)
                for key, value in saved.items()
                if value is not None
            }

    def bundle(self, dataset: Dataset, record: dict) -> Bundle:
        """The averaged weights as a finished model."""
        recipe = self.recipe
        return Bundle(self.average.model, dataset.classes, parts(recipe).preprocessing, dataset.multilabel, record)


def step_seed(seed: int, step: int) -> int:
    """A seed for the randomness of one step, the same after a resume."""
    return int(hash_words(seed, step)[0] >> 1)


def seed_step(seed: int, step: int) -> None:
    """Seed torch for a step: stochastic depth draws from here (`torch.manual_seed` takes 78 µs, this 1)."""
    torch.default_generator.manual_seed(step_seed(seed, step))
    if torch.cuda.is_available():
        torch.cuda.manual_seed(step_seed(seed, step))


def runs_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16; "auto" is yes where the hardware multiplies it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """The model through torch.compile. Raises UserError where there is no compiler to do it with."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise UserError("compile needs a C++ compiler (g++) on the PATH: install one, or set compile to false")
    return torch.compile(model)  # type: ignore[return-value]


def _below(prefix: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in checkpoint.tensors.items() if name.startswith(prefix)}
