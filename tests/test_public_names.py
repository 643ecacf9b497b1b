"""The names that `import coatnet` offers, that they are imported when they are used, and what they are."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import coatnet

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [
    "coatnet",
    *(f"coatnet.{name}" for name in ("bundle", "data", "evaluation", "export", "inference", "model", "planning")),
]
INTEGRATIONS = [f"coatnet.integrations.{name}" for name in ("ray", "sklearn", "spark")]
PUBLIC = [
    "Bundle",
    "Explanation",
    "Interrupted",
    "Prediction",
    "Predictor",
    "Recipe",
    "Report",
    "TrainingConfig",
    "UserError",
    "calibrate",
    "complexity",
    "create_model",
    "evaluate",
    "extend",
    "extract_features",
    "find_variant",
    "freeze",
    "from_coatnet_pytorch",
    "inspect",
    "list_variants",
    "load",
    "named_recipe",
    "open_dataset",
    "probe",
    "soup",
    "train",
    "write_report",
]


def test_the_public_names_of_coatnet() -> None:
    assert coatnet.__all__ == dir(coatnet) == PUBLIC == sorted(PUBLIC)


@pytest.mark.parametrize("package", [import_module(name) for name in PACKAGES], ids=PACKAGES)
def test_a_public_name_is_the_one_that_type_checkers_see(package: ModuleType) -> None:
    assert package.__file__ is not None
    imports = [
        node for node in ast.walk(ast.parse(Path(package.__file__).read_text())) if isinstance(node, ast.ImportFrom)
    ]
    homes = {
        alias.asname: node.module
        for node in imports
        for alias in node.names
        if alias.asname not in (None, "__version__")
    }
    assert package.__all__ == sorted(homes)
    for name, home in homes.items():
        value = getattr(package, name)
        assert home is not None and value is getattr(import_module(home), name)
        assert value.__doc__ and (value.__module__ == home), f"{name} comes from {value.__module__}"


@pytest.mark.parametrize(
    "path", [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/*.py")], ids=lambda path: path.name
)
def test_guides_and_examples_import_public_names_only(path: Path) -> None:
    text = re.sub(r"^Before:\n+```.*?```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for module, names in re.findall(r"^ *from (coatnet[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
        assert module in (*PACKAGES, *INTEGRATIONS), f"{path.name}: from {module} import {names}"
        for name in names.split(", "):
            assert name.partition(" as ")[0] in import_module(module).__all__, f"{path.name}: {name}"


@pytest.mark.parametrize(("name", "answer"), [("creat_model", "did you mean 'create_model'"), ("x", "it has Bundle, ")])
def test_the_error_for_a_wrong_name_lists_the_right_ones(name: str, answer: str) -> None:
    with pytest.raises(AttributeError, match=re.escape(answer)):
        getattr(coatnet, name)


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a statement."""
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_does_not_import_torch() -> None:
    packages = "import coatnet.cli.main, coatnet.data, coatnet.export, coatnet.model"
    assert not {"torch", "numpy", "PIL", "rich"} & modules_after(packages)


def test_the_public_names_do_not_import_optional_packages() -> None:
    loaded = modules_after(f"from coatnet import {', '.join(PUBLIC)}")
    assert "torch" in loaded
    assert not {"matplotlib", "pyarrow", "simplejpeg", "timm", "sklearn"} & loaded
