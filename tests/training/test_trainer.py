"""A run: resumable to the last bit, repeatable from its recipe, and careful with folders, signals and NaN."""

import contextlib
import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.training.trainers import RecordingConsole, trainer_for

import coatnet
from coatnet.data.open import open_dataset
from coatnet.errors import UserError
from coatnet.model.layers import StochasticDepth
from coatnet.system.hardware import num_cores
from coatnet.training import pace, trainer
from coatnet.training.checkpoint import load_checkpoint, published
from coatnet.training.config import Recipe
from coatnet.training.defaults import resolve
from coatnet.training.distributed.parallelize import compile_in_training
from coatnet.training.distributed.processes import SINGLE_PROCESS, Processes
from coatnet.training.interruption import Interrupted
from coatnet.training.run import train
from coatnet.training.run_folder import RunFolder
from coatnet.training.trainer import Trainer

# Everything that could make a difference between two runs is switched on.
EVERYTHING = Recipe(
    data="digits",
    epochs=0.3,
    batch_size=32,
    micro_batch_size=20,
    evaluate_every=0.1,
    stochastic_depth=0.3,
    ema_decay=0.9,
    mixing={"mixup_alpha": 0.8, "cutmix_alpha": 0.8},
    augmentation={"shift": 1, "flip_rate": 0.5, "erasing_rate": 0.3},
)
BRIEF = Recipe(data="digits", epochs=0.1, batch_size=32)


def test_stochastic_depth_rises_to_that_of_the_recipe():
    trained = trainer_for(replace(BRIEF, stochastic_depth=0.5))
    rates = [block.rate for block in trained.model.modules() if isinstance(block, StochasticDepth)]
    assert rates[0] == 0.0 and rates[-1] == 0.5 and rates == sorted(rates)


def last_tensors(out):
    return load_checkpoint(published(out / "checkpoints")[-1]).tensors


def log(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in records]


