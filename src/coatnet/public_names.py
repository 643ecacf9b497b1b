"""How public names are offered: imported when they are first used, and old ones for one more release with a warning.

The warning is a FutureWarning, which Python shows to users; it hides a DeprecationWarning outside of `__main__`.
"""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from sys import modules
from typing import Any

from coatnet.errors import nearest


def lazy_exports(
    package: str, homes: Mapping[str, str]
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of a package that does not import its modules itself.

    Args:
        package: its `__name__`.
        homes: by public name, the module that defines it.

    Raises:
        AttributeError: from `__getattr__`, for a name that is not public; it names the nearest one.
    """
    names = sorted(homes)

    def get_attribute(name: str) -> object:
        if name not in homes:
            hint = nearest(name, names) or f"; it has {', '.join(names)}"
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")
        value = getattr(import_module(homes[name]), name)
        setattr(modules[package], name, value)
        return value

    return names, get_attribute, lambda: names


def warn_renamed(old: str, new: str, *, since: str, removed_in: str) -> None:
    """Warn the caller of the function that calls this one, such as the `__getattr__` of a module.

    Args:
        since: the release that has the new name first.
        removed_in: the release that no longer has the old one.
    """
    warnings.warn(renamed_message(old, new, since=since, removed_in=removed_in), FutureWarning, stacklevel=3)


def renamed_message(old: str, new: str, *, since: str, removed_in: str) -> str:
    """The sentence that says that `old` is now `new`."""
    return f"{old} is deprecated since coatnet {since} and will be removed in {removed_in}; use {new}"


def renamed_attribute(old: str, new: str, *, since: str, removed_in: str) -> Any:
    """A property for the old name of an attribute: `old = renamed_attribute("old", "new", ...)` in a class body."""

    def read(instance: object) -> Any:
        name = type(instance).__name__
        warn_renamed(f"{name}.{old}", f"{name}.{new}", since=since, removed_in=removed_in)
        return getattr(instance, new)

    return property(read)
