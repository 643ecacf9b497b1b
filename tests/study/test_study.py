"""`coatnet study` on tiny data: equal budgets, pairs by seed, failures, extension, and what a second start does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coatnet.cli.main import main
from coatnet.study.plan import Options, open_study
from coatnet.study.record import Study
from coatnet.study.run import Part, recipe_of
from coatnet.training.defaults import open_splits, resolve
from coatnet.training.run_folder import RunFolder
from coatnet.training.trainer import NOT_WRITTEN, Trainer

QUESTION = """
title: Does weight decay matter?
match: false
members:
  some: {}
  too much: {optimizer.weight_decay: 1e+35}
"""
COMMAND = ["--data", "digits", "--sizes", "40", "--seeds", "1", "--steps", "3", "--jobs", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """The folder of a study with a member that fails, and the exit code."""
    place = tmp_path_factory.mktemp("study")
    (place / "decay.yaml").write_text(QUESTION)
    folder = place / "decay"
    code = main(["study", str(place / "decay.yaml"), *COMMAND, "--out", str(folder)])
    yield folder, code


def test_a_failed_run_is_named_and_the_rest_goes_on(made: tuple[Path, int]) -> None:
    folder, code = made
    study = Study.read(folder)
    assert code == 1
    assert [run.status for run in study.runs] == ["finished", "failed"]
    assert all("finite" in str(run.reason) for run in study.runs if run.status == "failed")
    assert study.title == "Does weight decay matter?"
    assert (folder / "study.html").exists()


def test_all_members_have_the_same_budget_and_full_measurements(made: tuple[Path, int]) -> None:
    study = Study.read(made[0])
    assert {run.steps for run in study.runs} == {3}
    for run in study.finished():
        assert run.figures is not None
        assert (run.figures.n, run.figures.n_train) == (study.held_out, run.size)
        assert run.curves.step == (1, 2, 3) and run.curves.held_out_step[-1] == 3
        assert run.curves.held_out_top1[-1] == run.figures.top1
        log = [json.loads(line) for line in (made[0] / run.folder / "metrics.jsonl").read_text().splitlines()]
        assert max(line["step"] for line in log) == 3
    recipes = [recipe_of(study, run).to_dict() for run in study.runs]
    for recipe in recipes:
        recipe["optimizer"] = recipe["optimizer"] | {"weight_decay": None}
    assert recipes[0] == recipes[1]


def test_weights_are_not_kept(made: tuple[Path, int]) -> None:
    assert list(made[0].glob("runs/some*/figures.json"))
    assert not list(made[0].glob("runs/some*/checkpoints"))
    assert not list(made[0].glob("runs/*/bundle"))


def test_the_same_seed_and_size_is_the_same_images_in_the_same_order(made: tuple[Path, int]) -> None:
    study = Study.read(made[0])
    batches = []
    for run in study.runs[:2]:
        recipe, splits = open_splits(recipe_of(study, run), lambda text: None)
        trainer = Trainer(resolve(recipe, splits), splits, RunFolder(NOT_WRITTEN, recipe))
        with closing(trainer.batches()) as several:
            images, labels, _ = next(several)
        batches.append((images, labels, splits.training.identity()))
        assert len(splits.training) == run.size == 40
        assert set(splits.training.class_counts) == {4}
    assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])
    assert list(batches[0][2]) == list(batches[1][2])


def test_a_small_size_is_a_part_of_a_larger_one(made: tuple[Path, int]) -> None:
    study = Study.read(made[0])
    names = []
    for run in (study.runs[0], replace(study.runs[0], size=80)):
        _, splits = open_splits(recipe_of(study, run), lambda text: None)
        names.append(set(splits.training.identity()))
    assert (len(names[0]), len(names[1])) == (40, 80)
    assert names[0] < names[1]


def test_the_same_command_trains_nothing_again_but_what_failed(
    made: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made
    before = Study.read(folder)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/figures.json")}
    assert len(written) == 1
    assert main(["study", str(folder.parent / "decay.yaml"), *COMMAND, "--out", str(folder)]) == 1
    assert "1 run to go" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/figures.json")} == written
    assert Study.read(folder).finished() == before.finished()


def test_more_seeds_extend_a_study_and_another_budget_is_refused(
    made: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made
    question = str(folder.parent / "decay.yaml")
    before = Study.read(folder)
    options = Options(question, "digits", sizes=("40", "50%"), seeds=2, steps=3, jobs=1)
    wider = open_study(options, folder, print, dry_run=True)
    assert len(wider.runs) == 8 and wider.finished() == before.finished()
    assert Study.read(folder) == before
    command = ["study", question, *COMMAND, "--out", str(folder)]
    assert main([*command, "--steps", "4"]) == 2
    assert "a study with steps 3, not 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("layouts", ["--resolution", "7"], "member ViT_REL is impossible: 7 pixels"),
        ("layout", [], "there is no study 'layout' (did you mean 'layouts'?)"),
        ("bias", ["--sizes", "200%"], "size 200% is"),
        ("bias", ["--sizes", "some"], "size 'some' is neither"),
        ("bias", ["--seeds", "0"], "seeds is 0"),
        ("bias", ["--steps", "5", "--minutes", "1"], "give one of them"),
        ("members: {a: {}, b: {epochs: 5}}", [], "member b: epochs is the same for all members; give --epochs"),
        ("members: {a: {}, b: {optimizer: {learning_rate: 1}}}", [], "give --learning_rates"),
        ("members: {a: {}, b: {widht: 5}}", [], "member b: widht is unknown"),
        ("members: {a: {}, b: {variations: {head_dim: 5}}}", [], "member b is impossible: head_dim=5"),
        ("members: {a: {}}", [], "has 1 members; a study has 2 to 64"),
        ("grid: {seed: [1, 2]}", [], "seed is the same for all members"),
        ("grid: {batch_size: 2}", [], "grid.batch_size must be a list"),
        ("other: 1", [], "other is unknown"),
    ],
)
def test_an_impossible_study_is_refused_before_anything_is_written(
    question: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if ":" in question:
        (tmp_path / "own.yaml").write_text(question)
        question = str(tmp_path / "own.yaml")
    assert main(["study", question, "--data", "digits", "--out", str(tmp_path / "study"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("coatnet: error: ") and message in error
    assert not (tmp_path / "study").exists()


def test_every_process_of_an_array_takes_its_part() -> None:
    parts = [
        Part.of({"SLURM_ARRAY_TASK_ID": str(n), "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "3"})
        for n in (4, 5, 6)
    ]
    taken = [run for part in parts for run in range(10)[part.index :: part.count]]
    assert sorted(taken) == list(range(10))
    launched = Part.of({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert (launched.index, launched.count, launched.local_rank) == (3, 4, 1)
    assert Part.of({}) == Part()


def figures_of(folder: Path) -> list[tuple]:
    """What a study found, without times."""
    return [(run.folder, run.status, run.figures, run.curves) for run in Study.read(folder).runs]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_study_that_is_ended_at_any_moment_ends_with_the_same_figures(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coatnet", "study", "bias", "--data", "digits", "--sizes", "60", "--seeds", "2"]
    command += ["--steps", "30", "--jobs", "2", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*command, str(whole)], check=True, env=environment, capture_output=True)
    random = np.random.default_rng(0)
    for _ in range(3):
        process = subprocess.Popen([*command, str(broken)], env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(broken.glob("runs/*/metrics.jsonl")):
            time.sleep(0.1)
        time.sleep(random.uniform(0.0, 6.0))
        process.send_signal(number)
        process.wait()
        time.sleep(1.0)  # for the runs, which end with the study
    subprocess.run([*command, str(broken)], check=True, env=environment, capture_output=True)
    assert figures_of(broken) == figures_of(whole)


def test_a_study_without_a_folder_is_named_after_its_question(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", "bias", *COMMAND]) == 0
    assert len(Study.read(tmp_path / "studies" / "bias").finished()) == 2
