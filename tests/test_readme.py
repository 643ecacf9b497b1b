"""What the README says in Python runs, and the family that it shows is the one that is counted."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coatnet.model.complexity import complexity
from coatnet.model.registry import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_make_sets_itself_up_once_and_again_when_what_it_needs_has_changed(target: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))

    def installs() -> bool:
        run = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True)
        return "pip install" in run.stdout

    assert installs()
    installed = tmp_path / ".venv/.installed"
    installed.parent.mkdir()
    installed.touch()
    assert not installs()
    (tmp_path / "constraints.txt").touch()
    os.utime(installed, (2, 2))
    assert installs()


def test_the_lines_of_python_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(32):
        path = tmp_path / "path/to/folder" / ("dark", "bright")[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 128, (16, 16, 3), dtype=np.uint8) + np.uint8(127 * (index % 2))).save(path)
    Image.open(path).save(tmp_path / "holiday.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "accuracy" in run.stdout and "bright" in run.stdout


@pytest.mark.parametrize("row", re.findall(r"^\| (coatnet-\S+ .*) \|$", README, re.MULTILINE))
def test_the_table_of_the_family_holds_what_is_counted(row: str) -> None:
    name, parameters, macs = [cell.split(" (")[0].replace(",", "") for cell in row.split(" | ")][:3]
    counted = complexity(VARIANTS[name], 224)
    assert float(parameters.removesuffix(" M")) == pytest.approx(counted.parameters / 1e6, rel=0.005)
    assert float(macs) == pytest.approx(counted.macs / 1e9, rel=0.005)