def assert_same_run(one, other):
    assert log(one) == log(other)
    torch.testing.assert_close(last_tensors(one), last_tensors(other), rtol=0, atol=0)
    weights = [load_file(out / "bundle" / "model.safetensors") for out in (one, other)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train(EVERYTHING, out, console=RecordingConsole())


@pytest.mark.slow
def test_the_last_held_out_loss_in_the_log_is_that_of_the_network_as_all_before(whole):
    out, report = whole
    last, own = log(out)[-1], coatnet.evaluate(coatnet.load(out / "bundle").uncalibrated(), "digits").figures
    for name in ("nll", "brier", "calibration_error"):
        assert last[name] == report.reliability.network[name] == pytest.approx(own[name], rel=1e-4)
        assert last[name] != report.figures[name] == coatnet.evaluate(out, "digits").figures[name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resumed_run_equals_uninterrupted_run(number, whole, tmp_path, monkeypatch):
    out, report = whole
    console = RecordingConsole(number)
    with pytest.raises(Interrupted) as stopped:
        train(EVERYTHING, tmp_path / "cut", console=console)
    assert stopped.value.code == 128 + number
    assert "the same command resumes" in console.text
    assert 0 < log(tmp_path / "cut")[-1]["step"] < log(out)[-1]["step"]
    assert train(EVERYTHING, tmp_path / "cut", console=console) == report
    assert_same_run(out, tmp_path / "cut")


@pytest.mark.slow
def test_a_run_interrupted_between_two_log_lines_writes_the_same_log(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "LOGS_PER_RUN", 2)
    train(EVERYTHING, tmp_path / "whole", console=RecordingConsole())
    with pytest.raises(Interrupted):
        train(EVERYTHING, tmp_path / "cut", console=RecordingConsole(signal.SIGINT))
    train(EVERYTHING, tmp_path / "cut", console=RecordingConsole())
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_the_first_speed_after_a_resumption_counts_the_steps_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "LOGS_PER_RUN", 10**6)
    splits = open_dataset(BRIEF.data)
    first, second = (Trainer(resolve(BRIEF, splits), splits, RunFolder(tmp_path, BRIEF)) for _ in range(2))
    first.state.step, first.state.since_log = 3, 50
    first.start_saving(first.checkpoint_name)
    first.writer.finish()
    second.resume(time.monotonic())
    logged = []
    second.log = logged.append
    with closing(second.batches()) as batches:
        batch = next(batches)
        began = time.monotonic()
        second.step(*batch)
        ended = time.monotonic()
        second.log_step()
    assert second.state.step == 4 and 0 < logged[0]["images_per_second"] <= round(32 / (ended - began), 1)


@pytest.mark.parametrize(("others", "expected"), [([True], "bf16 on cpu"), ([False], "fp32 on cpu")])
def test_processes_compute_in_bf16_where_that_is_faster_for_all_of_them(others, expected, monkeypatch):
    monkeypatch.setattr(trainer, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(Processes, "gather", lambda self, value, *, slow=False: [value, *others])
    assert expected in trainer_for(replace(BRIEF, precision="auto")).describe()


def test_another_precision_than_before_is_said_on_resumption(tmp_path, monkeypatch):
    recipe, splits = replace(BRIEF, precision="auto"), open_dataset(BRIEF.data)
    monkeypatch.setattr(trainer, "multiplies_bf16", lambda device: True)
    first, second = (Trainer(resolve(recipe, splits), splits, RunFolder(tmp_path, recipe)) for _ in range(2))
    monkeypatch.setattr(trainer, "multiplies_bf16", lambda device: False)
    third = Trainer(resolve(recipe, splits), splits, RunFolder(tmp_path, recipe))
    first.start_saving(first.checkpoint_name)
    first.writer.finish()
    for resumed, words in ((second, []), (third, ["warning: precision auto is fp32 here, and was bf16"])):
        said = []
        resumed.progress.say = said.append
        resumed.resume(time.monotonic())
        assert [line[:50] for line in said if line.startswith("warning")] == words
    assert third.bundle().record["training"]["precision"] == "fp32"


def test_patience_that_is_added_on_resumption_begins_there(tmp_path):
    splits = open_dataset(BRIEF.data)
    first, second = (
        Trainer(resolve(recipe, splits), splits, RunFolder(tmp_path, recipe))
        for recipe in (BRIEF, replace(BRIEF, patience=2))
    )
    first.state.step, first.state.best, first.state.evaluations_since_best = 3, 0.9, 5
    first.start_saving(first.checkpoint_name)
    first.writer.finish()
    second.resume(time.monotonic())
    assert (second.state.step, second.state.best, second.state.evaluations_since_best) == (3, -1.0, 0)


def evaluating(folder: Path, recipe: Recipe, *scores: float) -> Trainer:
    """A trainer whose evaluations have these figures."""
    splits, left = open_dataset(recipe.data), list(scores)
    place = RunFolder(folder, recipe)
    made = Trainer(place.check_config(resolve(recipe, splits), splits.classes, splits.content), splits, place)
    place.start()
    made.validation_metrics = lambda _: SimpleNamespace(compute=lambda: {"top1": left.pop(0)}, multilabel=False)
    return made


def test_the_best_weights_are_those_of_the_best_evaluation_after_one_without_patience(tmp_path):
    patient = replace(BRIEF, patience=2)
    for step, (recipe, score, has_best) in enumerate(((patient, 0.8, True), (BRIEF, 0.9, False)), start=1):
        each = evaluating(tmp_path, recipe, score)
        each.resume(time.monotonic())
        each.state.step = step
        each.evaluate(None)
        each.save()
        each.folder.release()
        assert (tmp_path / "checkpoints/best").exists() == has_best
    last = evaluating(tmp_path, patient)
    last.resume(time.monotonic())
    assert last.state.best == -1.0  # so the next evaluation is saved


def test_best_weights_that_could_not_be_saved_are_tried_again(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("No space left on device")

    each = evaluating(tmp_path, replace(BRIEF, patience=9), 0.7, 0.9, 0.8)
    each.evaluate(None)
    with monkeypatch.context() as full:
        full.setattr(Trainer, "start_saving", refuse)
        each.evaluate(None)
    assert each.state.best == 0.7
    each.evaluate(None)
    assert each.state.best == 0.8 and each.state.evaluations_since_best == 0


def test_evaluations_before_full_size_do_not_count_for_patience(tmp_path):
    resizing = {"initial_scale": 0.5, "delay_fraction": 0.5, "finetune_fraction": 0.5}
    recipe = replace(BRIEF, data="fashion-mnist-small", resolution=32, patience=2, progressive_resizing=resizing)
    each = evaluating(tmp_path, recipe, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5)
    for part, counted in ((0.0, 0), (0.2, 0), (0.4, 0), (0.6, 1), (0.8, 2)):
        each.state.step = round(part * each.duration.total_steps)
        each.evaluate(None)
        assert each.state.evaluations_since_best == counted and each.out_of_patience == (counted == 2)


def test_processes_of_unequal_shares_plan_the_same_epochs(tmp_path, monkeypatch):
    """What one process measures counts for all, or they would wait for each other in different places."""
    recipe = replace(BRIEF, epochs=50, max_minutes=1)
    splits, given = open_dataset(recipe.data), []
    processes = SimpleNamespace(broadcast=lambda value: given.append(value) or value, collective=contextlib.nullcontext)
    monkeypatch.setattr(pace, "measure_pace", lambda *_: pace.Pace(1.0, 2.0))
    config = resolve(recipe, splits)
    found = pace.resolve_within_limit(
        config, recipe, splits, None, processes, SimpleNamespace(say=lambda _: None), time.monotonic()
    )
    assert pace.Pace(1.0, 2.0) in given and config.cache in given and found.ema_decay < config.ema_decay


def test_evaluations_on_the_way_take_no_more_images_at_once_than_a_pass(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(trainer, "infer", lambda *_, batch_size, **__: taken.append(batch_size) or (_ for _ in ()))
    for batch_size, micro in ((1024, 8), (1024, 128), (32, 32)):
        recipe = replace(BRIEF, batch_size=batch_size, micro_batch_size=micro)
        with contextlib.suppress(ValueError):  # of no image
            trainer_for(recipe).validation_metrics(SimpleNamespace(stop_requested=lambda: False))
    assert taken == [32, 128, 64]


def test_the_first_statistics_do_not_depend_on_what_was_drawn_before():
    recipe = replace(BRIEF, stochastic_depth=0.5)
    found = []
    for draws in (0, 1):
        each = trainer_for(recipe)
        with closing(each.batches()) as batches:
            batch = next(batches)
        torch.rand(draws)  # a loader with worker processes draws a seed for them
        each.prepare_batch(*batch)
        found.append(each.model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.slow
def test_the_recipe_of_a_run_repeats_it(whole, tmp_path):
    out, report = whole
    assert train(Recipe.from_yaml(out / "recipe.yaml"), tmp_path / "again", console=RecordingConsole()) == report
    assert_same_run(out, tmp_path / "again")


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_result(whole, tmp_path):
    """`kill -9` twice, with a checkpoint after every step, so that many kills fall into a save."""
    out, _ = whole
    recipe = replace(EVERYTHING, checkpoint_every_minutes=1e-9)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    program = (
        "import sys, torch\n"
        "from coatnet import Recipe, train\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "train(Recipe.from_yaml(sys.argv[1]), sys.argv[2])"
    )
    cut = tmp_path / "cut"
    for steps in (2, 7):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "recipe.yaml"), str(cut)],
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(log_lines(cut)) < steps:
            time.sleep(0.003)
        process.kill()
        process.wait()
    train(recipe, cut, console=RecordingConsole())
    assert_same_run(out, cut)
    assert len(list((cut / "checkpoints").iterdir())) <= 2


def log_lines(out):
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_a_finished_run_says_so_and_more_epochs_extend_it(tmp_path):
    report = train(BRIEF, tmp_path / "run", console=RecordingConsole())
    console = RecordingConsole()
    assert train(BRIEF, tmp_path / "run", console=console) == report
    assert "is finished" in console.text
    train(replace(BRIEF, epochs=0.2), tmp_path / "run", console=RecordingConsole())
    assert log(tmp_path / "run")[-1]["step"] == 11


@pytest.mark.slow
def test_an_extension_that_was_interrupted_is_resumed(tmp_path):
    train(BRIEF, tmp_path / "run", console=RecordingConsole())
    longer = replace(BRIEF, epochs=0.2, evaluate_every=0.02)
    with pytest.raises(Interrupted):
        train(longer, tmp_path / "run", console=RecordingConsole(signal.SIGINT))
    assert log(tmp_path / "run")[-1]["step"] < 11
    train(longer, tmp_path / "run", console=RecordingConsole())
    assert log(tmp_path / "run")[-1]["step"] == 11


def test_a_bundle_without_an_average_is_a_network_of_its_own():
    trainer = trainer_for(replace(BRIEF, ema_decay=0.0))
    for block in (block for stage in trainer.model.stages for block in stage.children()):
        compile_in_training(block)  # compiles at the first step, of which there is none
    bundle = trainer.bundle()
    measured = copy.deepcopy(bundle.model)  # as for a calibration
    trainer.model.train()
    images = torch.randn(4, 1, 8, 8)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.no_grad():
        found = measured(images)
        assert torch.equal(found, bundle.model(images))
        torch.testing.assert_close(found[:1], measured(images[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(dict(measured.state_dict()), before, rtol=0, atol=0)


def test_a_disk_that_refuses_the_best_weights_ends_no_training(tmp_path, monkeypatch):
    start_saving = Trainer.start_saving

    def refuse(trainer, name):
        if name == "best":
            raise UserError("No space left on device")
        start_saving(trainer, name)

    monkeypatch.setattr(Trainer, "start_saving", refuse)
    console = RecordingConsole()
    train(replace(BRIEF, evaluate_every=0.05, patience=100), tmp_path / "run", console=console)
    assert "warning: No space left on device; training goes on" in console.text and (tmp_path / "run/bundle").is_dir()


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_is_finished_and_leaves_nothing_behind(tmp_path):
    train(BRIEF, tmp_path / "run", console=RecordingConsole())
    shutil.rmtree(tmp_path / "run" / "bundle")  # as where death came before it
    checkpoints = tmp_path / "run" / "checkpoints"
    whole = sorted(path.name for path in checkpoints.iterdir())
    for leftover in (".trash-0a1b2c3d", "step-000000006.tmp-0a1b2c3d"):
        shutil.copytree(checkpoints / whole[-1], checkpoints / leftover)
    train(BRIEF, tmp_path / "run", console=RecordingConsole())
    assert (tmp_path / "run" / "bundle").is_dir()
    assert sorted(path.name for path in checkpoints.iterdir()) == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"optimizer": {"learning_rate": 0.5}}, r"optimizer\.learning_rate 0\.\d+, not 0\.5"),
        ({"epochs": 0.05}, "can only be extended"),
        ({"data": "fashion-mnist-small"}, "data digits, not fashion-mnist-small"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(changes, named, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(replace(BRIEF, evaluate_every=0.02), out, console=RecordingConsole(signal.SIGINT))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=named):
        train(replace(BRIEF, evaluate_every=0.02, **changes), out, console=RecordingConsole())
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_an_invalid_recipe_in_the_folder_is_reported(tmp_path):
    (tmp_path / "recipe.yaml").write_text("flour: 500 g")
    with pytest.raises(UserError, match=r"recipe\.yaml: flour is unknown"):
        train(BRIEF, tmp_path, console=RecordingConsole())


def test_a_folder_with_other_content_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="not the folder of a run"):
        train(BRIEF, tmp_path, console=RecordingConsole())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "no/such/folder"},
        {"model": "coatnet-99"},
        {"variations": {"flavour": 1}},
        {"name": "finetune"},
        {"init": "no/such/bundle"},
        {"name": "no-such-recipe"},
        {"variations": {"num_classes": 5}},
        {"variations": {"block_counts": [2, 3, 5, 2]}},
        {"epochs": 1e306},
        {"evaluate_every": 1e306},
        {"max_minutes": 1e308},
        {"batch_size": 10**19},
        {"fold": "1/99999999999999999999"},
    ],
)
def test_a_user_error_leaves_no_folder(changes, tmp_path):
    with pytest.raises(UserError):
        train(replace(BRIEF, **changes), tmp_path / "run", console=RecordingConsole())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_folder_holds_the_documented_files(whole):
    out, report = whole
    for name in ("recipe.yaml", "metrics.jsonl", "curves.png", "confusion.png", "report.md", "report.json"):
        assert (out / name).stat().st_size > 0, name
    bundle = coatnet.load(out / "bundle")
    assert coatnet.evaluate(bundle, "digits") == report
    assert Recipe.from_dict(bundle.record["recipe"]) == Recipe.from_yaml(out / "recipe.yaml")
    assert bundle.record["report"]["figures"] == dict(report.figures)


def images_with_bad_ones(root):
    """Twelve in train/ and six in val/, four of them bad in both."""
    for split, number in (("train", 12), ("val", 6)):
        for index in range(number):
            path = root / split / ("ab"[index % 2]) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (20 * index,) * 3).save(path)
            if index in (2, 3, 4, 5):
                path.write_bytes(path.read_bytes()[:20])
    return root


