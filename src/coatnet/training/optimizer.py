"""What a step minimizes and updates: losses, learning rate, optimizers with the paper's decay rules, averages.

Shapes: B images, K classes.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatnet.data.datasets import count_labels
from coatnet.model.freeze import layer_groups
from coatnet.model.network import CoAtNet, create_model
from coatnet.system.validated import (
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    validated,
)
from coatnet.training.distributed.shards import full_tensor, local_tensor
from coatnet.training.muon import Muon

Model = TypeVar("Model", bound=nn.Module)
Loss = Callable[[Tensor, Tensor], Tensor]


@validated
class Optimization:
    """The optimizer, with decoupled weight decay."""

    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate, reached after the warm-up; by default 8e-3 for 128 images a step with Muon, 2e-3 with AdamW,
    less to fine-tune."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay; biases, normalization weights and relative bias tables are exempt."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    grad_clip_norm: PositiveFloat = 1.0
    """Largest Euclidean norm of all gradients together; larger ones are scaled down to it."""
    layer_decay: PositiveFraction = 1.0
    """Factor on the learning rate for every block between a parameter and the head; by default 0.8 with `init`."""
    algorithm: Literal["adamw", "muon"] = "adamw"
    """Rule of the update: adamw; or muon for the weights that are matrices, and adamw for the others. By default muon
    for untrained weights, and adamw to fine-tune and in the recipes of the paper."""


@validated
class Schedule:
    """Linear warm-up from zero, then `decay` down to `minimum_learning_rate`."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of the warm-up, at most a fifth of the run; by default a twentieth of it."""
    minimum_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay; by default 1e-5."""


def learning_rate_at(step: int, total_steps: int, peak: float, schedule: Schedule) -> float:
    """The learning rate of optimizer step `step` (0 is the first), a pure function of its arguments.

    Warm-up takes at most a fifth of the run, so that one with a limit in minutes still decays.
    """
    warmup = min(schedule.warmup_steps, total_steps // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.decay == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    height = (1 + math.cos(math.pi * progress)) / 2 if schedule.decay == "cosine" else 1 - progress
    lowest = min(schedule.minimum_learning_rate, peak)
    return lowest + (peak - lowest) * height


def build_loss(kind: str, class_weights: Tensor | None = None) -> Loss:
    """`(logits, targets) -> scalar`, summed over the images: the caller divides by the true batch size.

    "softmax" is cross entropy with soft targets; "sigmoid" is binary cross entropy summed over the classes.
    """

    def softmax(logits: Tensor, targets: Tensor) -> Tensor:
        terms = targets * F.log_softmax(logits.float(), dim=-1)
        return -(terms if class_weights is None else terms * class_weights).sum()

    def sigmoid(logits: Tensor, targets: Tensor) -> Tensor:
        terms = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
        return (terms if class_weights is None else terms * class_weights).sum()

    return {"softmax": softmax, "sigmoid": sigmoid}[kind]


def balancing_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """(K,) weights inverse to how often a class occurs, of mean 1 over the images; absent classes get 1."""
    counts = count_labels(labels, num_classes)
    weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.tensor(np.where(counts > 0, weights, 1.0), dtype=torch.float32)


def parameter_groups(model: CoAtNet, optimization: Optimization) -> dict[str, list[dict[str, Any]]]:
    """Groups of each algorithm, with their names, weight decay and `scale` of the learning rate.

    Not decayed, as in the paper's code: biases, normalization weights (all 1-D) and the relative bias tables.
    Frozen parameters are in no group.
    """
    exempt, matrices = model.no_weight_decay(), matrix_weights(model) if optimization.algorithm == "muon" else {}
    blocks = layer_groups(model)
    scale = {
        name: optimization.layer_decay ** (len(blocks) - 1 - i) for i, block in enumerate(blocks) for name in block
    }
    groups: dict[str, dict[tuple[float, ...], dict[str, Any]]] = {"adamw": {}, "muon": {}}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name in exempt else optimization.weight_decay
        values = {"weight_decay": decay, "scale": scale[name]}
        if name in matrices:
            values["matrices"] = matrices[name]
        of_algorithm = groups["muon" if name in matrices else "adamw"]
        group = of_algorithm.setdefault(tuple(values.values()), {"params": [], "names": [], **values})
        group["params"].append(parameter)
        group["names"].append(name)
    return {algorithm: list(of_algorithm.values()) for algorithm, of_algorithm in groups.items() if of_algorithm}


def matrix_weights(model: CoAtNet) -> dict[str, int]:
    """Names of the weights that Muon updates, with the number of matrices below each other in each.

    These are 1x1 and dense convolutions and linear layers. Not the classifier, whose rows are classes, nor depthwise
    kernels and relative biases, which are no matrices.
    """
    found = {}
    for name, module in model.named_modules():
        is_dense = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if is_dense and module is not model.get_classifier() and "relative_bias" not in name:
            found[f"{name}.weight"] = 3 if name.endswith(".qkv") else 1
    return found


def build_optimizers(model: CoAtNet, optimization: Optimization, *, bf16: bool = False) -> list[torch.optim.Optimizer]:
    """The optimizers of a model's parameters, each with some of them.

    AdamW is fused: 4 ms a step where the default takes 12 (400 tensors, one core).
    """
    rate, optimizers = optimization.learning_rate, list[torch.optim.Optimizer]()
    for algorithm, groups in parameter_groups(model, optimization).items():
        if algorithm == "muon":
            optimizers.append(Muon(groups, rate, dtype=torch.bfloat16 if bf16 else torch.float32))
        else:
            optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=optimization.betas, fused=True))
    return optimizers


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, a scalar; of the shards that this process holds."""
    return nn.utils.get_total_norm([local_tensor(p.grad) for p in parameters if p.grad is not None], foreach=True)


