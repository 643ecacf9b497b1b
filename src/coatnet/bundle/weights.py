"""Weights in safetensors files: names, kinds and shapes are checked against the network before memory is taken."""

import pickle
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coatnet.errors import UserError, first_line
from coatnet.system.files import check_regular

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in single precision (integers as int64), whatever their device and memory format.

    The file has the mode that the process gives to new files. Raises OSError if it cannot be written.
    """
    dtypes = {True: torch.float32, False: torch.int64}
    plain = {
        name: tensor.detach().to("cpu", dtypes[tensor.is_floating_point()]).contiguous()
        for name, tensor in tensors.items()
    }
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # of a new file: reading the umask would set it for all threads
    try:
        save_file(plain, path, metadata={**(metadata or {}), "format": "pt"})  # replaces it by a file of mode 0600
        path.chmod(mode)
    except SafetensorError as error:  # such as a full disk
        raise OSError(str(error)) from error


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read exactly the expected tensors, in single precision.

    Args:
        expected: tensors of the names, kinds and shapes to read; they may be on the meta device.

    Raises:
        UserError: the file is damaged, its tensors are not exactly the expected ones, or one is not finite; the
            message names the first.
    """
    with _open_safetensors(path) as file:
        _check_tensors(_kinds_and_shapes(file), expected, path)
        found = {name: file.get_tensor(name) for name in expected}
    return _to_single_precision(found, path)


def read_shapes(path: Path) -> dict[str, Sequence[int]]:
    """Read the shapes of all tensors of a file. Raises UserError if it is damaged."""
    with _open_safetensors(path) as file:
        return {name: shape for name, (_, shape) in _kinds_and_shapes(file).items()}


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    """Open a file whose header is valid.

    The library refuses headers above 100 MB, tensors that overlap, leave holes or have another size than their shapes
    say, and files that are cut short or padded. Of a name that occurs twice it takes the last entry, which is harmless:
    the other one would have to lie at the same place, since there may be no holes.
    """
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file, damaged or cut short: {first_line(error)}") from None


def _kinds_and_shapes(file: Any) -> dict[str, tuple[str, list[int]]]:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (the file itself is not iterable)
    return {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}


def read_pickled_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the same as `read_tensors` from a file of `torch.save`, without executing anything in it."""
    found = load_pickle(path)
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    described = {name: (kinds.get(each.dtype, str(each.dtype)), list(each.shape)) for name, each in found.items()}
    _check_tensors(described, expected, path)
    return _to_single_precision(found, path)


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a file of `torch.save`, by name or by name under "state_dict".

    Raises:
        UserError: the file is damaged or holds anything but tensors.
    """
    try:
        check_regular(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a file of tensors: {(str(error) or 'it is cut short').splitlines()[0]}") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise UserError(f"{path}: not a table of tensors by name")
    return found


def _to_single_precision(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Convert floating point tensors to float32. Raises UserError for NaN, infinity and negative variances."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; the file is damaged or training failed")
        if name.endswith("running_var") and (tensor < 0).any():
            raise UserError(f"{path}: {name} holds a negative variance; the file is damaged")
    return {name: each.float() if each.is_floating_point() else each for name, each in tensors.items()}


def _check_tensors(found: Mapping[str, tuple[str, Sequence[int]]], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError for the first tensor that is missing, of another kind or shape, or not expected."""
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{path}: {name} is missing; the weights are not those of the model in config.json")
        kind, shape = found[name]
        same_kind = kind in _DTYPES and _DTYPES[kind].is_floating_point == tensor.is_floating_point()
        if not same_kind or tuple(shape) != tuple(tensor.shape):
            raise UserError(
                f"{path}: {name} is {kind} {list(shape)}, "
                f"the model in config.json has {tensor.dtype} {list(tensor.shape)}"
            )
    for name in found:
        if name not in expected:
            raise UserError(f"{path}: {name} is not part of the model in config.json")
