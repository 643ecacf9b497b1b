"""Weights as safetensors: every tensor's name, kind and shape is checked before any memory is taken."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from coatnet.errors import UserError

_KINDS = {"F32": torch.float32, "I64": torch.int64}
# The format's own limit; also keeps a header that lies about its length from being believed.
_LONGEST_HEADER = 100_000_000


def write_weights(model: nn.Module, path: Path) -> None:
    """The state of a model, single precision, whatever device and memory format it lives in."""
    kinds = {True: torch.float32, False: torch.int64}
    state = {
        name: tensor.detach().to("cpu", kinds[tensor.is_floating_point()]).contiguous()
        for name, tensor in model.state_dict().items()
    }
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error


def read_weights(model: nn.Module, path: Path) -> None:
    """Fill a model, which may live on the meta device, with the tensors of a file.

    Raises:
        UserError: the file is damaged, or its tensors are not exactly the model's, or one is not finite.
    """
    _check_header(_read_header(path), model.state_dict(), path)
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; the file is damaged or training failed")
    model.load_state_dict(state, assign=True)
    model.to(memory_format=torch.channels_last)


def _read_header(path: Path) -> dict[str, Any]:
    """The table of contents: tensor name -> dtype, shape and place in the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise UserError(f"{path}: not a safetensors file, or cut short: its header does not fit its {size} bytes")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not a table of tensors")
    header.pop("__metadata__", None)
    _check_places(header, size - 8 - length, path)
    return header


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands there twice")
    return table


def _check_places(header: dict[str, Any], size: int, path: Path) -> None:
    """The tensors fill the file from end to end, no holes, no overlaps, each as long as its shape says."""
    try:
        places = sorted((*_place_and_length(row), name) for name, row in header.items())
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path}: its header is not a table of tensors") from None
    end = 0
    for first, last, length, name in places:
        if length is None:
            raise UserError(f"{path}: {name} is {header[name]['dtype']}; weights are F32 (and counters I64)")
        if first != end or last - first != length:
            raise UserError(f"{path}: {name} does not lie where its shape and the tensors before it put it")
        end = last
    if end != size:
        raise UserError(f"{path}: {size} bytes of tensors where the header speaks of {end}: cut short or padded")


def _place_and_length(row: dict[str, Any]) -> tuple[int, int, int | None]:
    """First and last byte, and the bytes that kind and shape need; None for a kind that is not ours."""
    first, last = row["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (first, last, *row["shape"])):
        raise ValueError
    kind = _KINDS.get(row["dtype"])
    return first, last, None if kind is None else math.prod(row["shape"]) * kind.itemsize


def _check_header(header: dict[str, Any], expected: dict[str, torch.Tensor], path: Path) -> None:
    """Exactly the model's tensors, by name, kind and shape; tells the first that differs."""
    for name, tensor in expected.items():
        if name not in header:
            raise UserError(f"{path}: {name} is missing; the weights are not those of the model in config.json")
        row = header[name]
        if _KINDS[row["dtype"]] != tensor.dtype or tuple(row["shape"]) != tuple(tensor.shape):
            raise UserError(
                f"{path}: {name} is {row['dtype']} {row['shape']}, "
                f"the model in config.json has {tensor.dtype} {list(tensor.shape)}"
            )
    for name in header.keys() - expected.keys():
        raise UserError(f"{path}: {name} is not part of the model in config.json")
