"""Frozen dataclasses whose values pydantic converts and checks; a wrong value is one line.

`validated` declares such a class. It stays a dataclass of the standard library (`replace`, `asdict`, `fields`), the
docstring under a field becomes its description, and what the constructor refuses is a `UserError` that names the
field, the value and what would be right.
"""

import dataclasses
import functools
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import numpy as np
from pydantic import AllowInfNan, BeforeValidator, ConfigDict, Field, Strict, ValidationError, create_model
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from coatnet.errors import UserError, nearest_option
from coatnet.system.credentials import conceal

T = TypeVar("T")

CHECKED = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _number(value: Any) -> Any:
    """A number of numpy as one of Python; true and false are refused, which Python counts among the numbers."""
    if isinstance(value, bool | np.bool_):
        raise ValueError("true and false are not numbers")
    return value.item() if isinstance(value, np.generic) else value


def _size(value: Any) -> Any:
    """A side in pixels; height and width, such as `192x320`, stay two numbers if they differ."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d{1,9})\s*[xX]\s*(\d{1,9})\s*", value)):
        value = match.groups()
    sides = [value] if not isinstance(value, list | tuple) else list(value)
    try:
        numbers = [int(_number(side)) for side in sides]
        whole = all(number == float(side) for number, side in zip(numbers, sides, strict=True))
    except (TypeError, ValueError, OverflowError):
        numbers, whole = [], False
    if not whole or len(numbers) not in (1, 2):
        raise UserError("must be a whole number, or height and width such as 192x320")
    if min(numbers) <= 0:
        raise UserError("must be above 0")
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


def _boolean(value: Any) -> Any:
    """True or False of numpy as that of Python."""
    return bool(value) if isinstance(value, np.bool_) else value


def _text(value: Any) -> Any:
    """A path as its text."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _source(value: Any) -> Any:
    """A path as its text, and a URL without its credentials, which are kept in memory."""
    value = _text(value)
    return conceal(value) if isinstance(value, str) else value


def _names(value: Any) -> Any:
    """`one,two` as its names."""
    return tuple(name for part in value.split(",") if (name := part.strip())) if isinstance(value, str) else value


