"""What `import coatnet` offers, and what it costs."""

import subprocess
import sys
from importlib import import_module

import coatnet

PUBLIC = ["Predictor", "Recipe", "create_model", "evaluate", "list_variants", "load", "open_dataset", "train"]


def test_the_public_names_are_these() -> None:
    assert coatnet.__all__ == PUBLIC == sorted(PUBLIC)
    assert [name for name in dir(coatnet) if not name.startswith("_")] == PUBLIC


def test_a_public_name_is_the_object_of_its_home() -> None:
    for name, home in coatnet._HOMES.items():
        assert getattr(coatnet, name) is getattr(import_module(home), name)


def test_a_wrong_name_is_answered_with_the_right_ones() -> None:
    try:
        coatnet.creat_model  # noqa: B018
    except AttributeError as error:
        assert "create_model" in str(error)
    else:
        raise AssertionError("creat_model was found")


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a statement."""
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_does_not_import_torch() -> None:
    assert not {"torch", "numpy", "PIL", "rich"} & modules_after("import coatnet, coatnet.cli.main")


def test_the_public_names_do_not_draw_in_what_only_some_need() -> None:
    loaded = modules_after(f"from coatnet import {', '.join(PUBLIC)}")
    assert "torch" in loaded
    assert not {"matplotlib", "pyarrow", "simplejpeg", "timm", "sklearn"} & loaded
