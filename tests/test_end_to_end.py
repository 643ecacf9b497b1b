"""The main job on real images: a model that learns, is measured, saved, loaded and asked."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import coatnet

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_digits_are_learned_measured_and_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    report = coatnet.train(coatnet.Recipe(data="digits", epochs=6, batch_size=32), run)
    assert report.figures["top1"] > 0.9
    bundle = coatnet.load(run / "bundle")
    assert bundle.classes == tuple("0123456789")
    assert coatnet.evaluate(bundle, "digits").figures == report.figures
    written = json.loads((run / "report.json").read_text())
    assert written["figures"]["top1"] == report.figures["top1"]
    left = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "curves.png", "confusion.png", "report.md", "bundle"} <= left


@pytest.mark.nightly
def test_the_demo_reaches_88_percent_and_knows_three_images(tmp_path: Path) -> None:
    everyones = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = ["make", "demo", f"DEMO={tmp_path / 'run'}"]
    made = subprocess.run(command, cwd=ROOT, env=everyones, check=True, capture_output=True)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["figures"]["top1"] >= 0.88
    for name in ("ankle-boot.png: Ankle boot", "pullover.png: Pullover", "trouser.png: Trouser"):
        assert f"examples/images/{name} " in made.stdout.decode()