def clip_gradients(parameters: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale the gradients, whose norm is given, down to the norm `limit` if theirs is larger; without waiting for a
    GPU."""
    gradients = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))


def named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The parameters of an optimizer from `build_optimizers`, with their names in the model."""
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]


def update_weights(optimizers: Sequence[torch.optim.Optimizer], learning_rate: float) -> None:
    """Take a step of each optimizer, with the learning rate scaled by layer decay in each group; forget the
    gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["scale"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def decay_at(step: int, limit: float) -> float:
    """How much of an average the update after optimizer step `step` keeps; less at first, to forget the start."""
    return min(limit, (1 + step) / (10 + step))


def frozen_modules(model: nn.Module) -> set[str]:
    """Names of the modules with parameters of their own that are all frozen; their buffers stand still too."""
    own = {name: list(module.parameters(recurse=False)) for name, module in model.named_modules()}
    return {name for name, parameters in own.items() if parameters and not any(p.requires_grad for p in parameters)}


class MovingAverage:
    """Averages, by the names of a model, that follow its weights and BatchNorm statistics exponentially.

    The decay warms up, see `decay_at`. Counters are copied; what is frozen in the model stays as it is in `averages`.
    With decay 0 the averages are the model's own tensors.
    """

    def __init__(self, averages: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
        self.decay, self._averages, still = decay, averages, frozen_modules(model)
        pairs = [
            (local_tensor(averages[name]), local_tensor(value))
            for name, value in model.state_dict().items()
            if name.rpartition(".")[0] not in still
        ]
        self._moving = [(average, value) for average, value in pairs if value.is_floating_point()]
        self._counters = [(average, value) for average, value in pairs if not value.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0 is the first)."""
        if self.decay == 0:
            return
        weight = 1 - decay_at(step, self.decay)
        torch._foreach_lerp_([a for a, _ in self._moving], [v for _, v in self._moving], weight)
        for average, value in self._counters:
            average.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by the names of the model."""
        return dict(self._averages)


class WeightAverage(MovingAverage, Generic[Model]):
    """The average as a second model, `.model`; with decay 0 that is the model itself."""

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval() if decay > 0 else model
        super().__init__(self.model.state_dict(), model, decay)

    def whole(self) -> Model:
        """The averaged model."""
        return self.model


class ShardedAverage(MovingAverage):
    """The average of weights that are spread over processes: each keeps that of its own rows."""

    def __init__(self, model: CoAtNet, decay: float) -> None:
        self._model, current = model, model.state_dict()
        super().__init__({k: value.clone() for k, value in current.items()} if decay > 0 else current, model, decay)

    @torch.no_grad()
    def whole(self) -> CoAtNet:
        """An ordinary network with the averages on every process; takes 4 bytes a parameter for as long as it is used.

        All processes must call it together. Evaluation then needs no communication.
        """
        with torch.device("meta"):
            network = create_model(**self._model.config())
        network.load_state_dict({name: full_tensor(value) for name, value in self._averages.items()}, assign=True)
        return network.to(memory_format=torch.channels_last).requires_grad_(False).eval()
