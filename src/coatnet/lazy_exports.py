"""Public names of a package that are imported when they are first used."""

from collections.abc import Callable, Mapping
from importlib import import_module
from sys import modules

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
