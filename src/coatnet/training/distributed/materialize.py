"""Untrained weights from nothing but (seed, name): the same on any number of processes, wherever each row lies.

A network that is to be sharded is built on the meta device, so that no process ever holds it whole.
"""

import copy

import torch
from torch import Tensor, nn

from coatnet.data.sampler import hash_words
from coatnet.model import build
from coatnet.model.relative_bias import INITIAL_DEVIATION, LocalRelativeBias, RelativeBias
from coatnet.training.distributed.shards import Rows, fill


class _Drawn:
    """The tensors of one module, whole, to be read in part."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = own_tensors(module)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def rows(self, name: str, rows: Rows) -> Tensor:
        return self._tensors[name].narrow(0, *rows)


@torch.no_grad()
def materialise(model: nn.Module, seed: int, device: torch.device) -> None:
    """Give a network on the meta device memory on `device` and untrained weights, one module after the other."""
    model.to_empty(device=device)
    for name, module in model.named_modules():
        targets = own_tensors(module)
        if targets:
            drawn = _Drawn(draw(module, module_seed(seed, name)))
            for key, target in targets.items():
                fill(target, drawn, key)


def draw(module: nn.Module, seed: int) -> nn.Module:
    """A module like this one on the CPU, whole and untrained; its own tensors only."""
    twin = copy.copy(module)
    twin._parameters = {
        name: None if value is None else nn.Parameter(torch.empty(value.shape))
        for name, value in module._parameters.items()
    }
    twin._buffers = {
        name: None if value is None else torch.empty(value.shape, dtype=value.dtype)
        for name, value in module._buffers.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if isinstance(twin, RelativeBias | LocalRelativeBias):
            nn.init.normal_(twin.table, std=INITIAL_DEVIATION)
        else:
            twin.reset_parameters()  # pyrefly: ignore[not-callable]  # of torch's own layers, and no others are left
            build.initialise(twin)
    return twin


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, without its children's."""
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: value.detach() for name, value in named}


def module_seed(seed: int, name: str) -> int:
    """A seed for the weights of one module."""
    return int(hash_words(seed, *name.encode())[0] >> 1)
