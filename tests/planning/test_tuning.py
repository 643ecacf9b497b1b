"""The search for values before a run: what it scales, finds, writes, and how it goes on after a kill."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from torch import Tensor

import coatnet
from coatnet import Recipe, UserError
from coatnet.cli.main import main
from coatnet.data.transforms import Augmentation
from coatnet.errors import NotFinite
from coatnet.evaluation.metrics import mcnemar, paired_difference, wilson_interval
from coatnet.planning.tuning import DEFAULT_FACTORS, describe_difference, tune, tuned_config, tuned_values
from coatnet.training.config import MAY_CHANGE, TrainingConfig
from coatnet.training.defaults import resolve
from coatnet.training.pace import Pace
from coatnet.training.trainer import Trainer

# Few images a step and few held out, so that trials are short.
SMALL = {"batch_size": 8, "epochs": 0.1, "validation_fraction": 0.02, "num_workers": 0}


def config(**changes: object) -> TrainingConfig:
    return resolve(Recipe(data="digits", **changes), coatnet.open_dataset("digits"))


def test_the_interval_of_a_difference_is_that_of_pairs() -> None:
    random = np.random.default_rng(0)
    first, second = random.random(200) < 0.8, random.random(200) < 0.7
    differences = first.astype(float) - second.astype(float)
    half = 1.959964 * differences.std() / 200**0.5
    expected = (differences.mean() - half, differences.mean() + half)
    assert paired_difference(first, second) == pytest.approx(expected)
    least, most = paired_difference(first, first)
    assert -least == most == wilson_interval(0, 200)[1]


def test_factors_of_one_change_nothing_and_strength_zero_leaves_no_augmentation_but_mirroring() -> None:
    augmentation = Augmentation(
        crop_scale=(0.35, 1.0), rand_augment_layers=2, rand_augment_magnitude=9, erasing_rate=0.3
    )
    before = replace(config(mixing={"mixup_alpha": 0.2}), augmentation=augmentation)

    def changed(**factors: float) -> TrainingConfig:
        return tuned_config(before, {**DEFAULT_FACTORS, **factors})

    assert changed() == before
    none = changed(augmentation=0.0)
    assert none.augmentation == replace(
        augmentation, crop_scale=(1.0, 1.0), shift=0, rand_augment_layers=0, rand_augment_magnitude=0, erasing_rate=0.0
    )
    assert none.mixing.mixup_alpha == 0 and none.mixing.label_smoothing == before.mixing.label_smoothing
    trivial = replace(before, augmentation=Augmentation(trivial_augment=True))
    values = [tuned_values(trivial, {**DEFAULT_FACTORS, "augmentation": strength}) for strength in (0.4, 0.6)]
    assert [each["augmentation"]["trivial_augment"] for each in values] == [False, True]
    part = replace(before, augmentation=replace(augmentation, crop_scale=(0.2, 0.8)))
    for strength, expected in ((0.0, (0.8, 0.8)), (0.1, (0.8, 0.8)), (1.0, (0.2, 0.8)), (2.0, (0.1, 0.8))):
        found = tuned_config(part, {**DEFAULT_FACTORS, "augmentation": strength})
        assert found.augmentation.crop_scale == pytest.approx(expected)
    twice = changed(augmentation=2.0, learning_rate=0.5)
    assert twice.augmentation.crop_scale == (0.175, 1.0) and twice.augmentation.rand_augment_magnitude == 18
    assert twice.optimizer.learning_rate == pytest.approx(before.optimizer.learning_rate / 2, rel=1e-3)


@pytest.mark.slow
def test_a_search_tells_its_trials_and_the_uncertainty_and_is_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or a busy machine would refuse.
    monkeypatch.setattr("coatnet.planning.tuning.measure_pace", lambda *_: Pace(0.01, 0.0))
    recipe, out, said = Recipe(data="digits", **SMALL), tmp_path / "run", Console(record=True, width=400, quiet=False)
    tuned = tune(recipe, out, 0.1, console=said)
    found = json.loads((out / "tuning.json").read_text())
    assert tuned == recipe.changed(found["values"])
    assert found["trials"][0] | {name: 1.0 for name in DEFAULT_FACTORS} == found["trials"][0]
    whole = [each for each in found["trials"] if each["outcome"] == "whole"]
    assert whole[0]["number"] == 0 and found["score"] == max(each["score"] for each in whole) >= found["default_score"]
    low, high = found["difference_interval"]
    assert low <= found["difference"] <= high
    page = (out / "tuning.md").read_text()
    assert page.count("\n| ") == 1 + len(found["trials"]) and "too favorable" in page
    assert found["summary"] in said.export_text().replace("\n", "")

    journal = (out / "tuning.journal").read_bytes()
    assert tune(recipe, out, 0.1, console=Console(quiet=True)) == tuned
    assert (out / "tuning.journal").read_bytes() == journal

    # Killed while it wrote its last line: what came before is enough, as the time is over.
    (out / "tuning.json").unlink()
    (out / "tuning.journal").write_bytes(journal + b'{"op_code": 6, "work')
    assert tune(recipe, out, 0.1, console=Console(quiet=True)) == tuned
    assert (out / "tuning.journal").read_bytes().startswith(journal)
    (out / "tuning.json").unlink()
    (out / "tuning.journal").write_bytes(b"no journal\n" + journal)
    with pytest.raises(UserError, match=r"tuning\.journal is damaged; remove it"):
        tune(recipe, out, 0.1)
    (out / "tuning.journal").write_bytes(journal)
    with pytest.raises(UserError, match="another batch_size"):
        tune(Recipe(data="digits", **{**SMALL, "batch_size": 4}), out, 0.1)


def test_the_trial_that_all_are_compared_with_is_repeated_if_it_was_cut_off(tmp_path: Path) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    recipe, out = Recipe(data="digits", **SMALL), tmp_path / "run"
    out.mkdir()
    storage = JournalStorage(JournalFileBackend(str(out / "tuning.journal")))
    study = optuna.create_study(storage=storage, study_name="tuning", direction="maximize")
    study.enqueue_trial(DEFAULT_FACTORS)
    asked = {name: value for name, value in recipe.to_dict().items() if name not in MAY_CHANGE}
    for name, value in {"asked": asked, "steps": 9, "run_steps": 22, "step_seconds": 0.01}.items():
        study.set_user_attr(name, value)
    study.ask().suggest_float("learning_rate", 1 / 6, 6, log=True)  # and then the process was killed

    tune(recipe, out, 0.01, console=Console(quiet=True))
    found = json.loads((out / "tuning.json").read_text())
    assert found["without_search"] == 1 and found["trials"][0]["number"] == 1
    assert found["default_score"] == found["trials"][0]["score"] and found["trials"][0]["steps"] == 9
    assert "Trial 1 has the values without a search" in (out / "tuning.md").read_text()


@pytest.mark.parametrize("budget", [0, 1])
def test_a_trial_that_diverges_is_the_worst_unless_its_budget_leaves_the_step_out(
    budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    monkeypatch.setattr("coatnet.planning.tuning.measure_pace", lambda *_: Pace(0.01, 0.0))
    trainers, real_step = list[Trainer](), Trainer.step

    def step(trainer: Trainer, *batch: Tensor) -> tuple[float, float]:
        if trainer not in trainers:
            trainers.append(trainer)
        total = trainer.duration.total_steps
        if len(trainers) == 2 and trainer.state.step == total - 1 and not trainer.state.left_out:
            raise NotFinite("step 8: loss nan")
        return real_step(trainer, *batch)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr("optuna.Trial.should_prune", lambda self: False)
    out = tmp_path / "run"
    tune(Recipe(data="digits", **SMALL, non_finite_budget=budget), out, 0.1, console=Console(quiet=True))
    second = json.loads((out / "tuning.json").read_text())["trials"][1]
    journal = JournalStorage(JournalFileBackend(str(out / "tuning.journal")))
    trial = optuna.load_study(study_name="tuning", storage=journal).trials[1]
    assert second["score"] > 0
    study = optuna.load_study(study_name="tuning", storage=journal)
    cut_off = study.ask()  # killed before it was told
    cut_off.set_user_attr("outcome", "whole")
    cut_off.set_user_attr("steps", 1)
    (out / "tuning.json").unlink()
    tune(Recipe(data="digits", **SMALL, non_finite_budget=budget), out, 0.1, console=Console(quiet=True))
    if budget:
        assert second["outcome"] == "whole" and trial.value == second["score"]
    else:
        assert second["outcome"] == "diverged" and trial.value == 0.0
        assert second["score"] in trial.intermediate_values.values() and trial.intermediate_values[9] == 0.0


def test_a_search_goes_on_with_more_minutes_than_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatnet.planning.tuning.measure_pace", lambda *_: Pace(0.01, 0.0))
    recipe, out, quiet = Recipe(data="digits", **SMALL), tmp_path / "run", Console(quiet=True)
    tune(recipe, out, 0.03, console=quiet)
    first, journal = json.loads((out / "tuning.json").read_text()), (out / "tuning.journal").read_bytes()
    tune(recipe, out, 0.02, console=quiet)
    assert (out / "tuning.journal").read_bytes() == journal
    longer = tune(recipe, out, first["minutes"] + 0.1, console=quiet)
    found = json.loads((out / "tuning.json").read_text())
    assert (out / "tuning.journal").read_bytes().startswith(journal) and longer == recipe.changed(found["values"])
    assert found["trials"][: len(first["trials"])] == first["trials"] and len(found["trials"]) > len(first["trials"])


def test_a_trial_whose_outputs_are_not_finite_has_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatnet.planning.tuning.measure_pace", lambda *_: Pace(0.01, 0.0))
    trainers, real = list[Trainer](), Trainer.validation_metrics

    def metrics(trainer: Trainer, sync: object) -> object:
        if trainer not in trainers:
            trainers.append(trainer)
        if len(trainers) == 2:
            for parameter in trainer.average.whole().parameters():
                parameter.data.fill_(float("nan"))
        return real(trainer, sync)

    monkeypatch.setattr(Trainer, "validation_metrics", metrics)
    tune(Recipe(data="digits", **SMALL), tmp_path / "run", 0.2, console=Console(quiet=True))
    trials = json.loads((tmp_path / "run/tuning.json").read_text())["trials"]
    assert trials[1]["outcome"] == "diverged" and trials[0]["outcome"] == "whole"


def test_a_search_in_which_all_diverge_ends_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A step of it would fail already.
    monkeypatch.setattr("coatnet.planning.tuning.measure_pace", lambda *_: Pace(0.001, 0.0))
    recipe = Recipe(data="digits", **SMALL, optimizer={"learning_rate": 1e30})
    with pytest.raises(UserError, match=r"none of \d+ trials? kept a finite loss to its end: lower"):
        tune(recipe, tmp_path / "run", 0.01, console=Console(quiet=True))


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(data="digits", **SMALL)
    for minutes in (0, -1, float("nan")):
        with pytest.raises(UserError, match="minutes above 0"):
            tune(recipe, tmp_path / "run", minutes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        tune(recipe, tmp_path / "run", 1)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'coatnet\[tune\]'"):
        tune(recipe, tmp_path / "run", 1)
    assert main(["train", "--data", "digits", "--out", str(tmp_path / "run"), "--tune", "1", "--dry_run"]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_time_that_is_too_short_and_a_run_without_a_search_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coatnet.planning.tuning.cached_images", lambda *_, **__: pytest.fail("images were decoded"))
    recipe = Recipe(data="digits", **SMALL)
    with pytest.raises(UserError, match=r"too short: .* give at least"):
        tune(recipe, tmp_path / "short", 1e-4, console=Console(quiet=True))
    coatnet.train(recipe.changed({"epochs": 0.01}), tmp_path / "run", console=Console(quiet=True))
    with pytest.raises(UserError, match="began without a search"):
        tune(recipe, tmp_path / "run", 1)


@pytest.mark.nightly
def test_a_search_that_was_killed_goes_on_and_the_run_takes_its_values(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    command = [
        sys.executable,
        "-m",
        "coatnet",
        "train",
        "--data",
        "digits",
        "--out",
        str(out),
        "--tune",
        "0.8",
        *options,
    ]
    for kill in (signal.SIGKILL, signal.SIGINT):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("trial "):
                    break
            time.sleep(0.2)
            process.send_signal(kill)
            rest = process.stderr.read()
        assert process.returncode == (-9 if kill == signal.SIGKILL else 130), rest
        assert not (out / "tuning.json").exists() and not (out / "recipe.yaml").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    found = json.loads((out / "tuning.json").read_text())
    assert found["trials"][0]["number"] == 0 and len(found["trials"]) >= 3
    stored = Recipe.from_yaml(out / "recipe.yaml").to_dict()
    assert stored["optimizer"]["learning_rate"] == found["values"]["optimizer"]["learning_rate"]
    assert "too favorable" in (out / "report.md").read_text() and "too favorable" in again.stdout
    assert "top1" in json.loads((out / "report.json").read_text())["figures"]


@pytest.mark.parametrize(("gained", "lost", "may_be_chance"), [(4, 0, True), (9, 0, False), (30, 25, True)])
def test_a_gain_of_few_images_may_be_chance(gained: int, lost: int, may_be_chance: bool) -> None:
    ours, theirs = np.zeros((2, 200), bool)
    ours[:gained] = theirs[gained : gained + lost] = True
    said = describe_difference(paired_difference(ours, theirs), mcnemar(gained, lost))
    assert said.endswith("which may be chance") is may_be_chance
