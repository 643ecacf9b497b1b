"""`coatnet study` on tiny data: equal budgets, pairs by seed, failures, extension, and what a second start does."""

import errno
import json
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.cli import study as cli
from coatnet.cli.main import main
from coatnet.data import loader
from coatnet.data.open import open_dataset
from coatnet.errors import UserError
from coatnet.inference import Predictor
from coatnet.study import record as study_record
from coatnet.study.folder import hold_study, open_study
from coatnet.study.plan import Options, candidates, describe_plan
from coatnet.study.record import Run, Study
from coatnet.study.run import Part, Worker, _Progress, _result, measure_steps, recipe_of
from coatnet.training.config import Recipe
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


@pytest.mark.slow
def test_of_several_processes_none_fails_while_runs_are_left(
    made: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, study = made[0], Study.read(made[0])
    assert [cli._report(folder, shared=shared) for shared in (True, False)] == [1, 1]
    left = replace(study, runs=(replace(study.runs[0], status="planned"), study.runs[1]))
    monkeypatch.setattr(Study, "read", lambda _: left)
    assert [cli._report(folder, shared=shared) for shared in (True, False)] == [0, 1]


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_rest_goes_on(made: tuple[Path, int]) -> None:
    folder, code = made
    study = Study.read(folder)
    assert code == 1
    assert [run.status for run in study.runs] == ["finished", "failed"]
    assert all("finite" in str(run.reason) for run in study.runs if run.status == "failed")
    assert study.title == "Does weight decay matter?"
    assert (folder / "study.html").exists()


@pytest.mark.slow
def test_kept_weights_are_a_bundle_with_its_report(tmp_path: Path) -> None:
    (tmp_path / "decay.yaml").write_text(QUESTION.replace("1e+35", "0.1"))
    command = ["study", str(tmp_path / "decay.yaml"), *COMMAND, "--out", str(tmp_path / "decay")]
    assert main([*command, "--keep_weights"]) == 0
    for run in Study.read(tmp_path / "decay").finished():
        folder = tmp_path / "decay" / run.folder
        report = json.loads((folder / "report.json").read_text())
        assert run.figures is not None and report["figures"]["top1"] == pytest.approx(run.figures.top1, abs=0.01)
        assert Predictor(folder / "bundle", "torch").classes == tuple("0123456789")


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
    made: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    asked = before.asked | {"model": "coatnet-femto-16"}
    other = shutil.copytree(folder, tmp_path / "decay")
    change(other / "study.json", asked=asked)
    with pytest.raises(UserError, match="holds a study with model coatnet-femto-16: give the same to go on"):
        open_study(options, other, print, dry_run=True)


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
        ("bias", ["--sizes", "nan"], "size 'nan' is neither"),
        ("bias", ["--sizes", "inf%"], "size 'inf%' is neither"),
        ("bias", ["--sizes", "5", "100"], "size 5 is impossible: training_images is 5, which leaves 5 classes without"),
        ("bias", ["--width", "0.01"], "member without cannot be given the cost of the others: widths near"),
        ("bias", ["--width", "1e300"], "width is 1e+300; it must be above 0, and 100 at most"),
        ("bias", ["--learning_rates", "1e-3", "0.001"], "learning rate 0.001 is given twice"),
        (f"members: {{a: {{}}, {'b' * 200}: {{}}}}", [], "has a name of 200 letters, too long for a folder"),
        ("members: {a: {}, %s: {}}" % ("\u6708" * 60), [], "has a name of 60 letters, too long for a folder"),
        ("{members: {a: {}, b: {}}, match: maybe}", [], "match must be true or false, got 'maybe'"),
        ("{members: {a: {}, b: {}}, recipe: {variations: {head_dim: 5}}}", [], "variations of all members are impos"),
        (
            "members: {a: {}, b: {preprocessing: {resolution: 16}}}",
            [],
            "member b: preprocessing.resolution is the same",
        ),
        ("members: {a: {}, b: {preprocessing.resolution: 16}}", [], "give --resolution"),
        ("{members: {a: {}, b: {}}, recipe: {patience: 2}}", [], "recipe: patience is the same for all members"),
        ("members: {a: {}, b: {batch_size: 8}}", [], "member b: batch_size is the same for all members; give --batch"),
        ("members: {a: {}, b: {max_minutes: 1}}", [], "member b: max_minutes is the same for all members"),
        (
            "grid: {validation_fraction: [0.1, 0.2]}",
            [],
            "validation_fraction is the same for all members; give it under",
        ),
        ("members: {a: {}, b: {progressive_resizing: {stages: 2}}}", [], "member b: progressive_resizing"),
        (
            "members: {a: {}, b: {schedule: 1, schedule.decay: linear}}",
            [],
            "schedule is 1, and schedule.decay is given",
        ),
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


def plan(tmp_path: Path, question: str = "bias", *, said: list[str] | None = None, **options: Any) -> Study:
    """The plan of a study of digits, of which nothing is trained."""
    if ":" in question:
        (tmp_path / "own.yaml").write_text(question)
        question = str(tmp_path / "own.yaml")
    given = {"data": "digits", "sizes": ("40",), "seeds": 1, "jobs": 1} | options
    say = (said if said is not None else []).append
    return open_study(Options(question, **given), tmp_path / "study", say, dry_run=True)


@pytest.mark.slow
def test_variations_of_the_recipe_are_those_of_all_members(tmp_path: Path) -> None:
    recipe = "recipe: {variations: {head_dim: 4, attention: post}, validation_fraction: 0.2}"
    study = plan(tmp_path, f"{{members: {{a: {{}}, b: {{variations: {{attention: pre}}}}}}, {recipe}}}", steps=1)
    assert [each.changes["variations"]["head_dim"] for each in study.members] == [4, 4]
    assert [each.changes["variations"].get("attention", "pre") for each in study.members] == ["post", "pre"]
    assert study.asked["file"]["recipe"]["variations"] == {"head_dim": 4, "attention": "post"}
    _, splits = open_splits(recipe_of(study, study.runs[0]), lambda text: None)
    assert study.held_out == len(splits.validation) > 300


def test_a_default_size_that_leaves_out_classes_is_not_planned(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    said: list[str] = []
    options = Options("bias", str(tmp_path / "images"))
    _, splits = open_splits(Recipe(data=options.data), lambda text: None)
    assert {sizes for sizes, _ in candidates(options, splits, said.append)} == {(len(splits.training),)}
    assert any("all training images are the only size: size 10% is" in line for line in said)
    with pytest.raises(UserError, match=r"size 10% is impossible: .* leaves 1 class without any"):
        plan(tmp_path, data=str(tmp_path / "images"), sizes=("10%", "100%"), steps=1)


def test_jobs_beyond_the_runs_add_no_steps_and_no_measuring(tmp_path: Path) -> None:
    said: list[str] = []
    study = plan(tmp_path, minutes=3, jobs=8, said=said)
    assert len(study.runs) == 2
    assert max(run.seconds for run in study.runs) <= 180
    assert "measuring a few steps of each, 2 runs at once" in said


def test_a_single_round_lasts_as_long_as_its_slowest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [0.05, 0.15, 1.0, 0.0]  # of two members, to open the data, and to decode an image
    monkeypatch.setattr("coatnet.study.plan.measure_steps", lambda *_: measured)
    at_once = plan(tmp_path, minutes=3, jobs=2)
    assert 150 <= max(run.seconds for run in at_once.runs) <= 180
    assert "2 runs to go, 2 at once: about 3 minutes" in describe_plan(at_once, 2, Part())
    in_turn = [run.seconds for run in plan(tmp_path, minutes=3, jobs=1).runs]
    assert 150 <= sum(in_turn) <= 180
    plain = plan(tmp_path, steps=10)
    measured[3] = 0.01
    decoded, (run, *_) = plan(tmp_path, steps=10), plain.runs
    assert decoded.runs[0].seconds - run.seconds == pytest.approx(0.01 * (run.size + plain.held_out), abs=0.02)


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


OWN = "match: false\nmembers:\n  a: {}\n  b: {optimizer.weight_decay: 0.1}\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of two runs, beside its own.yaml."""
    place = tmp_path_factory.mktemp("finished")
    (place / "own.yaml").write_text(OWN)
    assert main(["study", str(place / "own.yaml"), *COMMAND, "--out", str(place / "own")]) == 0
    return place / "own"


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished study; its command is `AGAIN`, in the folder above."""
    shutil.copytree(finished, tmp_path / "own")
    record = json.loads((tmp_path / "own/study.json").read_text())
    record["asked"]["question"] = "own.yaml"
    (tmp_path / "own/study.json").write_text(json.dumps(record))
    (tmp_path / "own.yaml").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own"


AGAIN = ["study", "own.yaml", *COMMAND]


def change(path: Path, **values: object) -> None:
    """Give keys of a JSON file other values, or remove those that are None."""
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("  b:", "  c:", "member b is gone, member c is new"),
        ("0.1", "0.2", "member b has other values"),
        ("{}", "{variations: {norm: layer}}", "member a has other values"),
        ("false", "true", "match differs"),
        ("match", "recipe: {optimizer.grad_clip_norm: 2}\nmatch", "recipe differs"),
        ("  a: {}\n  b: {optimizer.weight_decay: 0.1}", "  b: {optimizer.weight_decay: 0.1}\n  a: {}", "another order"),
    ],
)
def test_an_edited_file_is_another_study(
    before: str, after: str, message: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = (copied / "study.json").read_bytes()
    Path("own.yaml").write_text(OWN.replace(before, after))
    assert main([*AGAIN, "--out", "own"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error and "another folder" in error
    assert (copied / "study.json").read_bytes() == record


def test_an_edited_file_is_refused_for_a_study_that_did_not_keep_it_and_a_title_is_not_the_question(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = json.loads((copied / "study.json").read_text())["asked"]
    del asked["file"]
    change(copied / "study.json", asked=asked)
    Path("own.yaml").write_text(OWN.replace("0.1", "0.2"))
    assert main([*AGAIN, "--out", "own"]) == 2
    assert "member b has other values" in capsys.readouterr().err
    Path("own.yaml").write_text("title: How much?\n" + OWN)
    assert main([*AGAIN, "--out", "own"]) == 0
    assert "How much?" in (copied / "study.md").read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"asked": {}}, "asked.planned_steps is None"),
        ({"runs": []}, "has no runs"),
        ({"recipe": {}}, "recipe has no batch_size"),
        ({"seeds": []}, "seeds is empty"),
        ({"members": None}, "members"),
        ({"format": None}, "format"),
        (None, "not JSON"),
    ],
)
def test_a_damaged_study_json_is_one_line_with_the_way_out(
    damage: dict | None, message: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = copied / "study.json"
    if damage is None:
        record.write_bytes(record.read_bytes()[:500])
    else:
        change(record, **damage)
    assert main([*AGAIN, "--out", "own"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error and "move it out of the folder" in error


@pytest.mark.slow
def test_runs_without_a_study_json_become_a_study_again(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = figures_of(copied)
    written = {path: path.stat().st_mtime_ns for path in copied.glob("runs/*/figures.json")}
    (copied / "study.json").rename(copied / "study.json.old")
    assert main([*AGAIN, "--out", "own"]) == 0
    assert figures_of(copied) == before
    assert {path: path.stat().st_mtime_ns for path in written} == written
    (copied / "study.json").unlink()
    assert main([*AGAIN, "--steps", "4", "--out", "own"]) == 1  # and no run of 3 steps is made longer
    error = capsys.readouterr().err
    assert [run.status for run in Study.read(copied).runs] == [
        "failed",
        "failed",
    ] and "holds a run with epochs" in error
    assert {path: path.stat().st_mtime_ns for path in written} == written
    (copied / "study.json").unlink()
    (copied / "thesis.txt").write_text("mine")
    assert main([*AGAIN, "--out", "own"]) == 2
    assert "is not the folder of a study" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_whose_figures_are_damaged_are_trained_again(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = figures_of(copied)
    first, second = sorted(copied.glob("runs/*/figures.json"))
    first.write_bytes(first.read_bytes()[:300])
    change(second, figures=None)
    (copied / "study.json").unlink()
    assert main([*AGAIN, "--out", "own"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "the run is trained again" in line]
    assert len(said) == 2 and "not JSON" in said[0] and "'figures' is missing" in said[1]
    assert figures_of(copied) == before


def test_a_run_with_weights_and_damaged_figures_is_named_and_the_rest_goes_on(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(copied.glob("runs/a-*/figures.json"))
    (path.parent / "bundle").mkdir()
    change(path, figures=None)
    (copied / "study.json").unlink()
    assert main([*AGAIN, "--out", "own"]) == 1
    error = capsys.readouterr().err
    assert f"remove the folder own/runs/{path.parent.name}" in error and "Traceback" not in error
    assert [run.status for run in Study.read(copied).runs] == ["failed", "finished"]


@pytest.mark.slow
def test_a_disk_that_refuses_study_json_is_one_line_and_ends_the_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "decay.yaml").write_text(QUESTION)
    written, write = [], study_record.atomic_write

    def full(path: Path, text: str) -> None:
        written.append(path)
        if len(written) > 1:  # the first is the plan
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    start, workers = Worker.start, list[Worker]()
    monkeypatch.setattr(Worker, "start", lambda *given, **more: workers.append(start(*given, **more)) or workers[-1])
    monkeypatch.setattr(study_record, "atomic_write", full)
    command = ["study", str(tmp_path / "decay.yaml"), *COMMAND, "--steps", "100000", "--jobs", "2"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2  # one member fails at once, the other goes on
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(
        "study.json could not be written: No space left on device; the same command goes on where the study stopped"
    )
    for worker in workers:
        worker.process.join(60)
    assert 143 in [worker.process.exitcode for worker in workers]


@pytest.mark.slow
def test_the_command_of_an_extended_study_makes_the_whole(copied: Path) -> None:
    first = Options("own.yaml", "digits", steps=3, jobs=1)
    study = open_study(replace(first, sizes=("60",), seeds=2, learning_rates=(1e-3,)), copied, print)
    assert Study.read(copied) == study and len(study.runs) == 16
    words = shlex.split(study.command)
    given = cli.parse_arguments(words[2:])
    same = replace(
        first,
        sizes=tuple(given.sizes),
        seeds=given.seeds,
        steps=given.steps,
        learning_rates=tuple(given.learning_rates),
    )
    assert words[:3] == ["coatnet", "study", "own.yaml"] and open_study(same, copied, print) == study
    new = open_study(same, Path("new"), print, dry_run=True)
    assert [run.folder for run in new.runs] == [run.folder for run in study.runs]
    assert [recipe_of(new, run) for run in new.runs] == [recipe_of(study, run) for run in study.runs]
    # The steps of a plan by time are those of the plan, whatever machine the command runs on.
    asked = {name: value for name, value in study.asked.items() if name != "steps"}
    change(copied / "study.json", asked=asked | {"minutes": 1.0})
    longer = open_study(replace(first, steps=None, minutes=1.0, seeds=3), copied, print)
    assert "--seeds 3 --steps 3" in longer.command and "--minutes" not in longer.command
    assert open_study(replace(first, seeds=3), copied, print) == longer


def test_a_command_that_the_lock_refuses_changes_nothing(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = (copied / "study.json").read_bytes()
    with hold_study(copied, Part()):
        assert main([*AGAIN, "--seeds", "3", "--out", "own"]) == 2
        assert "is making the study in own" in capsys.readouterr().err
    with hold_study(copied, Part(0, 2)), hold_study(copied, Part(1, 2)):  # of an array, which shares the study
        assert main([*AGAIN, "--seeds", "3", "--out", "own"]) == 2
        assert "is making the study in own" in capsys.readouterr().err
    (copied / ".lock-0-of-3").touch()  # of a process that was killed
    assert main([*AGAIN, "--out", "own"]) == 0
    assert json.loads((copied / "study.json").read_bytes()) == json.loads(record)


def test_a_part_that_waited_for_the_plan_of_another_is_compared_with_it(tmp_path: Path) -> None:
    planning, go_on = threading.Event(), threading.Event()
    options = Options("bias", "digits", sizes=("40",), seeds=1, steps=3, jobs=1)

    def say(text: str) -> None:
        planning.set()
        go_on.wait(60)

    (tmp_path / "bias").mkdir()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(open_study, options, tmp_path / "bias", say)
        assert planning.wait(60)
        same = pool.submit(open_study, options, tmp_path / "bias", print)
        other = pool.submit(open_study, replace(options, steps=4), tmp_path / "bias", print)
        time.sleep(0.2)
        go_on.set()
        assert first.result() == same.result() == Study.read(tmp_path / "bias")
        with pytest.raises(UserError, match="a study with steps 3, not 4"):
            other.result()


def test_a_refused_command_leaves_no_folder_and_weights_of_finished_runs_are_said_to_be_gone(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "bias", "--data", "digits", "--sizes", "200%", "--out", "e/a"]) == 2
    assert not Path("e").exists()
    capsys.readouterr()
    assert main([*AGAIN, "--keep_weights", "--out", "own"]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "--keep_weights" in line]
    assert "2 finished runs" in warning and "new folder" in warning


@pytest.mark.slow
def test_a_study_without_a_folder_is_named_after_its_question(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", "bias", *COMMAND]) == 0
    assert len(Study.read(tmp_path / "studies" / "bias").finished()) == 2


def test_steps_are_measured_on_all_devices(monkeypatch):
    started = []

    def start(function, recipes, threads):
        started.append([recipe["device"] for recipe in recipes])
        return SimpleNamespace(finish=lambda: ("done", [1.0, 2.0]))

    monkeypatch.setattr(Worker, "start", start)
    assert measure_steps([{"device": "auto"}], 3, 1, ["cuda:0", "cuda:1"]) == [1.0, 2.0]
    assert started == [["cuda:0"], ["cuda:1"], ["cuda:0"]]


def test_the_last_run_has_nothing_beside_it_and_takes_its_whole_time():
    planned = Run(member="a", size=40, seed=0, learning_rate=1e-3, steps=3, folder="runs/a", seconds=60.0)
    failed, worker = replace(planned, status="failed", reason="why"), SimpleNamespace(run=planned)
    progress = _Progress(3, 180.0, jobs=2)
    assert progress.line(failed, worker).endswith("why; 0:01:00 left")  # two runs at once
    assert progress.line(failed, worker).endswith("why; 0:01:00 left")
    assert progress.line(failed, worker).endswith("why; 0:00:00 left")


def test_decoding_is_timed_by_some_images(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    read = loader.read_image

    def slowly(images, index):
        time.sleep(0.005)
        return read(images, index)

    monkeypatch.setattr(loader, "read_image", slowly)
    assert 0.005 <= loader.seconds_to_read(open_dataset(tmp_path).training) < 0.1


def write_images(folder: Path) -> Path:
    """A folder of 24 gray images of 8 x 8 pixels in three classes."""
    random = np.random.default_rng(0)
    for number in range(24):
        path = folder / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(path)
    return folder


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Plans take a step of two members to be a tenth of a second; the jobs and threads that each would have measured
    with."""
    asked: list[tuple[int, int]] = []

    def measure(recipes: object, jobs: int, threads: int, devices: object) -> list[float]:
        asked.append((jobs, threads))
        return [0.1, 0.1, 0.0, 0.0]

    monkeypatch.setattr("coatnet.study.plan.measure_steps", measure)
    return asked


def test_images_are_kept_in_memory_where_all_runs_at_once_have_room(
    unmeasured: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(write_images(tmp_path / "images"))
    monkeypatch.setattr("coatnet.training.defaults.memory_room", lambda: ("anywhere", 4_000))  # images take 1,536
    caches = [plan(tmp_path, data=data, sizes=("100%",), steps=1, jobs=jobs).recipe["cache"] for jobs in (1, 2, 4)]
    assert caches == ["memory", "memory", "none"]
    own = "{members: {a: {}, b: {}}, match: false, recipe: {cache: auto}}"  # no run chooses for itself
    assert plan(tmp_path, own, data=data, sizes=("100%",), steps=1, jobs=4).recipe["cache"] == "none"


def test_data_is_the_same_however_its_path_is_written(
    unmeasured: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = str(write_images(tmp_path / "images").resolve())
    (tmp_path / "study").mkdir()
    options = Options("bias", "images", sizes=("100%",), seeds=1, steps=3, jobs=1)
    study = open_study(options, tmp_path / "study", print)
    assert (study.data, study.recipe["data"], study.asked["data"]) == ("images", whole, whole)
    for written in ("images/", "./images", whole):
        again = replace(options, data=written)
        assert open_study(again, tmp_path / "study", print) == study
        assert open_study(again, tmp_path / "new", print, dry_run=True).recipe == study.recipe
    (tmp_path / "moved").mkdir()  # images and study together
    for name in ("images", "study"):
        shutil.copytree(tmp_path / name, tmp_path / "moved" / name)
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path / "moved")
        moved = open_study(options, tmp_path / "moved" / "study", print)
    assert moved.recipe["data"] == str((tmp_path / "moved" / "images").resolve())
    extended = open_study(replace(options, seeds=2), tmp_path / "study", print)
    assert "--data images " in extended.command
    # As earlier releases wrote it.
    record = tmp_path / "study" / "study.json"
    change(record, asked=study.asked | {"data": "images"}, recipe=study.recipe | {"data": "images"}, content=None)
    assert len(open_study(options, tmp_path / "study", print).runs) == 4
    with pytest.raises(UserError, match=r"a study with data .*images, not digits"):
        open_study(replace(options, data="digits"), tmp_path / "study", print)


def test_a_finished_run_is_found_however_the_path_of_its_data_is_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    study = Study.read(finished)
    recipe = recipe_of(study, study.runs[0]).to_dict()
    result = json.loads((finished / study.runs[0].folder / "figures.json").read_text())
    (tmp_path / "figures.json").write_text(json.dumps(result | {"recipe": recipe | {"data": "images"}}))
    whole = str((tmp_path / "images").resolve())
    assert _result(tmp_path, recipe | {"data": whole}) is not None
    assert _result(tmp_path, recipe | {"data": f"{whole}-2"}) is None


def test_a_study_is_not_extended_on_other_images(unmeasured: list, tmp_path: Path) -> None:
    images, folder = write_images(tmp_path / "images"), tmp_path / "study"
    folder.mkdir()
    options = Options("bias", str(images), sizes=("100%",), seeds=1, steps=3, jobs=1)
    study = open_study(options, folder, print)
    assert {split: each.images for split, each in study.content.items()} == {
        "training": study.sizes[0],
        "validation": study.held_out,
    }
    more = replace(options, seeds=5)
    assert len(open_study(more, folder, print, dry_run=True).runs) == 10
    _, splits = open_splits(Recipe.from_dict(study.recipe), print)
    corrected = images / splits.training.describe(0)
    corrected.rename(images / "c" / "corrected.png")
    record = (folder / "study.json").read_bytes()
    for asked in (options, more, replace(more, sizes=("50%",))):
        with pytest.raises(UserError, match=r"study of other images: .* now has .* images") as error:
            open_study(asked, folder, print)
        assert "\n" not in str(error.value) and "another folder" in str(error.value)
    assert (folder / "study.json").read_bytes() == record
    (images / "c" / "corrected.png").rename(corrected)
    assert len(open_study(more, folder, print).runs) == 10


def test_what_changed_of_the_images_is_named_and_a_finished_study_needs_none(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((copied / "study.json").read_text())["content"]
    fewer = content["validation"] | {"images": 3}
    change(copied / "study.json", content={"training": content["training"] | {"sha256": "0"}, "validation": fewer})
    assert main([*AGAIN, "--out", "own"]) == 0  # nothing is left to be trained
    assert main([*AGAIN, "--seeds", "2", "--dry_run", "--out", "own"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("coatnet: error: ")]
    assert "digits now has other names or labels of its training images and " in error
    assert f"{content['validation']['images']:,} held-out images where it had 3" in error
    change(copied / "study.json", content=None)  # of an earlier release
    assert main([*AGAIN, "--seeds", "2", "--dry_run", "--out", "own"]) == 0


def test_processes_of_torchrun_plan_for_as_many_runs_at_once_as_they_make(
    unmeasured: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("coatnet.study.plan.num_cores", lambda: 8)
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    command = ["study", "bias", "--data", "digits", "--sizes", "40", "--seeds", "6", "--minutes", "10", "--dry_run"]
    command += ["--device", "cpu", "--out", str(tmp_path / "study")]
    for jobs, at_once, minutes in ((None, 1, 9), (3, 3, 9)):
        assert main([*command, *(["--jobs", str(jobs)] if jobs else [])]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "to go" in line)
        makes = f"of which process 2 of 2 makes 6, {at_once} at once"
        assert line == f"12 runs to go, {makes}: about {minutes} minutes on this machine"
    assert unmeasured == [(2, 4), (6, 1)]  # runs at once on the machine, and threads of each


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        (["layouts", "--data", "digits", "--seeds", "5"], "QUESTION, --data, --seeds"),
        (["--keep_weights"], "--keep_weights"),
        (["--device", "cpu", "--dry_run"], "--device, --dry_run"),
    ],
)
def test_pages_are_drawn_again_without_other_options(
    options: list[str], left_out: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copied / "study.html").stat().st_mtime_ns
    assert main(["study", *options, "--report", "own"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith(f"trains nothing: leave out {left_out}")
    assert main(["study", "--report", ""]) == 2
    assert (copied / "study.html").stat().st_mtime_ns == before


def test_pages_are_drawn_again_below_the_home_folder_and_before_a_run_is_finished(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(copied.parent))
    study = Study.read(copied)
    runs = tuple(replace(run, status="planned", figures=None) for run in study.runs)
    replace(study, runs=runs).write(copied)
    (copied / "study.html").unlink()
    assert main(["study", "--report", "~/own"]) == 0
    assert "study.html" in capsys.readouterr().out
    assert "Nothing is finished yet" in (copied / "study.html").read_text(encoding="utf-8")


def test_runs_of_a_study_are_listed_with_their_figures(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Study.read(copied).runs
    change(copied / second.folder / "figures.json", figures={"top1": 5})
    assert main(["runs", "own", "--json"]) == 0
    listed = {each["run"]: each for each in json.loads(capsys.readouterr().out)}
    found, damaged = listed[first.folder], listed[second.folder]
    assert first.figures is not None and found["state"] == "finished"
    assert (found["figure"], found["value"], found["n"]) == ("top1", first.figures.top1, first.figures.n)
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    assert damaged["state"].startswith("damaged: top1 must be 0 to 1") and damaged["value"] is None
    (copied / first.folder / "figures.json").unlink()
    assert main(["runs", "own", "--json"]) == 0
    listed = {each["run"]: each for each in json.loads(capsys.readouterr().out)}
    assert listed[first.folder]["state"] == "can be resumed"
