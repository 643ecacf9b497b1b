"""JSON that others wrote, read within bounds and checked by a pydantic model; what is wrong with it is one line.

Work and memory are linear in the size of the file: its size, its depth and the number of its lists and objects are
bounded, and a model stops at the first mistake of a list.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, FailFast, Field, FiniteFloat, ValidationError

from coatnet.errors import UserError, first_line
from coatnet.system.files import read_regular

MAX_DEPTH = 32  # far above what our files have, far below what recursion over the values stands
MAX_CONTAINERS = 2_000_000  # lists and objects; an empty list takes two bytes of a file and 64 of memory
MAX_INTEGER = 2**62

Model = TypeVar("Model", bound=BaseModel)
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Texts = Annotated[list[str], FailFast()]
Numbers = Annotated[list[FiniteFloat], FailFast()]
Counts = Annotated[list[Count], FailFast()]


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError if it cannot be read, is no regular file, too large or not JSON."""
    try:
        data = read_regular(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return parse_json(data, path)


def parse_json(data: bytes | str, where: object) -> Any:
    """The value of a JSON text in UTF-8. Numbers are finite, and the keys of an object differ.

    Args:
        data: the text.
        where: what errors begin with.

    Raises:
        UserError: the text is not JSON, nested more than 32 deep, or has more than 2,000,000 lists and objects.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        if text.count("[") + text.count("{") > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS:,} lists and objects")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise UserError(f"{where}: not JSON that can be read: {reason}") from None
    return value


def validate(model: type[Model], values: Any, where: object) -> Model:
    """Check values by a pydantic model. Raises UserError that begins with `where` and names the first wrong key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    keys = [part for part in first["loc"] if isinstance(part, str)] or ["the whole"]
    match first["type"]:
        case "missing":
            raise UserError(f"{where}: {keys[-1]} is missing")
        case "extra_forbidden":
            inside = "".join(f" in {key}" for key in keys[:-1])
            raise UserError(
                f"{where}: unknown key {short(keys[-1])}{inside}, which this version of coatnet does not read"
            )
        case _:
            expected = first["msg"].replace("Input should be", "it must be")
            raise UserError(f"{where}: {keys[-1]} is {short(first['input'])}; {expected}")


def read_json_object(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file. Raises UserError as `read_json`, or if it holds anything else."""
    return require_object(read_json(path), path)


def require_object(value: Any, where: object) -> Mapping[str, Any]:
    """The value, if it is an object. Raises UserError if it is anything else."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object but {short(value)}")
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one: `{"optimizer": {"learning_rate": 1}}` as `{"optimizer.learning_rate": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {short(twice)} occurs twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        parts = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [part for each in parts for part in each if isinstance(part, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")