def test_a_run_with_too_many_bad_images_stops_and_resumes_with_a_larger_budget(tmp_path):
    recipe = Recipe(data=str(images_with_bad_ones(tmp_path / "data")), epochs=3, batch_size=8, num_workers=0)
    with pytest.raises(UserError, match=r"of 18 images cannot be used, 1 may be \(bad_image_budget 0.001"):
        train(replace(recipe, bad_image_budget=0.001), tmp_path / "run", console=RecordingConsole())
    console = RecordingConsole()
    report = train(replace(recipe, bad_image_budget=0.5), tmp_path / "run", console=console)
    assert len(report.bad_images) == 8
    counts = [record["bad_images"] for record in log(tmp_path / "run") if "top1" in record]
    assert counts == sorted(counts) and counts[-1] == 8
    assert "unreadable images: 8 of 18" in console.text


def test_by_default_bad_images_are_told_and_end_no_run(tmp_path):
    recipe = Recipe(data=str(images_with_bad_ones(tmp_path / "data")), epochs=1, batch_size=8, num_workers=0)
    console = RecordingConsole()
    assert len(train(recipe, tmp_path / "run", console=console).bad_images) == 8
    assert "of 18 images cannot be used so far, such as " in console.text


@pytest.mark.slow
def test_a_limit_in_minutes_ends_with_an_evaluated_bundle(tmp_path):
    console = RecordingConsole()
    report = train(Recipe(data="digits", max_minutes=0.2), tmp_path / "run", console=console)
    assert coatnet.evaluate(coatnet.load(tmp_path / "run" / "bundle"), "digits") == report
    assert log(tmp_path / "run")[-1]["epoch"] < 100
    (line,) = (each for each in console.text.splitlines() if "epochs fit into 0.2 minutes" in each)
    config, whole = (
        Recipe.from_yaml(tmp_path / "run/recipe.yaml"),
        resolve(Recipe(data="digits"), open_dataset("digits")),
    )
    assert line.startswith("about ") and " of 100 epochs " in line and config.epochs == 100
    assert ", by which warm-up, averaging are chosen; " in line  # small images are augmented the same in a short run
    assert (
        config.ema_decay < whole.ema_decay
        and config.to_dict()["schedule"]["warmup_steps"] < whole.schedule.warmup_steps
    )
    assert " epochs in 0." in console.text


