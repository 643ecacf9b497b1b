"""A config.json read as if by a stranger: every value is asked for by key and type, and bounded."""

import json
import math
from pathlib import Path
from reprlib import repr as short
from typing import Any

from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError

# Far above anything sensible and far below what hurts: a stranger's numbers are checked before they are used.
_LIMITS = {"num_classes": 1_000_000, "in_channels": 1_024, "resolution": 16_384}
_LONGEST_FILE = 64_000_000


class Table:
    """A JSON object whose values are asked for by key and type."""

    def __init__(self, values: Any, path: Path) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{path}: not a JSON object but {short(values)}")
        self.values: dict[str, Any] = values
        self.path = path

    def refuse(self, key: str, right: str) -> None:
        """Raises UserError: the value under that key is not right."""
        raise UserError(f"{self.path}: {key} is {short(self.values[key])}; it must be {right}")

    def take(self, key: str, kind: type) -> Any:
        """The value under that key, of that type."""
        if key not in self.values:
            raise UserError(f"{self.path}: {key} is missing")
        if not _is(self.values[key], kind):
            self.refuse(key, f"of type {kind.__name__}")
        return self.values[key]

    def table(self, key: str) -> "Table":
        """The object under that key."""
        return Table(self.take(key, dict), self.path)

    def whole(self, key: str) -> int:
        """The whole number under that key, at least 1 and not absurd."""
        if not 1 <= self.take(key, int) <= _LIMITS[key]:
            self.refuse(key, f"from 1 to {_LIMITS[key]:,}")
        return self.values[key]

    def items(self, key: str, kind: type) -> tuple[Any, ...]:
        """The values of the list under that key, all of that type."""
        if not all(_is(item, kind) for item in self.take(key, list)):
            self.refuse(key, f"a list of type {kind.__name__}")
        return tuple(kind(item) for item in self.values[key])


def _is(value: Any, kind: type) -> bool:
    """JSON's idea of a type: a bool is no number, a whole number is a float too, NaN and infinity are not."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def read_table(path: Path) -> Table:
    """The JSON object in a file. Raises UserError if there is none, or the file is absurdly long."""
    if path.stat().st_size > _LONGEST_FILE:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes; a config.json has at most {_LONGEST_FILE:,}")
    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    return Table(values, path)


def read_preprocessing(seen: Table) -> Preprocessing:
    """What a "pretrained_cfg" says of the images. Raises UserError if it makes no sense."""
    size = seen.items("input_size", int)
    try:
        preprocessing = Preprocessing(
            resolution=size[-1] if size else 0,
            crop=seen.take("crop_mode", str),
            crop_fraction=seen.take("crop_pct", float),
            interpolation=seen.take("interpolation", str),
            mean=seen.items("mean", float),
            std=seen.items("std", float),
        )
    except UserError as error:
        raise UserError(f"{seen.path}: pretrained_cfg: {error}") from None
    if size != (preprocessing.channels, preprocessing.resolution, preprocessing.resolution):
        seen.refuse("input_size", f"[{preprocessing.channels} (as many as mean), side, side]")
    return preprocessing
