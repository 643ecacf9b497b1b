"""The folder of a run: what a recipe leaves open is as in the run, and what may not change is refused by name."""

import json
import os
import resource
import signal
from dataclasses import replace

import pytest
import torch
import yaml
from tests.training.checkpoints import save
from tests.training.configs import SMALL_COLOR_IMAGES, config_of

from coatnet.data.near_duplicates import MAX_SEARCHED
from coatnet.errors import UserError
from coatnet.evaluation.plots import draw_curves
from coatnet.training.checkpoint import step_name
from coatnet.training.config import MAY_CHANGE, Recipe, TrainingConfig
from coatnet.training.defaults import resolve_for
from coatnet.training.run_folder import RunFolder, fill_from

CLASSES = ("ant", "bee")
# Where nothing was asked for, earlier releases wrote null; they had no device.
NULLS = ("init", "micro_batch_size", "patience", "max_minutes", "num_workers", "keep_every_hours")
ASKED = {"epochs": 3, "seed": 5, "augmentation": {"flip_rate": 0.25}}


def stored_by_an_earlier_release(folder, **asked):
    values = config_of(**asked).to_dict() | dict.fromkeys(name for name in NULLS if name not in asked)
    del values["device"]
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    (folder / "checkpoints" / step_name(1)).mkdir(parents=True)
    return folder


def resumed(folder, classes=CLASSES, **asked):
    run = RunFolder(folder, Recipe(data="digits", **asked))
    run.check_config(resolve_for(run.given, SMALL_COLOR_IMAGES), classes)
    return run


def test_a_run_may_name_as_many_copies_as_are_looked_for(tmp_path):
    names = [f"videos/a-camera-in-the-yard/2026-01-01/{number:06d}.jpg" for number in range(MAX_SEARCHED)]
    copies = [names[first : first + 10] for first in range(0, len(names), 10)]
    (tmp_path / "recipe.yaml").write_text(config_of(kept_together=copies).to_yaml())
    (tmp_path / "checkpoints" / step_name(1)).mkdir(parents=True)
    assert (tmp_path / "recipe.yaml").stat().st_size > 1_000_000
    found = RunFolder(tmp_path, Recipe(data="digits")).given.kept_together
    assert list(map(list, found)) == copies


def test_a_run_of_an_earlier_release_resumes_with_its_own_values(tmp_path):
    stored_by_an_earlier_release(tmp_path, **ASKED, num_workers=2, keep_checkpoints=7)
    run = resumed(tmp_path)
    assert run.config == config_of(**ASKED)  # what may change is as by default again
    assert not run.finished
    (tmp_path / "report.json").touch()
    (tmp_path / "bundle").mkdir()
    assert resumed(tmp_path, num_workers=2, keep_checkpoints=7).finished and resumed(tmp_path).finished
    assert not any(resumed(tmp_path, **longer).finished for longer in ({"epochs": 4}, {"max_minutes": 1}))
    (tmp_path / "checkpoints" / step_name(1)).rmdir()
    with pytest.raises(UserError, match="holds a trained model, and no checkpoint to go on from"):
        run.start()
    assert (tmp_path / "report.json").exists()
    save(tmp_path / "checkpoints", step_name(1), {"weight": torch.ones(1)}, {"position": {}, "bad_images": {}})
    run.start()
    assert TrainingConfig.from_dict(yaml.safe_load((tmp_path / "recipe.yaml").read_text())) == run.config
    assert None not in yaml.safe_load((tmp_path / "recipe.yaml").read_text()).values()


def test_name_and_held_out_fraction_are_those_of_the_run_where_they_are_left_out(tmp_path):
    stored_by_an_earlier_release(tmp_path, name="fashion-mnist", validation_fraction=0.2)
    assert resumed(tmp_path).config == config_of(name="fashion-mnist", validation_fraction=0.2)
    with pytest.raises(UserError, match=r"validation_fraction 0.2, not 0.1"):
        resumed(tmp_path, validation_fraction=0.1)
    with pytest.raises(UserError, match="name fashion-mnist, not imagenet-1k"):
        resumed(tmp_path, name="imagenet-1k")


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"seed": 6}, "seed 5, not 6"),
        ({"augmentation": {"flip_rate": 0.5}}, "augmentation.flip_rate 0.25, not 0.5"),
        ({"micro_batch_size": 1}, "micro_batch_size 32, not 1"),
        ({"init": "timm/x"}, "init none, not timm/x"),
        ({"epochs": 2}, "of 3.0 epochs, which can only be extended"),
        ({"classes": ("ant",)}, "but digits is now without bee"),
    ],
)
def test_a_resumed_run_refuses_another_value_by_name(tmp_path, asked, answer):
    stored_by_an_earlier_release(tmp_path, **ASKED)
    with pytest.raises(UserError, match=answer):
        resumed(tmp_path, **asked)