@pytest.mark.slow
def test_reading_and_a_teacher_count_in_what_fits_into_a_limit(tmp_path, monkeypatch):
    data = images_with_bad_ones(tmp_path / "data")
    for path in data.rglob("*.png"):
        Image.new("RGB", (16, 16)).save(path)
    splits = open_dataset(str(data))
    monkeypatch.setattr(pace, "seconds_to_read", lambda *_: 0.5)

    def pace_of(**given):
        recipe = Recipe(data=str(data), epochs=3, batch_size=8, **given)
        return pace.measure_pace(resolve(recipe, splits), recipe, splits, None, SINGLE_PROCESS, 60.0)

    cores, num_images = num_cores(), len(splits.training) + len(splits.validation)
    decoded = pace_of(cache="none", num_workers=0)
    assert decoded.step > 8 * 0.5 / cores and decoded.beside == 0
    assert pace_of(cache="none", num_workers=1).step >= 4.0  # which the worker takes for a batch
    kept = pace_of(cache="memory")
    assert kept.step < decoded.step and kept.beside == pytest.approx(0.5 * (num_images / cores + num_images))
    train(Recipe(data=str(data), epochs=0.5, batch_size=8), tmp_path / "teacher")
    with_teacher = pace_of(cache="memory", teacher=str(tmp_path / "teacher/bundle"), distillation={"views": "fixed"})
    assert with_teacher.beside > kept.beside + 0.5 * len(splits.training) / cores
    in_memory = Recipe(data="digits", epochs=3, batch_size=8, model="coatnet-femto-16")
    train(replace(in_memory, epochs=0.1), tmp_path / "of digits")
    digits = open_dataset("digits")
    following = replace(in_memory, teacher=str(tmp_path / "of digits/bundle"), distillation={"views": "fixed"})
    assert pace.measure_pace(resolve(following, digits), following, digits, None, SINGLE_PROCESS, 60.0).beside > 0


