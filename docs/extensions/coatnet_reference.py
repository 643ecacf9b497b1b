"""Directives that write the reference pages from the code, so that no page repeats what the code says.

- `{public-names} coatnet.data`: the documentation of every name in the folder's `__all__`.
"""

import inspect
import re
from importlib import import_module

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FRONT_DOOR = "coatnet"


class Generated(SphinxDirective):
    """A directive whose content is Markdown that `markdown()` writes."""

    def markdown(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        container = nodes.Element()
        container.document = self.state.document
        self.state.nested_parse(StringList(self.markdown(), source=self.env.docname), 0, container)
        return container.children


class PublicNames(Generated):
    """Documents every public name of a package; names that `coatnet` itself exports are documented there only."""

    required_arguments = 1

    def markdown(self) -> list[str]:
        package = self.arguments[0]
        module = import_module(package)
        lines = [*inspect.cleandoc(module.__doc__ or "").splitlines(), ""]
        front = set() if package == FRONT_DOOR else set(import_module(FRONT_DOOR).__all__)
        for name in sorted(module.__all__, key=str.lower):
            found = getattr(module, name)
            if name in front and getattr(import_module(FRONT_DOOR), name) is found:
                continue
            lines += ["```{eval-rst}", *directive(package, name, found), "```", ""]
        return lines


def directive(package: str, name: str, found: object) -> list[str]:
    """The autodoc directive for one public name."""
    if inspect.isclass(found):
        kind = "autoexception" if issubclass(found, BaseException) else "autoclass"
        return [f".. {kind}:: {package}.{name}", "   :members:"]
    if callable(found):
        return [f".. autofunction:: {package}.{name}"]
    return [f".. autodata:: {package}.{name}", "   :no-value:"]


def plain_to_restructured(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Make a docstring, plain text with `code` in backticks, valid reStructuredText."""
    for number, line in enumerate(lines):
        pieces = re.split(r"(`+[^`]+`+)", line)
        for index, piece in enumerate(pieces):
            if index % 2:
                pieces[index] = f"``{piece.strip('`')}``"
            else:
                pieces[index] = re.sub(r"(?<=\w)_(?=\W|$)|[*|]", lambda found: "\\" + found[0], piece)
        lines[number] = "".join(pieces)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-docstring", plain_to_restructured, priority=400)  # before napoleon, at 500
    return {"parallel_read_safe": True}