def test_a_run_that_has_saved_nothing_takes_other_values(tmp_path):
    stored_by_an_earlier_release(tmp_path, **ASKED)
    (tmp_path / "checkpoints" / step_name(1)).rmdir()
    run = resumed(tmp_path, ("ant", "cow"), micro_batch_size=1, epochs=2)
    assert run.config == config_of(micro_batch_size=1, epochs=2)
    run.start()
    assert json.loads((tmp_path / "classes.json").read_text()) == ["ant", "cow"]


def test_what_may_change_changes(tmp_path):
    stored_by_an_earlier_release(tmp_path, **ASKED)
    changes = {
        "epochs": 4,
        "device": "cpu",
        "patience": 2,
        "max_minutes": 5,
        "num_workers": 0,
        "loggers": "tensorboard",
    }
    changes |= {"parallelism": "fsdp", "activation_checkpointing": "all", "evaluate_every": 2, "non_finite_budget": 1}
    changes |= {"checkpoint_every_minutes": 1, "keep_checkpoints": 3, "keep_every_hours": 1, "bad_image_budget": 0.5}
    assert changes.keys() == set(MAY_CHANGE)
    before, now = config_of(**ASKED), resumed(tmp_path, **changes).config
    assert now == replace(before, **changes)  # the schedule stays, although it was chosen for fewer epochs
    assert all(getattr(now, name) != getattr(before, name) for name in changes)


def started(folder):
    run = RunFolder(folder, Recipe(data="digits"))
    run.check_config(config_of(), CLASSES)
    run.start()
    return run


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    first = started(tmp_path / "run")
    with pytest.raises(UserError, match=rf"^process {os.getpid()} on .* is training in .*run; wait"):
        started(tmp_path / "run")
    late = RunFolder(tmp_path / "late", Recipe(data="digits"))
    late.check_config(config_of(), CLASSES)
    started(tmp_path / "late").release()
    with pytest.raises(UserError, match=r"another process has begun a run in .*late meanwhile"):
        late.start()
    first.release()
    started(tmp_path / "run").release()
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_start_that_was_killed_leaves_a_folder_that_can_be_started(tmp_path):
    for name in (".lock", ".tmp-0a1b2c3d-1-0a1b2c3d-recipe.yaml", ".tmp-0a1b2c3d-recipe.yaml"):
        (tmp_path / name).write_text("")
    (tmp_path / ".bundle.0a1b2c3d.tmp").mkdir()
    started(tmp_path).release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.json", "recipe.yaml"]
    with pytest.raises(UserError, match="is not the folder of a run"):
        RunFolder(tmp_path.parent, Recipe(data="digits"))


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path):
    run, said = started(tmp_path / "run"), []
    run.warn = said.append
    run.log({"step": 1})
    run.metrics.rename(tmp_path / "kept")
    run.metrics.mkdir()
    run.log({"step": 2})
    run.log({"step": 3})
    assert len(said) == 1 and "metrics.jsonl cannot be written" in said[0]
    run.rewind(1)
    run.metrics.rmdir()
    (tmp_path / "kept").rename(run.metrics)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.metrics.stat().st_size + 5, hard))
        run.log({"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    run.log({"step": 5})
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 5]
    run.release()


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    run = started(tmp_path / "run")
    lines = [
        '{"step": 1}',
        "[" * 100_000,
        "[]",
        "3",
        '{"step": "1"}',
        '{"step": 2}',
        '{"step": 9}',
        '{"st',
        '{"step": 3}',
    ]
    run.metrics.write_text("\n".join(lines) + "\n")
    run.rewind(2)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    draw_curves(run.metrics, tmp_path / "curves.png")
    run.release()


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{}", "[1, 2]", '["ant", '])
def test_damaged_classes_of_a_run_are_one_line(tmp_path, text):
    (stored_by_an_earlier_release(tmp_path, **ASKED) / "classes.json").write_text(text)
    with pytest.raises(UserError, match=r"classes\.json"):
        resumed(tmp_path)


def test_a_model_that_contradicts_the_bundle_of_a_run_is_not_left_out():
    stored = Recipe(name="finetune", data="digits", init="x", model="coatnet-femto-16")
    given = Recipe(name="finetune", data="digits", init="x")
    assert fill_from(stored, given).model == "coatnet-femto-16"
    assert fill_from(stored, replace(given, model="coatnet-0")).model == "coatnet-0"  # is refused then
