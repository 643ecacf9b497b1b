"""Muon: momentum along orthogonal matrices, for weights that are matrices (Jordan et al. 2024, "Muon")."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from coatnet.training.distributed.shards import full_tensor, is_sharded, local_rows, local_tensor

MOMENTUM = 0.95  # Jordan et al. 2024
# Coefficients of the quintic iteration and their number: Jordan et al. 2024. Singular values end between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Iterations of a wide matrix on one Gram matrix before it is computed anew. Its eigenvalues are the squares of the
# singular values. chosen: in bfloat16, updates of trained networks are within 0.08 of the norm of exact ones, as with a
# new Gram matrix for each iteration; two iterations before three: 0.11; all five: useless. In float32 all five: 5e-4.
PASSES = {torch.float32: (5,), torch.bfloat16: (3, 2)}
# The root mean square of an update of AdamW, so that both share a learning rate: Liu et al. 2025, "Muon is scalable for
# LLM training", section 2.2.
UPDATE_RMS = 0.2
MIN_BF16_VALUES = 2**15  # fewer are orthogonalized faster in float32: 0.1 instead of 0.4 ms for two of (16, 256)
MAX_STACKED_VALUES = 2**24  # values orthogonalized together: 64 MB in float32


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is replaced by the nearest orthogonal matrix, with decoupled weight decay.

    A weight `(rows, ...)` is the matrix of its rows; `torch.optim.Muon` takes two dimensions and one matrix at a time.
    Of a sharded weight each process gathers the update, one after the other, and applies it to its rows.

    Args:
        params: weights of at least two dimensions, in groups. `matrices` of a group is the number of matrices that lie
            below each other in each of its weights, such as 3 for queries, keys and values.
        lr: learning rate, that of AdamW.
        weight_decay: decoupled weight decay.
        dtype: type of the matrix products, such as the precision of the run.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "matrices": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]  # no closure
        """Update all weights that have a gradient; the gradients are overwritten."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:  # only the classifier learns at first
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            gradients = [local_tensor(weight.grad) for weight in weights]
            momenta = [local_tensor(self.state[weight]["momentum_buffer"]) for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            torch._foreach_lerp_(gradients, momenta, MOMENTUM)
            torch._foreach_mul_([local_tensor(weight) for weight in weights], 1 - group["lr"] * group["weight_decay"])
            for same in stacks(weights):
                self._update(same, group["lr"], group["matrices"])

    def _update(self, weights: list[Tensor], learning_rate: float, matrices: int) -> None:
        """Subtract the orthogonalized updates, which lie in the gradients, from weights of one shape."""
        gradients = [full_tensor(weight.grad) for weight in weights if weight.grad is not None]
        updates = [gradient.flatten(1).unflatten(0, (matrices, -1)) for gradient in gradients]
        stacked = torch.cat(updates)  # (len(weights) * matrices, rows, columns)
        stacked = orthogonalize(stacked, self.dtype if stacked.numel() >= MIN_BF16_VALUES else torch.float32)
        size = UPDATE_RMS * math.sqrt(max(stacked.shape[1:]))
        for weight, update in zip(weights, stacked.split(matrices), strict=True):
            rows = update.flatten(0, 1)  # (matrices * rows, columns)
            if is_sharded(weight):
                rows = rows.narrow(0, *local_rows(weight))
            local = local_tensor(weight)
            local.sub_(rows.view_as(local), alpha=learning_rate * size)


def stacks(weights: list[Tensor]) -> list[list[Tensor]]:
    """Weights of one shape together, as many as are orthogonalized at once."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        by_shape.setdefault(weight.shape, []).append(weight)
    found = []
    for shape, same in by_shape.items():
        count = max(1, MAX_STACKED_VALUES // shape.numel())
        found += [same[start : start + count] for start in range(0, len(same), count)]
    return found


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximately U V^T of each matrix U S V^T, by Newton-Schulz iterations: `(k, rows, columns)` of `dtype`.

    An iteration multiplies the matrix X by a polynomial of its Gram matrix X X^T. For wide matrices, several iterations
    are computed on the Gram matrix alone and X is multiplied once, by the product of their polynomials: for four times
    as many columns as rows 25 (float32) or 30 (bfloat16) instead of 45 products of the size of the Gram matrix.
    """
    rows, columns = matrices.shape[-2:]
    if rows > columns:  # the smaller Gram matrix
        return orthogonalize(matrices.mT, dtype).mT
    x = matrices / torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = x.to(dtype)
    for iterations in PASSES[dtype] if columns >= 2 * rows else [1] * ITERATIONS:
        gram = x @ x.mT
        product = polynomial = _polynomial(gram)
        for _ in range(iterations - 1):
            gram = polynomial @ gram @ polynomial
            polynomial = _polynomial(gram)
            product = polynomial @ product
        x = product @ x
    return x


def _polynomial(gram: Tensor) -> Tensor:
    """a + b G + c G^2."""
    a, b, c = COEFFICIENTS
    values = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    values.diagonal(dim1=-2, dim2=-1).add_(a)
    return values
