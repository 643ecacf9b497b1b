"""Plain values (from YAML or the command line) to frozen dataclasses and back, strict at the door."""

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from coatnet.errors import UserError, nearest

MAX_YAML_BYTES = 1_000_000
T = TypeVar("T")


@cache
def field_types(kind: type) -> dict[str, Any]:
    """The annotated type of each field of a dataclass, in order."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from plain values; what is not given has the default of the dataclass.

    Raises UserError naming the key for an unknown key, a wrong type, or a number that is not finite.
    """
    return kind(**checked(kind, values, where))


def checked(kind: type, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The values, each converted to the type of its field; unknown keys are refused with the right ones."""
    hints = field_types(kind)
    if not isinstance(values, Mapping):
        raise UserError(
            f"{where.rstrip('.') or kind.__name__} must be a mapping of names to values, got {values!r:.80}"
        )
    for key in values:
        if key not in hints:
            raise UserError(
                f"{where}{key} is unknown{nearest(str(key), hints)}; {kind.__name__} has {', '.join(hints)}"
            )
    return {key: convert(hints[key], value, where + key) for key, value in values.items()}


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type, or a UserError that names the key and what would be right."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        raise UserError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r:.80}")
    if is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value, where + ".")
    if origin is tuple and isinstance(value, list | tuple):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) == len(value):
            return tuple(convert(kind, part, where) for kind, part in zip(inner, value, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): convert(arguments[1], part, f"{where}.{key}") for key, part in value.items()}
    if hint is float:
        return _convert_float(value, where)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    raise UserError(f"{where} must be {describe(hint)}, got {value!r:.80}")


def describe(hint: Any) -> str:
    """A type in words, for error lines."""
    words = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _describe_any(arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        if arguments[0] is str:
            return "names with commas between, such as one,two"
        return "numbers, such as [0.5]" if Ellipsis in arguments else "two numbers, such as [0.8,1.0]"
    return "names with values, such as {name: value}" if origin is dict else hint.__name__


def _describe_any(kinds: Sequence[Any]) -> str:
    """Several types in words; literals are one list, and names with commas between are a text already."""
    literals = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    listed = any(typing.get_origin(kind) is tuple and typing.get_args(kind)[0] is str for kind in kinds)
    others = [kind for kind in kinds if typing.get_origin(kind) is not Literal and not (kind is str and listed)]
    words = ["one of " + ", ".join(map(str, literals))] if literals else []
    return " or ".join(words + [describe(kind) for kind in others])


def plain(value: Any) -> Any:
    """A dataclass as nested dicts and lists, ready for YAML or JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def shallow(value: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, nested dataclasses kept as they are."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping, bounded in size, without aliases or tags: a file can name values, never code."""
    try:
        text = Path(path).read_bytes()
        if len(text) > MAX_YAML_BYTES:
            raise UserError(f"{path} is {len(text)} bytes; a recipe has at most {MAX_YAML_BYTES}")
        values = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path} can not be read: {error.strerror}; give a recipe in YAML") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a recipe in YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of names to values, got {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases: nested aliases can grow a small file without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    if any(isinstance(option, type) and type(value) is option for option in options):
        options = tuple(option for option in options if type(value) is option)
    kinds = [option for option in options if option is not type(None)]
    for kind in kinds[:-1]:
        try:
            return convert(kind, value, where)
        except UserError:
            continue
    if len(kinds) == 1:
        return convert(kinds[0], value, where)
    try:
        return convert(kinds[-1], value, where)
    except UserError:
        right = _describe_any([kind for kind in kinds if not is_dataclass(kind)])
        raise UserError(f"{where} must be {right}, got {value!r:.80}") from None


def _convert_float(value: Any, where: str) -> float:
    if isinstance(value, str):  # YAML 1.1 reads `1e-3` as a text
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{where} must be a number, got {value!r:.80}") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} must be a number, got {value!r:.80}")
    if not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, got {value}")
    return float(value)
