"""Track the memory that tensors hold at every moment of a computation, whether they are real or fake.

Fake tensors have shapes, devices and storages like real ones, but no bytes: a step of any network can be tracked on any
machine. What libraries allocate inside an operation is no tensor and is not counted.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from coatnet.training.distributed.shards import local_tensor

OTHER = "activations"  # the kind of tensors without a label


class MemoryTracker(TorchDispatchMode):
    """While entered, record the allocation, resizing and release of storages, and count multiply-accumulates."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self._tape: list[tuple[int, int]] = []  # (number of a storage, change in bytes), in order
        self._sizes: list[int] = []  # by number
        self._kinds: dict[int, str] = {}
        self._numbers: dict[int, int] = {}  # of storages that are alive, by address
        self._watchers: dict[int, Any] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "MemoryTracker":
        # FSDP2 allocates and frees memory by resizing storages, which is no operation on tensors; torch's own memory
        # tracker intercepts it in the same way.
        resize = self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            number = self._watch(storage)
            result = resize(storage, size)
            self._resized(number, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it is dispatched again, as operations on the local tensor
        if func is torch.ops.prim.device.default:  # three of five calls, from FSDP2
            return func(*args)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        self.macs += _macs(func, args, kwargs or {}, result)
        return result

    @torch.no_grad()  # the local tensor of a DTensor is then ten times faster to get
    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Set the kind of tensors, from their allocation on; one that was allocated before counts from now on."""
        for tensor in tensors:
            self._kinds[self._watch(local_tensor(tensor).untyped_storage())] = kind

    def label_rest(self, kind: str) -> None:
        """Set the kind of all tensors that are alive and have no label."""
        for number, size in enumerate(self._sizes):
            if size:
                self._kinds.setdefault(number, kind)

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind at the moment when their sum was largest."""
        current: dict[str, int] = {}
        peak: dict[str, int] = {}
        total = highest = 0
        for number, change in self._tape:
            kind = self._kinds.get(number, OTHER)
            current[kind] = current.get(kind, 0) + change
            total += change
            if total > highest:
                highest, peak = total, dict(current)
        return peak

    def _watch(self, storage: torch.UntypedStorage) -> int:
        """The number of a storage; a new one is recorded from now on."""
        address = storage._cdata
        number = self._numbers.get(address)
        if number is None:
            number = self._numbers[address] = len(self._sizes)
            self._sizes.append(0)
            self._resized(number, storage.nbytes())
            self._watchers[number] = weakref.ref(storage, lambda _: self._gone(address, number))
        return number

    def _gone(self, address: int, number: int) -> None:
        del self._numbers[address], self._watchers[number]
        self._resized(number, 0)

    def _resized(self, number: int, size: int) -> None:
        if size != self._sizes[number]:
            self._tape.append((number, size - self._sizes[number]))
            self._sizes[number] = size


def _macs(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Multiply-accumulates of a matrix product or convolution; 0 for any other operation."""
    if func is torch.ops.aten.convolution_backward.default:
        # As many for the input and for the weights as in the forward pass; torch's own count ignores groups.
        outputs, _, weight, *_, (wants_input, wants_weight, _) = args
        return outputs.numel() * weight[0].numel() * (wants_input + wants_weight)
    count = flop_registry.get(func.overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=result) // 2
