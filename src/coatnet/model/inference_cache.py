"""What follows from weights alone, computed once in evaluation rather than at every call."""

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class InferenceCache(Generic[Value]):
    """A value that is made of weights, and made again when one of them changes; a copy or a pickle makes its own.

    A change is seen by the version that torch counts. Writes through `weight.data` are not counted: `eval()`, called
    behind them, forgets the value. Weights made in `torch.inference_mode` have no version: nothing is kept of them.
    """

    def __init__(self) -> None:
        self._entry: tuple[Hashable, Value] | None = None

    def serves(self, module: nn.Module) -> bool:
        """Whether the module is evaluated, without gradients, outside of a graph, which holds no state of ours.

        Where it learns, the value is forgotten: a fused optimizer changes weights without a word to their version.
        """
        if torch.compiler.is_compiling():
            return False
        if module.training or torch.is_grad_enabled():
            self.forget()
            return False
        return True

    def get(self, key: Hashable, weights: Iterable[Tensor], make: Callable[[], Value]) -> Value:
        """The value for this key and these weights, as `make` gives it."""
        weights = list(weights)
        if any(each.is_inference() for each in weights):
            return make()
        key = (key, tuple((each.device, each.data_ptr(), each._version) for each in weights))
        if self._entry is None or self._entry[0] != key:
            self._entry = (key, make())
        return self._entry[1]

    def forget(self) -> None:
        """Make the value anew at the next call."""
        self._entry = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return InferenceCache, ()
