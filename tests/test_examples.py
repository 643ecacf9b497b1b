"""Every example runs, and prints what it promises; the notebook is the tutorial."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.pages import ROOT, blocks

EXAMPLES = ROOT / "examples"
PRINTED = {
    "build_a_model.py": "97 x 131: features",
    "own_loop.py": "epoch 3: loss",
    "train_and_classify.py": "Top-1 accuracy",
}


def cells() -> list[str]:
    """The code of the notebook, cell by cell."""
    notebook = json.loads((EXAMPLES / "tutorial.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def as_script(cell: str) -> str:
    """A cell as plain Python: lines that begin with `!` are commands of the shell."""
    return "\n".join(
        f"subprocess.run({line[1:]!r}, shell=True, check=True)" if line.startswith("!") else line
        for line in cell.splitlines()
    )


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED)
    assert [path.name for path in EXAMPLES.glob("*.ipynb")] == ["tutorial.ipynb"]


@pytest.mark.parametrize("name", PRINTED)
def test_the_example_runs(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-W", pytestconfig.getini("filterwarnings")[0], str(EXAMPLES / name)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert PRINTED[name].lower() in run.stdout.lower()


def test_the_notebook_has_the_code_of_the_tutorial() -> None:
    page = [block for block in blocks(ROOT / "docs/tutorial.md", "python", "sh") if "make install" not in block.text]
    code = [block.text if block.language == "python" else "!" + block.text.replace("\n", "\n!")[:-1] for block in page]
    missing = [text for text in code if text.strip() not in cells()]
    assert missing == ["!coatnet serve runs/clothes/bundle\n"]  # there as a process that is stopped again


@pytest.mark.parametrize("epochs", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_the_notebook_runs(epochs: int, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    script = "\n".join(["import subprocess", *map(as_script, cells())]).replace("8080", port)
    assert "--epochs 5" in script
    program = tmp_path / "bin/coatnet"  # this coatnet, wherever another one is installed
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m coatnet "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COATNET_CACHE_DIR": str(tmp_path / "cache")}
    (tmp_path / "tutorial.py").write_text(script.replace("--epochs 5", f"--epochs {epochs}"), encoding="utf-8")
    run = subprocess.run([sys.executable, "tutorial.py"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "healthy" in run.stdout and "000.png: " in run.stdout and '"predictions"' in run.stdout
    if epochs == 5:
        assert "000.png: Bag" in run.stdout
