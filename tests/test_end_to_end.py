"""The main job on real pictures: a model that learns, is measured, saved, loaded and asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import coatnet

PICTURES = Path(__file__).parents[1] / "examples" / "pictures"


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


@pytest.mark.slow
def test_the_demo_reaches_88_percent_and_knows_three_pictures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coatnet"]
    run = str(tmp_path / "run")
    given = ["--data", "fashion-mnist-small", "--model", "coatnet-femto-64", "--out", run, "--max_minutes", "3.5"]
    subprocess.run([*command, "train", "scratch", *given], check=True)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["figures"]["top1"] >= 0.88
    asked = [*command, "predict", f"{run}/bundle", str(PICTURES), "--top-k", "1", "--json"]
    answers = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
    named = {Path(a["path"]).stem: next(iter(a["probabilities"])) for a in map(json.loads, answers)}
    assert named == {"ankle-boot": "Ankle boot", "pullover": "Pullover", "trouser": "Trouser"}
