"""Reading tensors by name from the files of a checkpoint, whole or in part."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from coatnet.training.distributed.shards import Rows


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files, each read when it is asked for.

    A tensor that lies in several files is their rows one after the other.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises SafetensorError or OSError if one is not what it should be."""
        self._parts: dict[str, list[Any]] = {}
        for path in sorted(files):
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118  # no mapping: it can not be iterated
                self._parts.setdefault(name, []).append(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.get_tensor(name) for file in self._parts[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, name: str, rows: Rows) -> Tensor:
        """Some rows of a tensor; nothing else of it is read."""
        found, start, (first, count) = [], 0, rows
        for file in self._parts[name]:
            part = file.get_slice(name)
            length = part.get_shape()[0]
            begin, end = max(first - start, 0), min(first + count - start, length)
            if begin < end:
                found.append(part[begin:end])
            start += length
        if not found:
            return self._parts[name][0].get_slice(name)[0:1][:0]
        return found[0] if len(found) == 1 else torch.cat(found)