@pytest.mark.slow
def test_a_resumed_run_keeps_the_values_that_were_chosen_for_its_limit(tmp_path):
    recipe = Recipe(data="digits", model="coatnet-femto-16", max_minutes=0.1)
    train(recipe, tmp_path / "run")
    before = (tmp_path / "run/recipe.yaml").read_text()
    console = RecordingConsole()
    train(recipe, tmp_path / "run", console=console)
    assert (tmp_path / "run/recipe.yaml").read_text() == before and "epochs fit" not in console.text


def test_patience_ends_the_run_with_the_weights_of_the_best_evaluation(tmp_path):
    recipe = replace(BRIEF, epochs=40, evaluate_every=0.02, patience=1, optimizer={"learning_rate": 1e-9})
    report = train(recipe, tmp_path / "run", console=RecordingConsole())
    evaluations = [record for record in log(tmp_path / "run") if "top1" in record]
    assert evaluations[-1]["top1"] == report.figures["top1"] == max(e["top1"] for e in evaluations)
    assert evaluations[-1]["step"] < 100


def test_the_weights_of_the_best_evaluation_are_taken_at_the_end(tmp_path):
    splits = open_dataset(BRIEF.data)
    stopped = Trainer(resolve(BRIEF, splits), splits, RunFolder(tmp_path, BRIEF))
    stopped.start_saving(trainer.BEST)
    stopped.writer.finish()
    best = {name: tensor.clone() for name, tensor in stopped.tensors().items()}
    with torch.no_grad():
        for tensor in stopped.tensors().values():
            tensor.add_(1)
    assert not any(torch.equal(tensor, best[name]) for name, tensor in stopped.tensors().items())
    stopped.restore_best()
    torch.testing.assert_close(dict(stopped.tensors()), best, rtol=0, atol=0)


