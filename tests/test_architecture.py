"""Rules of the source tree: imports point down, files are few and named in the words of the field."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "coatnet"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_FILES = 217

DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def read_layers(page: str) -> tuple[tuple[str, ...], ...]:
    """The layers of the package, highest first, as the page on the design lists them: one layer a line."""
    block = re.search(r"```text\n(__main__\n.*?)```", page, re.DOTALL)
    assert block is not None, "docs/design.md has no block of layers that begins with __main__"
    return tuple(tuple(re.findall(r"\w+", line.partition("#")[0])) for line in block[1].splitlines())


LAYERS = read_layers(DESIGN)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

NOT_OURS = {
    ".git",
    ".venv",
    ".venv-oldest",
    ".hypothesis",
    ".pytest_cache",
    ".ruff_cache",
    "__pycache__",
    "runs",
    "build",
    "dist",
}
TEXT = {
    ".cff",
    ".cfg",
    ".csv",
    ".html",
    ".ini",
    ".json",
    ".md",
    ".py",
    ".sh",
    ".toml",
    ".tsv",
    ".txt",
    ".yaml",
    ".yml",
}
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|tmp|opt|mnt|scratch)/\w")
REGISTRY = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|npmjs\.|index[-_]url|https?://\S+/simple\b"
)


def layer_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "coatnet" if first == "__init__" else first


def imported_layers(path: Path) -> Iterator[str]:
    """The folders and top-level modules of coatnet that a file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write the import in full, from coatnet..."
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "coatnet" and rest != "__version__":
                first = rest.partition(".")[0]
                yield (first if (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file() else "coatnet")


def text_files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        inside = path.relative_to(ROOT).parts
        ours = not NOT_OURS.intersection(inside) and path.is_file()
        if ours and (path.suffix in TEXT or path.name in {"Makefile", "LICENSE", ".gitignore", "run"}):
            yield path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = layer_of(path)
    assert here in RANK, f"{path.name}: {here} is missing in the layers of docs/design.md"
    for target in imported_layers(path):
        public_names = here == "coatnet"  # it imports all the layers, for type checkers only
        assert target == here or public_names or RANK[target] > RANK[here], f"{here} imports {target}: not below it"


def test_the_layers_are_the_folders() -> None:
    assert {layer_of(path) for path in MODULES} == set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_begins_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.name} has no docstring"


def module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, those for type checkers left out."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield statement
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            yield from module_level(statement.orelse)
        else:
            for part in ("body", "orelse", "finalbody", "handlers"):
                yield from module_level(getattr(statement, part, []))


def imports_of_modules() -> dict[str, set[str]]:
    """For each module of coatnet, the modules of coatnet that it imports at its top."""
    names = {".".join(path.relative_to(ROOT / "src").with_suffix("").parts): path for path in MODULES}
    modules = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for statement in module_level(ast.parse(path.read_text(encoding="utf-8")).body):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    inner = f"{statement.module}.{alias.name}"
                    graph[module] |= {inner if inner in modules else str(statement.module)} & modules.keys()
            elif isinstance(statement, ast.Import):
                graph[module] |= {alias.name for alias in statement.names} & modules.keys()
    return graph


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(imports_of_modules()).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' > '.join(reversed(error.args[1]))}")


# Names of before the redrawing of 2026, from which a reader of this field guesses nothing.
OLD_NAME = re.compile(
    r"agreement|alone|arguments|assembly|bad_images|behind|bodies|checked_json|choice|deploy|exporting|finished|fitting|"
    r"front|guard|interface|kept(_\w+)?|leads|learner|live_memory|look(ing)?|measuring|named|naming|networks|once|order|others|"
    r"paths|pictures|places|port|position|probing|publish|refusals|rows?|running|saver|session|share|sizes|sources|start|"
    r"suggestions|surgery|told|values|verbs|views|visits"
)


def test_no_module_has_an_old_name() -> None:
    assert not [
        path for path in MODULES if any(map(OLD_NAME.fullmatch, path.relative_to(PACKAGE).with_suffix("").parts))
    ]


def test_there_are_not_many_files() -> None:
    assert len(MODULES) <= MAX_FILES, "merge the pieces of one idea, rather than add a file"


def test_no_module_is_a_drawer() -> None:
    drawers = {"base", "common", "core", "helpers", "misc", "util", "utils"}
    assert not [path for path in MODULES if drawers.intersection(path.with_suffix("").parts[-2:])]


def test_text_meets_the_terminal_at_one_place() -> None:
    """`system/terminal.py` escapes control characters; a print or a console elsewhere would pass them on."""
    printing = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == {"system/terminal.py"}


def test_every_folder_of_the_package_is_a_package() -> None:
    for path in MODULES:
        assert (path.parent / "__init__.py").is_file(), f"{path.parent.name} has no __init__.py"


def test_nothing_names_the_machine_or_a_registry() -> None:
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if MACHINE_PATH.search(line) or (path != Path(__file__) and REGISTRY.search(line)):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
