"""A whole run: what it refuses before the first step, what it says of its start, and what it does not lose."""

import math
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training.trainers import RecordingConsole, trainer_for

from coatnet.data import loader, worker_processes
from coatnet.data.loader import evaluation_batches, seconds_to_read
from coatnet.data.open import open_dataset
from coatnet.data.shards.pack import pack
from coatnet.data.transforms import Preprocessing
from coatnet.errors import NotFinite, UserError
from coatnet.planning.dry_run import dry_run
from coatnet.training.config import Recipe
from coatnet.training.cross_validation import cross_validate
from coatnet.training.defaults import resolve
from coatnet.training.distributed.processes import SINGLE_PROCESS, Processes
from coatnet.training.pace import measure_pace
from coatnet.training.run import train
from coatnet.training.trainer import Trainer

SMALL = {"model": "coatnet-femto-16", "resolution": 8, "channels": 1, "epochs": 1, "batch_size": 16, "num_workers": 0}
BRIEF = Recipe(data="digits", epochs=0.1, batch_size=32)


def write_images(root: Path, number: int = 60, *, mode: str = "L", side: int = 8) -> Path:
    """Dark and light images, as many of each."""
    random = np.random.default_rng(0)
    for index in range(number):
        place = root / ("light" if index % 2 else "dark") / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shape = (side, side) if mode == "L" else (side, side, len(mode))
        pixels = 100 * (index % 2) + random.integers(0, 100, shape)
        Image.fromarray(pixels.astype(np.uint8), mode).save(place)
    return root


def test_images_of_four_channels_have_a_limit_in_minutes(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", mode="RGBA")
    recipe = Recipe(data=str(data), **SMALL | {"channels": 4, "epochs": 50}, max_minutes=0.02)
    console = RecordingConsole()
    train(recipe, tmp_path / "run", console=console)
    assert "of 50 epochs fit into 0.02 minutes" in console.text


def test_a_start_that_learned_from_held_out_images_is_told_and_no_start_for_folds(tmp_path: Path) -> None:
    data, console = write_images(tmp_path / "images"), RecordingConsole()
    train(Recipe(data=str(data), **SMALL, validation_fraction=0.2), tmp_path / "first", console=console)
    after = {"init": str(tmp_path / "first"), "data": str(data), "epochs": 1, "batch_size": 16, "num_workers": 0}
    same = train(Recipe(name="finetune", **after, validation_fraction=0.2), tmp_path / "same", console=console)
    assert "too favorable" not in console.text and not any("too favorable" in note for note in same.notes)
    others = train(Recipe(name="finetune", **after, validation_fraction=0.4), tmp_path / "others", console=console)
    told = "first was trained on images of images and held out others"
    assert told in console.text and told in (tmp_path / "others/report.md").read_text()
    assert any(told in note for note in train(Recipe(**after), tmp_path / "others", console=console).notes)
    assert others.figures["n"] > same.figures["n"]
    with pytest.raises(UserError, match="was trained on images of this name, images, which the folds measure on"):
        cross_validate(Recipe(name="finetune", **after), tmp_path / "folds", 2, console=console)
    assert not (tmp_path / "folds").exists()


def test_a_teacher_that_learned_from_held_out_images_is_told_and_none_for_folds(tmp_path: Path) -> None:
    data, console = write_images(tmp_path / "images"), RecordingConsole()
    train(Recipe(data=str(data), **SMALL), tmp_path / "first", console=console)
    following = Recipe(data=str(data), **SMALL, teacher=str(tmp_path / "first"))
    train(following, tmp_path / "same", console=console)
    assert "too favorable" not in console.text
    report = train(replace(following, validation_fraction=0.4), tmp_path / "others", console=console)
    assert any("first was trained on images of images and held out others" in note for note in report.notes)
    with pytest.raises(UserError, match=r"teacher .*first was trained on images of this name"):
        cross_validate(following, tmp_path / "folds", 2, console=console)


def test_fractions_that_leave_nothing_to_learn_from_are_refused_before_the_training(tmp_path: Path) -> None:
    recipe = Recipe(data=str(write_images(tmp_path / "images")), **SMALL, validation_fraction=0.5, test_fraction=0.5)
    with pytest.raises(UserError, match="test_fraction must be 0 or more and leave images to learn from"):
        train(recipe, tmp_path / "run", console=RecordingConsole())
    assert not (tmp_path / "run").exists()


def test_folds_after_a_run_keep_all_copies_together_and_the_run_as_it_is(tmp_path: Path) -> None:
    data, recipe = write_images(tmp_path / "images"), Recipe(data=str(tmp_path / "images"), **SMALL)
    for number in range(0, 20, 2):
        (data / f"dark/copy{number}.png").write_bytes((data / f"dark/{number}.png").read_bytes())
    train(recipe, tmp_path / "run", console=RecordingConsole())
    parted = Recipe.from_yaml(tmp_path / "run/recipe.yaml").kept_together
    again = cross_validate(recipe, tmp_path / "run", 2, console=RecordingConsole())
    kept = Recipe.from_yaml(tmp_path / "run/folds/1-of-2/recipe.yaml").kept_together
    assert kept is not None and parted is not None and len(kept) == 10 > len(parted)
    assert again.kept_together == parted
    train(again, tmp_path / "run", console=(console := RecordingConsole()))
    assert "is finished" in console.text


def test_folds_that_are_resumed_keep_the_copies_of_the_first(tmp_path: Path, monkeypatch) -> None:
    data, recipe = write_images(tmp_path / "images"), Recipe(data=str(tmp_path / "images"), **SMALL)
    (data / "dark/copy.png").write_bytes((data / "dark/0.png").read_bytes())
    cross_validate(recipe, tmp_path / "run", 2, console=RecordingConsole())
    assert "or from a copy of it" in (tmp_path / "run/folds/report.md").read_text()
    (data / "dark/another.png").write_bytes((data / "dark/2.png").read_bytes())
    monkeypatch.setattr("coatnet.training.defaults.find_copies", lambda *_: pytest.fail("searched again"))
    again = cross_validate(recipe, tmp_path / "run", 2, console=(console := RecordingConsole()))
    assert again.kept_together == (("dark/0.png", "dark/copy.png"),) and "is finished" in console.text


def test_a_finished_run_with_damaged_checkpoints_is_not_trained_over(tmp_path: Path) -> None:
    train(BRIEF, tmp_path / "run", console=RecordingConsole())
    before = {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "checkpoints" not in str(path)
    }
    for path in (tmp_path / "run/checkpoints").rglob("*"):
        if path.is_file() and path.suffix != ".json":
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="holds a trained model, and no checkpoint to go on from"):
        train(replace(BRIEF, epochs=0.2), tmp_path / "run", console=RecordingConsole())
    assert {path: path.read_bytes() for path in before} == before


