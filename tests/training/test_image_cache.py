"""Runs on images that are kept decoded: resumed to the last bit, measured as their bundle is, chosen by the memory."""

import re
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tests.training.configs import SMALL_COLOR_IMAGES
from tests.training.trainers import RecordingConsole, trainer_for

from coatnet.data.open import open_dataset
from coatnet.errors import UserError
from coatnet.evaluation.evaluate import evaluate
from coatnet.training.config import Recipe
from coatnet.training.defaults import resolve_for
from coatnet.training.distributed.processes import SINGLE_PROCESS
from coatnet.training.image_cache import cached_images
from coatnet.training.interruption import Interrupted, Interruption, Synchronization
from coatnet.training.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """36 images of 60 x 40 to 80 x 40 in 2 classes, of which one cannot be read."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(36):
        place = root / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (60 + number % 21, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels // (1 + number % 2)).save(place / f"{number}.png")
    (root / "a" / "0.png").write_bytes(b"no image")
    return root


@pytest.fixture
def recipe(folder):
    return Recipe(
        data=str(folder),
        model="coatnet-femto-16",
        resolution=16,
        epochs=3.0,
        batch_size=8,
        evaluate_every=1.0,
        num_workers=0,
        cache="memory",
        precision="fp32",
        augmentation={"placement": "crop", "crop_scale": [0.3, 1.0], "flip_rate": 0.5, "rand_augment_layers": 0},
        mixing={"mixup_alpha": 0.3},
    )


def weights(out):
    return load_file(out / "bundle" / "model.safetensors")


@pytest.mark.slow
def test_a_resumed_run_has_the_same_pixels_wherever_they_are_kept(recipe, tmp_path, monkeypatch):
    console = RecordingConsole()
    report = train(recipe, tmp_path / "whole", console=console)
    (line,) = re.findall(r"\d+ images kept decoded in memory: .*", console.text)
    assert "35 images" in line and "1 more" in line and "30 (training) and 18 (held-out)" in line
    assert report.bad_images.keys() == {"a/0.png"}
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "cut", console=RecordingConsole(signal.SIGINT))
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    assert train(replace(recipe, cache="disk"), tmp_path / "cut", console=RecordingConsole()) == report
    torch.testing.assert_close(weights(tmp_path / "whole"), weights(tmp_path / "cut"), rtol=0, atol=0)
    with pytest.raises(UserError, match="cache memory, not none"):
        train(replace(recipe, cache="none"), tmp_path / "whole", console=RecordingConsole())


def test_a_resumed_run_does_not_choose_again(recipe, tmp_path, monkeypatch):
    asked = replace(recipe, cache=None, epochs=1.0)
    train(asked, tmp_path / "run", console=RecordingConsole())
    assert Recipe.from_yaml(tmp_path / "run" / "recipe.yaml").cache == "memory"
    monkeypatch.setattr("coatnet.training.defaults.memory_room", lambda: (None, 0))
    for cache in (None, "auto"):
        train(replace(asked, cache=cache), tmp_path / "run", console=RecordingConsole())
    train(asked, tmp_path / "other", console=RecordingConsole())
    stored = tmp_path / "other" / "recipe.yaml"
    assert Recipe.from_yaml(stored).cache == "none"
    stored.write_text(stored.read_text().replace("cache: none\n", ""))  # as earlier releases wrote it
    monkeypatch.undo()
    train(asked, tmp_path / "other", console=RecordingConsole())


def test_an_evaluation_on_the_way_is_that_of_the_bundle(recipe):
    splits = open_dataset(recipe.data)
    trainer = trainer_for(recipe, splits)
    with cached_images(trainer.config, splits) as (trainer.images, _), Interruption() as interruption:
        assert trainer.images.validation.kept.all()
        metrics = trainer.validation_metrics(Synchronization(SINGLE_PROCESS, interruption))
    assert metrics is not None and metrics.compute() == evaluate(trainer.bundle(), splits).figures


def test_reading_the_files_again_is_part_of_the_end_of_a_run(recipe, monkeypatch):
    """Evaluations on the way take the images from memory, the one at the end from their files."""
    splits = open_dataset(recipe.data)
    read = splits.validation.read

    def slowly(index):
        time.sleep(0.02)
        return read(index)

    monkeypatch.setattr(splits.validation, "read", slowly)
    trainer = trainer_for(recipe, splits)
    assert trainer.reading_seconds() == 0.0
    assert trainer.duration.num_other_final_images == len(splits.training)
    with cached_images(trainer.config, splits) as (trainer.images, _):
        assert 0.02 <= trainer.reading_seconds() < 2.0


def test_a_quiet_run_shows_no_bar_of_decoding(recipe, tmp_path, capfd):
    train(recipe, tmp_path / "run", console=Console(quiet=True))
    assert capfd.readouterr().err == ""


def test_images_in_memory_are_not_kept_again():
    splits = open_dataset("digits")
    trainer = trainer_for(Recipe(data="digits", cache="memory"), splits)
    with cached_images(trainer.config, splits) as (images, line):
        assert images is splits and line == ""


@pytest.mark.parametrize(("room", "cache"), [(0, "none"), (12_000_000, "none"), (13_000_000, "memory")])
def test_memory_is_chosen_where_all_images_have_room(room, cache):
    """1,000 images of 64 x 64 pixels in color take 12.3 MB."""
    facts = replace(SMALL_COLOR_IMAGES, side=64, shorter_side=64, largest_side=64, cache_room=room)
    assert resolve_for(Recipe(data="x", cache="auto"), facts).cache == cache
    assert resolve_for(Recipe(data="x", cache="disk"), facts).cache == "disk"
