"""Directives that write the reference pages from the code, so that no page repeats what the code says.

- `{public-names} coatnet.data`: the documentation of every name in the folder's `__all__`.
- `{command-help}`: what each command's `--help` prints.
- `{source-tree}`: every file of the package with its first line.
- `{train-options}`: every value of a training configuration, with its meaning, unit and default.
- `{may-change-on-resume}`: the options that may differ when a run is resumed.
"""

import ast
import contextlib
import inspect
import io
import os
import pkgutil
import re
from importlib import import_module
from pathlib import Path

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
        text = StringList(self.markdown(), source=self.env.docname)
        self.state.nested_parse(text, 0, container, match_titles=True)
        return container.children


class PublicNames(Generated):
    """Documents the public names of a folder and of those inside it, except what `coatnet` itself exports."""

    required_arguments = 1

    def markdown(self) -> list[str]:
        folder = self.arguments[0]
        front_door = import_module(FRONT_DOOR)
        lines = [*inspect.cleandoc(import_module(folder).__doc__ or "").splitlines(), ""]
        for package in [FRONT_DOOR] if folder == FRONT_DOOR else packages(folder):
            module = import_module(package)
            for name in sorted(getattr(module, "__all__", ()), key=str.lower):
                found = getattr(module, name)
                if folder != FRONT_DOOR and name in front_door.__all__ and getattr(front_door, name) is found:
                    lines += [f"`{package}.{name}` is {{py:obj}}`coatnet.{name}`.", ""]
                else:
                    lines += ["```{eval-rst}", *directive(package, name, found), "```", ""]
        return lines


def packages(folder: str) -> list[str]:
    """A folder of the package and the folders inside it; a module is itself."""
    inside = pkgutil.walk_packages(getattr(import_module(folder), "__path__", []), f"{folder}.")
    return [folder, *(found.name for found in inside if found.ispkg)]


class CommandHelp(Generated):
    """A section for each command, with its help."""

    def markdown(self) -> list[str]:
        from coatnet.cli.main import COMMANDS, main

        lines = []
        os.environ["COLUMNS"] = "120"
        for command in COMMANDS:
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
                main([command, "--help"])
            lines += [f"### `coatnet {command}`", "", "```text", *output.getvalue().splitlines(), "```", ""]
        return lines


class SourceTree(Generated):
    """A table of the files of each folder, with their first lines."""

    def markdown(self) -> list[str]:
        root = Path(import_module(FRONT_DOOR).__file__).parent
        lines = []
        for folder in sorted({path.parent for path in root.rglob("*.py")}):
            lines += [f"## `{folder.relative_to(root.parent).as_posix()}/`", "", "| file | what it is |", "|---|---|"]
            for path in sorted(folder.glob("*.py")):
                docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                first = docstring.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
                lines.append(f"| `{path.name}` | {first} |")
            lines.append("")
        return lines


class TrainOptions(Generated):
    """A table of the fields of a configuration for each of its sections: meaning, unit, default."""

    def markdown(self) -> list[str]:
        from coatnet.cli.train import describe_option
        from coatnet.system.validated import fields_of
        from coatnet.training.config import MAY_CHANGE, SECTIONS, TrainingConfig, options

        fields = options()
        sections = {"": "What is trained, on what, and for how long."}
        sections |= {name: fields_of(TrainingConfig)[name].description for name in SECTIONS}
        lines = []
        for section, meaning in sections.items():
            lines += [f"## `{section}`" if section else "## The run", "", meaning, ""]
            lines += ["| name | meaning, unit and default | resuming |", "|---|---|---|"]
            for name in (name for name in fields if name.rpartition(".")[0] == section):
                text = describe_option(fields[name]).replace("|", "\\|")
                lines.append(f"| `{name}` | {text} | {'may change' if name in MAY_CHANGE else ''} |")
            lines.append("")
        return lines


class MayChangeOnResume(Generated):
    """The names in `MAY_CHANGE`, as a list."""

    def markdown(self) -> list[str]:
        from coatnet.training.config import MAY_CHANGE

        return [f"- `{name}`" for name in MAY_CHANGE]


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


def readable_signature(
    app: Sphinx, what: str, name: str, found: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write the default of a dataclass field that a function makes as `...`, which Sphinx can parse."""
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("public-names", PublicNames)
    app.add_directive("command-help", CommandHelp)
    app.add_directive("train-options", TrainOptions)
    app.add_directive("source-tree", SourceTree)
    app.add_directive("may-change-on-resume", MayChangeOnResume)
    app.connect("autodoc-process-docstring", plain_to_restructured, priority=400)  # before napoleon, at 500
    app.connect("autodoc-process-signature", readable_signature)
    return {"parallel_read_safe": True}