Boolean = Annotated[bool, Strict(), BeforeValidator(_boolean)]
Integer = Annotated[int, BeforeValidator(_number)]
Size = Annotated[Any, BeforeValidator(_size)]  # an int, or a tuple of height and width
Number = Annotated[float, AllowInfNan(False), BeforeValidator(_number)]
Text = Annotated[str, BeforeValidator(_text)]
Source = Annotated[str, BeforeValidator(_source)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
PositiveFloat = Annotated[Number, Field(gt=0)]
NonNegativeFloat = Annotated[Number, Field(ge=0)]
PositiveInt = Annotated[Integer, Field(gt=0)]
NonNegativeInt = Annotated[Integer, Field(ge=0)]
PositiveFraction = Annotated[Number, Field(gt=0, le=1)]
Probability = Annotated[Number, Field(ge=0, le=1)]
FractionBelowOne = Annotated[Number, Field(ge=0, lt=1)]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def validated(kind: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose constructor converts and checks its values, and raises UserError."""
    made: Any = dataclass(frozen=True, config=CHECKED)(kind)
    construct = made.__init__

    @functools.wraps(construct)
    def __init__(self: T, *args: Any, **values: Any) -> None:
        values |= zip(list(fields_of(made))[: len(args)], args, strict=True)
        try:
            construct(self, **values)
        except ValidationError as error:
            raise UserError(explain(error, made, values)) from None

    made.__init__ = __init__
    return made


def fields_of(kind: Any) -> dict[str, FieldInfo]:
    """The fields of a validated class by name: annotation, constraints, description."""
    return vars(kind)["__pydantic_fields__"]


def is_validated(kind: Any) -> bool:
    """Whether a type is a class that `validated` made."""
    return isinstance(kind, type) and "__pydantic_fields__" in vars(kind)


def check_some(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of some fields of a validated class, converted and checked one by one; of nested ones too, as dicts.

    Raises:
        UserError: names the first wrong field, such as optimizer.learning_rate.
    """
    try:
        return _sparse(kind).model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise UserError(explain(error, kind, values)) from None


@functools.cache
def _sparse(kind: type) -> Any:
    """A model with the fields of `kind`, each of which may be absent."""
    fields: dict[str, Any] = {}
    for name, field in fields_of(kind).items():
        kind_of_value: Any = field.annotation
        if is_validated(kind_of_value):
            kind_of_value = Annotated[_sparse(kind_of_value), BeforeValidator(_as_dict)]  # pyrefly: ignore
        for constraint in field.metadata:
            kind_of_value = Annotated[kind_of_value, constraint]
        fields[name] = (kind_of_value, None)
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def _as_dict(value: Any) -> Any:
    """A validated object as its values by name."""
    return dataclasses.asdict(value) if is_validated(type(value)) else value


def explain(error: ValidationError, kind: Any, values: Any) -> str:
    """The first mistake of a validation in a line: the field, what would be right, what was given."""
    first = error.errors(include_url=False)[0]
    name_of_all, field, path, given, rest = kind.__name__, None, "", values, [str(part) for part in first["loc"]]
    while rest and is_validated(kind) and rest[0] in fields_of(kind):
        name = rest.pop(0)
        field, path = fields_of(kind)[name], f"{path}{name}."
        given = given.get(name, first["input"]) if isinstance(given, Mapping) else first["input"]
        kind = field.annotation
    if first["type"] == "value_error" and isinstance(cause := first["ctx"]["error"], UserError):
        of_several = field is None or is_validated(kind)  # fields, which the message names
        return f"{path}{cause}" if of_several else f"{path.removesuffix('.')} {cause}, got {given!r:.80}"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_field(rest[0], kind, path)
    if first["type"] == "missing" and not rest:
        return f"{path.removesuffix('.')} is missing"
    return f"{path.removesuffix('.') or name_of_all} {_what_is_wrong(first, field, rest)}, got {given!r:.80}"


def _what_is_wrong(first: Any, field: FieldInfo | None, rest: list[str]) -> str:
    """`must be ...`: by the type of the mistake, and by where inside the value of the field it is."""
    bounds = {key: bound for key, bound in first.get("ctx", {}).items() if key in _BOUNDS}
    if field is None or is_validated(field.annotation):
        return "must be names with values, such as {name: value}"
    if first["type"] == "finite_number":
        return "must be a finite number"
    if bounds and not any(part.isdigit() for part in rest):
        return f"must be {_describe_bounds(bounds | _bounds_in(field.metadata))}"
    return f"must be {describe(field.annotation)}"


def unknown_field(name: str, kind: Any, where: str) -> str:
    """`optimizer.learning_rat is unknown (did you mean 'learning_rate'?); optimizer has learning_rate, ...`."""
    known, owner = fields_of(kind), where.removesuffix(".") or kind.__name__
    return f"{where}{name} is unknown{nearest_option(name, known)}; {owner} has {', '.join(known)}"


def describe(hint: Any) -> str:
    """A type in words, for errors and help."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return describe(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(kind) for kind in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is dict:
        return "names with values, such as {name: value}"
    if origin is tuple:
        if describe(arguments[0]) == "a text":
            return "names with commas between, such as one,two"
        limits = _describe_bounds(_bounds_in(typing.get_args(arguments[0])))
        numbers = "numbers, such as [0.5]" if Ellipsis in arguments else "two numbers, such as [0.8,0.9]"
        return f"{numbers}, each {limits}" if limits else numbers
    return words.get(hint, hint.__name__)


_BOUNDS = ("gt", "ge", "lt", "le")


def _bounds_in(metadata: Iterable[Any]) -> dict[str, Any]:
    """The limits of a number among the metadata of its annotation: {"ge": 0, "lt": 1}."""
    flat = [part for each in metadata for part in (each.metadata if isinstance(each, FieldInfo) else [each])]
    return {name: getattr(each, name) for each in flat for name in _BOUNDS if hasattr(each, name)}


def _describe_bounds(bounds: Mapping[str, Any]) -> str:
    """`above 0`, `0 or more`, `0 to 1`, `at least 0 and below 1`."""
    if sorted(bounds) == ["ge", "le"]:
        return f"{bounds['ge']} to {bounds['le']}"
    if sorted(bounds) == ["ge"]:
        return f"{bounds['ge']} or more"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return " and ".join(f"{words[name]} {bounds[name]}" for name in _BOUNDS if name in bounds)
