"""Every example runs, and says what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAYS = {
    "build_a_model.py": "97 x 131: features",
    "own_loop.py": "epoch 3: loss",
    "train_and_classify.py": "Top-1 accuracy",
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    surroundings = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=surroundings)
    assert run.returncode == 0, run.stderr
    assert SAYS[name].lower() in run.stdout.lower()
