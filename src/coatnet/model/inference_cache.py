"""Cache of values computed from weights alone, so that evaluation computes them once instead of at every call."""

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class InferenceCache(Generic[Value]):
    """The last value computed from weights; recomputed when the key or a weight changes.

    A change is detected by the version counter of the tensor. Writes through `weight.data` do not increment it, so
    modules clear the cache in `train()` and `eval()`. Weights created in `torch.inference_mode` have no version
    counter, and nothing computed from them is cached. Copies and pickles of the cache start empty.
    """

    def __init__(self) -> None:
        self._entry: tuple[Hashable, Value] | None = None

    def is_usable(self, module: nn.Module) -> bool:
        """Return whether the module runs in evaluation mode, without gradients and not traced into a graph.

        Clears the cache during training, since fused optimizers change weights without incrementing their version.
        """
        if torch.compiler.is_compiling():
            return False
        if module.training or torch.is_grad_enabled():
            self.clear()
            return False
        return True

    def get(self, key: Hashable, weights: Iterable[Tensor], compute: Callable[[], Value]) -> Value:
        """Return the cached value for this key and these weights, computing it if there is none."""
        weights = list(weights)
        if any(each.is_inference() for each in weights):
            return compute()
        key = (key, tuple((each.device, each.data_ptr(), each._version) for each in weights))
        entry = self._entry  # read once: another thread may replace or clear it
        if entry is None or entry[0] != key:
            entry = self._entry = (key, compute())
        return entry[1]

    def clear(self) -> None:
        """Remove the cached value."""
        self._entry = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return InferenceCache, ()
