"""Cross-validation measures every image once; splits of a run are recorded, and those of old runs stay."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tests.training.trainers import RecordingConsole

from coatnet.bundle import load
from coatnet.cli.main import main
from coatnet.data.open import open_dataset
from coatnet.data.splits import SplitRule
from coatnet.errors import UserError
from coatnet.evaluation import evaluate
from coatnet.training.config import Recipe
from coatnet.training.cross_validation import cross_validate
from coatnet.training.run import train

RECIPE = {"model": "coatnet-femto-16", "resolution": 8, "channels": 1, "epochs": 1, "batch_size": 16, "num_workers": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 dark and 30 light images; of one there are eight copies more."""
    root = tmp_path / "images"
    for number in range(60):
        place = root / ("light" if number % 2 else "dark")
        place.mkdir(parents=True, exist_ok=True)
        pixels = 100 * (number % 2) + np.random.default_rng(number).integers(0, 100, (8, 8))
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    for number in range(8):
        (root / f"dark/copy{number}.png").write_bytes((root / "dark/0.png").read_bytes())
    return root


def held_out(run: Path, data: Path) -> set[str]:
    """The validation images of the bundle of a run."""
    recipe = load(run / "bundle").record["recipe"]
    splits = open_dataset(data, rule=SplitRule.of(recipe))
    return {splits.validation.describe(index) for index in range(len(splits.validation))}


@pytest.mark.slow
def test_folds_are_trained_and_measured_together_before_the_model(folder: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    options = [part for name, value in RECIPE.items() for part in (f"--{name}", str(value))]
    arguments = ["train", "--data", str(folder), "--out", str(run), "--folds", "2", *options]
    assert main(arguments) == 0
    found = json.loads((run / "folds/report.json").read_text())
    assert found["figures"]["n"] == 68 and found["headline"].startswith("2-fold cross-validation: top-1 accuracy ")
    folds = [held_out(run / f"folds/{number}-of-2", folder) for number in (1, 2)]
    assert not folds[0] & folds[1] and len(folds[0] | folds[1]) == 68
    copies = {"dark/0.png", *(f"dark/copy{number}.png" for number in range(8))}
    assert {len(copies & fold) for fold in folds} == {0, 9}
    assert not list(run.glob("folds/*/test"))
    correct = sum(round(fold["figures"]["top1"] * fold["figures"]["n"]) for fold in found["folds"])
    assert found["figures"]["top1"] == pytest.approx(correct / 68)
    # Probabilities as the reports of the folds have them: calibrated without the image that they are of.
    loss = sum(fold["figures"]["nll"] * fold["figures"]["n"] for fold in found["folds"])
    assert found["figures"]["nll"] == pytest.approx(loss / 68)
    shown = capsys.readouterr().out
    assert "2-fold cross-validation" in shown and "2-fold cross-validation" in (run / "report.md").read_text()
    assert (run / "bundle").is_dir() and len(copies & held_out(run, folder)) in (0, 9)
    assert "| light | 30 |" in (run / "folds/report.md").read_text()
    assert main(arguments) == 0  # the same command, once all of it is done
    assert "is finished" in capsys.readouterr().err


@pytest.mark.slow
def test_the_recipe_names_what_was_kept_together_and_old_runs_keep_their_split(folder: Path, tmp_path: Path) -> None:
    console = RecordingConsole()
    train(Recipe(data=str(folder), validation_fraction=0.3, **RECIPE), tmp_path / "new", console=console)
    recipe = yaml.safe_load((tmp_path / "new/recipe.yaml").read_text())
    (group,) = recipe["kept_together"]
    copies = {"dark/0.png", *(f"dark/copy{number}.png" for number in range(8))}
    assert set(group) == copies and len(copies & held_out(tmp_path / "new", folder)) in (0, 9)
    assert "copies and near copies on one side of the split: 1 group" in console.text
    assert "images to measure on: a figure of 80 %" in console.text and "--folds 5 measures on all 68" in console.text
    assert evaluate(tmp_path / "new/bundle", folder).figures["n"] == len(held_out(tmp_path / "new", folder))

    old = Recipe(data=str(folder), validation_fraction=0.3, kept_together=(), **RECIPE)
    train(old, tmp_path / "old", console=RecordingConsole())
    file = tmp_path / "old/recipe.yaml"
    without = [
        line for line in file.read_text().splitlines() if not line.startswith(("kept_together", "fold", "test_f"))
    ]
    file.write_text("\n".join(without))
    before = open_dataset(folder, validation_fraction=0.3)
    again = Recipe(data=str(folder), validation_fraction=0.3, **{**RECIPE, "epochs": 2})
    train(again, tmp_path / "old", console=(console := RecordingConsole()))
    assert "resuming" in console.text
    assert held_out(tmp_path / "old", folder) == {
        before.validation.describe(index) for index in range(len(before.validation))
    }


def test_the_test_split_is_measured_once_at_the_end(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(data=str(folder), test_fraction=0.3, validation_fraction=0.2, **RECIPE)
    report = train(recipe, tmp_path / "run", console=RecordingConsole())
    tested = json.loads((tmp_path / "run/test/report.json").read_text())
    rule = SplitRule.of(load(tmp_path / "run/bundle").record["recipe"])
    splits = open_dataset(folder, rule=rule)
    assert tested["split"] == "test" and tested["figures"]["n"] == len(splits.test)
    assert any(note.startswith(f"Test split, measured once: {tested['headline']}") for note in report.notes)
    again = evaluate(tmp_path / "run/bundle", folder, split="test")
    assert again.figures == tested["figures"]


def test_what_cannot_be_cross_validated_is_refused_before_any_training(folder: Path, tmp_path: Path) -> None:
    for data, folds, message in (
        (str(folder), 1, "folds is 1; it must be 2 to 100"),
        (str(folder), 40, "68 images are too few for 40 folds"),
        ("fashion-mnist-small", 3, "is divided already"),
    ):
        with pytest.raises(UserError, match=message):
            cross_validate(Recipe(data=data, **RECIPE), tmp_path / "run", folds, console=RecordingConsole())
    assert not (tmp_path / "run").exists()


def test_a_test_split_that_cannot_be_read_is_told_before_the_training(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("dark", "light"):
            shutil.copytree(folder / label, tmp_path / "split" / split / label)
    for label in ("dark", "light"):
        (tmp_path / "split/test" / label).mkdir(parents=True)
        (tmp_path / "split/test" / label / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the images for the test can be used"):
        train(Recipe(data=str(tmp_path / "split"), **RECIPE), tmp_path / "run", console=RecordingConsole())
    assert not (tmp_path / "run").exists()
