"""Every example runs, and prints what it promises; the notebook is the tutorial."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.pages import ROOT, blocks

from coatnet.cli.main import main

EXAMPLES = ROOT / "examples"
NEEDED = {"predict_with_ray.py": "ray", "predict_with_spark.py": "pyspark", "twelve_bands.py": "tifffile"}
PRINTED = {
    "build_a_model.py": "97 x 131: features",
    "in_the_browser.py": "runtime/ort.wasm",
    "own_loop.py": "epoch 3: loss",
    "predict_with_ray.py": "trouser.png: ",
    "predict_with_spark.py": "trouser.png: ",
    "scikit_learn.py": "logistic regression on features of 100 digits: ",
    "train_and_classify.py": "Top-1 accuracy",
    "twelve_bands.py": "bands: top-1 accuracy",
}


def cells() -> list[str]:
    """The code of the notebook, cell by cell."""
    notebook = json.loads((EXAMPLES / "tutorial.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def as_script(cell: str) -> str:
    """A cell as plain Python: lines that begin with `!` are commands, which run in this process."""
    return "\n".join(
        f"assert main({shlex.split(line)[1:]!r}) == 0" if line.startswith("!coatnet ") else line
        for line in cell.splitlines()
    )


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED)
    assert [path.name for path in EXAMPLES.glob("*.ipynb")] == ["tutorial.ipynb"]


@pytest.mark.docs
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name == "in_the_browser.py")) for name in PRINTED]
)
def test_the_example_runs(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-W", pytestconfig.getini("filterwarnings")[0], str(EXAMPLES / name)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    if name == "in_the_browser.py" and " npm " in (said := run.stderr.strip().rpartition("\n")[2]):
        pytest.skip(said)
    assert run.returncode == 0, run.stderr
    assert PRINTED[name].lower() in run.stdout.lower()


def test_the_notebook_has_the_code_of_the_tutorial() -> None:
    page = [block for block in blocks(ROOT / "docs/tutorial.md", "python", "sh") if "make install" not in block.text]
    code = [block.text if block.language == "python" else "!" + block.text.replace("\n", "\n!")[:-1] for block in page]
    missing = [text for text in code if text.strip() not in cells()]
    assert missing == ["!coatnet serve runs/clothes/bundle\n"]  # there as a process that is stopped again


@pytest.mark.docs
@pytest.mark.filterwarnings("default")  # the notebook leaves connections to be closed at its end
@pytest.mark.parametrize(("epochs", "images"), [(1, 40), pytest.param(5, 200, marks=pytest.mark.nightly)])
def test_the_notebook_runs(
    epochs: int, images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    script = "\n".join([*map(as_script, cells()), "server.wait()"])
    assert "'5'" in script and "200) < 200" in script
    script = script.replace("8080", port).replace("'5'", f"'{epochs}'").replace("< 200", f"< {images}")
    program = tmp_path / "bin/coatnet"  # the server is this coatnet, wherever another one is installed
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m coatnet "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "tutorial.ipynb", "exec"), {"main": main, "__name__": "__main__"})
    printed = capfd.readouterr().out
    assert "healthy" in printed and "000.png: " in printed and '"predictions"' in printed
    if epochs == 5:
        assert "000.png: Bag" in printed
