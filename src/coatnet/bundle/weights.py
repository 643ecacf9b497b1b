"""Weights as safetensors: every tensor's name, kind and shape is checked before any memory is taken."""

import json
import math
import pickle
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coatnet.errors import UserError

_KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
# The format's own limit; also keeps a header that lies about its length from being believed.
_LONGEST_HEADER = 100_000_000


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """The tensors in single precision (counters as they are), whatever device and memory format they live in.

    The file may be read by whoever may read other new files of this process. Raises OSError if it can not be written.
    """
    kinds = {True: torch.float32, False: torch.int64}
    plain = {
        name: tensor.detach().to("cpu", kinds[tensor.is_floating_point()]).contiguous()
        for name, tensor in tensors.items()
    }
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # asked of a file: the umask itself is read by setting it, for all threads
    try:
        save_file(plain, path, metadata={**(metadata or {}), "format": "pt"})  # puts a file of mode 0600 in its place
        path.chmod(mode)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exactly the expected tensors, in single precision; those may live on the meta device.

    Raises:
        UserError: the file is damaged, its tensors are not exactly the expected, or one is not finite; the message
            names the first.
    """
    check_shapes({name: (row["dtype"], row["shape"]) for name, row in read_header(path).items()}, expected, path)
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    return finite(found, path)


def read_pickled_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `read_tensors`, from a file of `torch.save`; nothing in it is executed, but it is read whole first."""
    found = load_pickle(path)
    names = {kind: name for name, kind in _KINDS.items()}
    kinds = {name: (names.get(each.dtype, str(each.dtype)), list(each.shape)) for name, each in found.items()}
    check_shapes(kinds, expected, path)
    return finite(found, path)


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, on their own or under "state_dict". Raises UserError if it has none."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a file of tensors: {(str(error) or 'it is cut short').splitlines()[0]}") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise UserError(f"{path}: not a table of tensors by name")
    return found


def finite(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors in single precision. Raises UserError if one holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; the file is damaged or training failed")
    return {name: each.float() if each.is_floating_point() else each for name, each in tensors.items()}


def read_header(path: Path) -> dict[str, Any]:
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
            raise UserError(
                f"{path}: {name} is {header[name]['dtype']}; weights are F32, F16 or BF16 (and counters I64)"
            )
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


def check_shapes(found: Mapping[str, tuple[str, Sequence[int]]], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError that names the first tensor that is missing, of another kind or shape, or too many."""
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{path}: {name} is missing; the weights are not those of the model in config.json")
        kind, shape = found[name]
        same_kind = kind in _KINDS and _KINDS[kind].is_floating_point == tensor.is_floating_point()
        if not same_kind or tuple(shape) != tuple(tensor.shape):
            raise UserError(
                f"{path}: {name} is {kind} {list(shape)}, "
                f"the model in config.json has {tensor.dtype} {list(tensor.shape)}"
            )
    for name in found:
        if name not in expected:
            raise UserError(f"{path}: {name} is not part of the model in config.json")