def test_outputs_that_are_not_finite_are_a_warning_at_an_evaluation(tmp_path: Path) -> None:
    trainer = trainer_for(replace(BRIEF, patience=3))
    said: list[str] = []
    trainer.progress.say = said.append
    trainer.folder.log = lambda record: None
    for parameter in trainer.average.whole().parameters():
        parameter.data.fill_(math.nan)
    trainer.evaluate(SimpleNamespace(stop_requested=lambda: False))
    assert any("is not finite" in line and "training goes on" in line for line in said)
    assert trainer.state.evaluations_since_best == 1 and trainer.state.best == -1.0


def test_the_speed_in_the_log_does_not_count_evaluations() -> None:
    trainer = trainer_for(BRIEF)
    trainer.folder.log = lambda record: None
    before, real = trainer._logged_at, trainer.validation_metrics

    def slowly(sync):
        time.sleep(0.3)
        return real(sync)

    trainer.validation_metrics = slowly
    trainer.evaluate(SimpleNamespace(stop_requested=lambda: False))
    assert trainer._logged_at >= before + 0.3


def test_the_budget_for_steps_that_are_not_finite_holds_while_time_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    splits, real = open_dataset("digits"), Trainer.step

    def step(trainer: Trainer, *batch: torch.Tensor) -> tuple[float, float]:
        if trainer.state.step == 1:
            raise NotFinite("step 1: loss nan")
        return real(trainer, *batch)

    monkeypatch.setattr(Trainer, "step", step)
    for budget in (1, 0):
        recipe = replace(BRIEF, non_finite_budget=budget)
        given = (resolve(recipe, splits), recipe, splits, None, SINGLE_PROCESS, 60.0)
        if budget:
            assert measure_pace(*given).step > 0
        else:
            with pytest.raises(NotFinite):
                measure_pace(*given)


def test_shared_memory_is_that_of_all_processes_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(data=str(write_images(tmp_path / "images")), **SMALL | {"num_workers": 1})
    needed = worker_processes.PREFETCHED_BATCHES * 4 * 16 * 8 * 8  # bytes of one worker
    monkeypatch.setattr(worker_processes, "free_shared_memory", lambda: 2 * needed)
    trainer_for(recipe, processes=Processes(local_world_size=2))
    with pytest.raises(UserError, match="the batches of 3 worker processes take"):
        trainer_for(recipe, processes=Processes(local_world_size=3))


def test_an_evaluation_has_the_workers_that_shared_memory_has_room_for(tmp_path: Path, monkeypatch) -> None:
    images = open_dataset(write_images(tmp_path / "images")).training
    given = {"preprocessing": Preprocessing(resolution=8, mean=(0.5,), std=(0.2,)), "batch_size": 8}
    started = []

    def record(batches, numbers, num_workers, **given):
        started.append(num_workers)
        return loader._from_thread(batches, numbers)

    monkeypatch.setattr(loader, "load_in_workers", record)
    needed = worker_processes.PREFETCHED_BATCHES * 4 * 8 * 8 * 8
    for room, workers in ((0.5 * needed, []), (1.5 * needed, [1])):
        started.clear()
        monkeypatch.setattr(worker_processes, "free_shared_memory", lambda room=room: room)
        monkeypatch.setattr(loader, "num_cores", lambda: 4)
        batches = evaluation_batches(images, num_workers=None, bad_images=loader.BadImages(len(images)), **given)
        with closing(batches):
            assert sum(len(each[1]) for each in batches) == len(images)
        assert started == workers


def test_the_images_of_shards_are_timed_as_a_training_reads_them(tmp_path: Path, monkeypatch) -> None:
    pack(write_images(tmp_path / "images", 200), tmp_path / "packed")
    images, read = open_dataset(tmp_path / "packed").training, list[int]()
    real = type(images).read
    monkeypatch.setattr(type(images), "read", lambda self, index: read.append(index) or real(self, index))
    assert seconds_to_read(images) > 0
    assert read == list(range(loader.TIMED_IMAGES))


def test_a_balanced_order_of_shards_that_are_not_kept_decoded_is_told_to_be_slow(tmp_path: Path) -> None:
    pack(write_images(tmp_path / "images"), tmp_path / "packed")
    for balance, cache, is_told in (("sampler", "none", True), ("weights", "none", False), ("sampler", "disk", False)):
        recipe = Recipe(data=str(tmp_path / "packed"), **SMALL | {"epochs": 0.1}, balance=balance, cache=cache)
        train(recipe, tmp_path / f"{balance}-{cache}", console=(console := RecordingConsole()))
        assert ("reads every block once" in console.text) == is_told


def test_a_dry_run_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="dry_run is for one process: give it without torchrun"):
        dry_run(BRIEF)
