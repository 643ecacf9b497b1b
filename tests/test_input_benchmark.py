"""The benchmark of the input pipeline runs, and compares what it says it compares."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_benchmark_of_the_input_runs_beside_its_peers() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "input.py"), "--smoke"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    rows = re.findall(r"│ (.+?) +│ +([\d,]+) +│ +([\d.]+) +│", ran.stdout)
    names = [name for name, _, _ in rows]
    assert names == ["coatnet, folder", "coatnet, tar shards", "torchvision", "timm", "coatnet, IDX", "torchvision"]
    assert all(float(rate.replace(",", "")) > 0 for _, rate, _ in rows)
    for peers in (rows[:4], rows[4:]):  # the faster peer is 1.00 of itself
        assert max(float(ratio) for name, _, ratio in peers if not name.startswith("coatnet")) == 1.0
