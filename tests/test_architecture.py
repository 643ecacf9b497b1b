"""Rules of the source tree: imports point down, nothing names the machine it was made on."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "coatnet"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Highest first; neighbours in one row do not import each other. "coatnet" is the package's own front door.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("coatnet",),
    ("planning", "server"),
    ("training", "export"),
    ("evaluation",),
    ("inference",),
    ("bundle",),
    ("data", "model"),
    ("system",),
    ("lazy_exports",),
    ("deprecation", "errors", "version"),
)
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
    """The parts of coatnet that a file imports, at its top or inside its functions."""
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
    assert here in RANK, f"{path.name}: {here} has no place in LAYERS"
    for target in imported_layers(path):
        front_door = here == "coatnet"  # it names all the layers, for type checkers only
        assert target == here or front_door or RANK[target] > RANK[here], f"{here} imports {target}: not below it"


def test_the_layers_are_the_folders() -> None:
    assert {layer_of(path) for path in MODULES} == set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_says_what_it_holds(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text)), f"{path.name} does not say what it is"


def test_no_module_is_a_drawer() -> None:
    drawers = {"base", "common", "core", "helpers", "misc", "util", "utils"}
    assert not [path for path in MODULES if drawers.intersection(path.with_suffix("").parts[-2:])]


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
