"""What a run asks of its images: classes that stay, labels of the right kind, and a place apart from its own."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tests.training.trainers import trainer_for

import coatnet
from coatnet.errors import UserError
from coatnet.training.config import Recipe
from coatnet.training.defaults import resolve
from coatnet.training.optimizer import balancing_weights
from coatnet.training.run import train
from coatnet.training.trainer import Trainer

QUIET = Console(quiet=True)
BRIEF = Recipe(model="coatnet-femto-16", epochs=2, batch_size=8, num_workers=0, mixing={"label_smoothing": 0.0})
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def image(path, *names):
    """Noise of 16 x 16 pixels with one stripe in each of the colors."""
    pixels = np.random.default_rng(len(str(path))).integers(0, 60, (16, 16, 3), dtype=np.uint8)
    for place, color in enumerate(COLOURS):
        if color in names:
            pixels[5 * place : 5 * place + 5] = COLOURS[color]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """24 red images and 8 green ones."""
    for index in range(32):
        name = "green" if index % 4 == 3 else "red"
        image(tmp_path / "pictures" / name / f"{index}.png", name)
    return tmp_path / "pictures"


def content_of(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def one_more(folder):
    image(folder / "blue" / "0.png", "blue")


def one_less_and_one_more(folder):
    (folder / "red").rename(folder / "crimson")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_more, r"holds a run on 2 classes, but .*pictures is now with the new blue: undo that"),
        (one_less_and_one_more, r"is now without red and with the new crimson: undo that"),
    ],
)
def test_a_run_is_not_resumed_on_other_classes(change, message, folder, tmp_path):
    recipe = replace(BRIEF, data=str(folder))
    train(recipe, tmp_path / "run", console=QUIET)
    before = content_of(tmp_path / "run")
    change(folder)
    with pytest.raises(UserError, match=message):
        train(replace(recipe, epochs=3), tmp_path / "run", console=QUIET)
    assert content_of(tmp_path / "run") == before


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_images_at_another_place_and_not_with_others(folder, tmp_path):
    link, said = tmp_path / "scratch", io.StringIO()
    link.symlink_to(folder)
    train(replace(BRIEF, data=str(link)), tmp_path / "run", console=QUIET)
    moved = folder.rename(tmp_path / "job2")
    link.unlink()
    link.symlink_to(moved)
    train(replace(BRIEF, data=str(link), epochs=3), tmp_path / "run", console=Console(file=said, width=1000))
    assert f"the images of {folder} are now those of {moved}, with the same names" in said.getvalue()
    train(replace(BRIEF, data=str(moved), epochs=3), tmp_path / "run", console=Console(file=said, width=1000))
    assert "is finished; its bundle is evaluated again" in said.getvalue()

    image(moved / "red" / "99.png", "red")
    train(replace(BRIEF, data=str(moved), epochs=4), tmp_path / "run", console=Console(file=said, width=1000))
    assert f"the images of {moved} are others than when the run began" in said.getvalue()
    again = moved.rename(tmp_path / "job3")
    (again / "red" / "99.png").unlink()
    before = content_of(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"with data .*job2, not .*job3 with other images, .* for training and .* where"
    ):
        train(replace(BRIEF, data=str(again), epochs=5), tmp_path / "run", console=QUIET)
    assert content_of(tmp_path / "run") == before


def test_a_run_is_not_resumed_on_classes_in_another_order(folder, tmp_path):
    recipe = replace(BRIEF, data=str(folder))
    train(recipe, tmp_path / "run", console=QUIET)
    (tmp_path / "run" / "classes.json").write_text(json.dumps(["red", "green"]))
    with pytest.raises(UserError, match="is now in another order"):
        train(replace(recipe, epochs=3), tmp_path / "run", console=QUIET)


def test_a_run_among_its_own_images_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"runs/mine is inside .*pictures: plots written there would be read as images"):
        train(replace(BRIEF, data="."), "runs/mine", console=QUIET)
    assert not (folder / "runs").exists()


def test_a_recipe_without_data_does_not_mean_the_current_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="no data is given: give a folder"):
        train(BRIEF, tmp_path / "run", console=QUIET)


def test_a_url_stays_a_url_and_a_folder_becomes_its_full_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    splits = coatnet.open_dataset("pictures")
    for data, lasting in (("s3://bucket/shards", "s3://bucket/shards"), ("pictures", str(folder))):
        assert resolve(replace(BRIEF, data=data), splits).data == lasting


def test_balanced_by_sampling_every_class_is_shown_equally_often(folder, tmp_path, monkeypatch):
    shown, step = [], Trainer.step

    def watched(self, images, labels, *rest):
        shown.extend(labels.tolist())
        return step(self, images, labels, *rest)

    monkeypatch.setattr(Trainer, "step", watched)
    for balance in ("none", "sampler"):
        shown.clear()
        train(replace(BRIEF, data=str(folder), balance=balance), tmp_path / balance, console=QUIET)
        assert (shown.count(0) == shown.count(1)) == (balance == "sampler")


def test_balanced_by_weights_a_class_counts_inversely_to_its_frequency(folder):
    splits = coatnet.open_dataset(folder)
    images, rare = torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64)
    assert splits.classes[0] == "green"
    losses = []
    for balance in ("none", "weights"):
        trainer = trainer_for(replace(BRIEF, data=str(folder), balance=balance, precision="fp32"), splits)
        losses.append(trainer.step(images, rare)[0])
    weight = float(balancing_weights(splits.training.labels, 2)[0])
    assert weight > 1.5
    assert losses[1] == pytest.approx(weight * losses[0], rel=1e-5)


@pytest.fixture
def tagged(tmp_path):
    """A table of 40 images, with no to three labels each."""
    rng = np.random.default_rng(0)
    with (tmp_path / "tagged.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label"])
        for index in range(40):
            names = [name for name in COLOURS if rng.random() < 0.5]
            image(tmp_path / "tagged" / f"{index}.png", *names)
            table.writerow([f"tagged/{index}.png", "|".join(names)])
    return tmp_path / "tagged.csv"


def test_images_with_several_labels_go_from_a_table_to_a_bundle(tagged, tmp_path):
    recipe = replace(BRIEF, data=str(tagged), balance="weights", epochs=8)
    report = train(recipe, tmp_path / "run", console=QUIET)
    assert 0 < report.figures["mean_average_precision"] <= 1
    bundle = coatnet.load(tmp_path / "run" / "bundle")
    assert bundle.multilabel and set(bundle.classes) == set(COLOURS)
    assert coatnet.evaluate(bundle, tagged) == report
    assert Recipe.from_yaml(tmp_path / "run" / "recipe.yaml").loss == "sigmoid"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance": "sampler"}, r"balance sampler is for one label .* has several: give balance weights"),
        ({"loss": "softmax"}, r"loss softmax is for one label .* has several: give loss sigmoid"),
    ],
)
def test_options_for_single_labels_are_refused_for_several_labels_an_image(changes, message, tagged, tmp_path):
    with pytest.raises(UserError, match=message):
        train(replace(BRIEF, data=str(tagged), **changes), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
