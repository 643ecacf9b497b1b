"""Losses over targets (B, K): probabilities after mixing, or 0 and 1 for several labels an image."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


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
    counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=num_classes)
    weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.tensor(np.where(counts > 0, weights, 1.0), dtype=torch.float32)