@pytest.mark.slow
def test_finetuning_starts_from_the_weights_and_the_preprocessing_of_a_bundle(whole, tmp_path):
    out, _ = whole
    recipe = Recipe(name="finetune", data="digits", init=str(out / "bundle"), epochs=0.05)
    train(recipe, tmp_path / "run", console=RecordingConsole())
    start, end = coatnet.load(out / "bundle"), coatnet.load(tmp_path / "run" / "bundle")
    assert end.preprocessing == start.preprocessing
    assert end.model.variant == start.model.variant
    settled = Recipe.from_yaml(tmp_path / "run" / "recipe.yaml")
    assert settled.optimizer["layer_decay"] == 0.8
    with pytest.raises(UserError, match=f"model is 'coatnet-0', but init holds a {start.model.variant.name}"):
        train(replace(recipe, model="coatnet-0"), tmp_path / "other", console=RecordingConsole())
    assert not (tmp_path / "other").exists()
    fresh = trainer_for(recipe, init=start)
    for name, value in fresh.model.state_dict().items():
        assert torch.equal(value, start.model.state_dict()[name]), name  # the same classes keep their classifier


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(tmp_path, monkeypatch):
    from coatnet.training import checkpoint

    written, save_file = [], checkpoint.save_file

    def full_disk_once(tensors, path):
        written.append(Path(path))
        if len(written) == 1:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_disk_once)
    console = RecordingConsole()
    train(replace(BRIEF, checkpoint_every_minutes=1e-9), tmp_path / "run", console=console)
    assert "No space left on device" in console.text and "training goes on" in console.text
    assert (tmp_path / "run" / "bundle").exists()
