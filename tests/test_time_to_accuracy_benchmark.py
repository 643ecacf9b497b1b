"""The benchmark of accuracy per minute: one split for all contenders, and results that are kept."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "time_to_accuracy.py"


@pytest.fixture(autouse=True)
def modules_beside_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("time_to_accuracy", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """Two classes of 15 images below subfolders, with a copy, a mirrored image and a class of three beside them."""
    random = np.random.default_rng(0)
    for name, count in (("circles", 15), ("squares", 15), ("few", 3)):
        for number in range(count):
            folder = tmp_path / "drawings" / name / str(number % 2)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 120, (20, 30, 4), np.uint8)
            pixels[..., 0] += 120 * (name == "circles")
            Image.fromarray(pixels).save(folder / f"{number}.png")
    inside = tmp_path / "drawings" / "circles" / "0"
    for name in ("copy.png", "0_mirror.png"):
        (inside / name).write_bytes((inside / "0.png").read_bytes())
    return tmp_path / "drawings"


def test_all_learn_from_one_split_that_depends_on_the_bytes_of_the_images(drawings: Path, tmp_path: Path) -> None:
    def names(folder: Path, split: str) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in (folder / split).glob("*/*"))

    gather = script().gather
    whole, part = (gather(str(drawings), fraction, 1.0, tmp_path / "out") for fraction in (1.0, 0.5))
    assert len(names(whole, "val")) == 6 and len(names(whole, "train")) == 24
    assert {path.name for path in (whole / "train").iterdir()} == {"circles", "squares"}
    assert names(part, "val") == names(whole, "val")
    few = names(gather(str(drawings), 1.0, 0.3, tmp_path / "out"), "val")
    assert len(few) == 2 and set(few) < set(names(whole, "val"))
    assert len(names(part, "train")) == 12 and set(names(part, "train")) < set(names(whole, "train"))


def test_folders_of_one_name_are_kept_apart(drawings: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "drawings"
    other.parent.mkdir()
    drawings.joinpath("squares").rename(drawings / "triangles")
    shutil.copytree(drawings, other)
    (other / "triangles").rename(other / "lines")
    classes = [
        {path.name for path in (script().gather(str(folder), 1.0, 1.0, tmp_path / "out") / "train").iterdir()}
        for folder in (drawings, other)
    ]
    assert classes == [{"circles", "triangles"}, {"circles", "lines"}]


def test_results_with_other_images_held_out_have_panels_of_their_own(tmp_path: Path) -> None:
    shared = {"data": "stamps", "fraction": 1.0, "minutes": 5.0, "threads": 2, "seed": 0, "contender": "ours"}
    results = [
        shared | {"held_out": held_out, "correct": 70, "n": n, "epochs": 3.0, "seconds": 300.0}
        for held_out, n in ((1.0, 158), (0.5, 79))
    ]
    script().draw(results, tmp_path / "two.png")
    script().draw(results[:1], tmp_path / "one.png")
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.width > 1.5 * one.width


def test_the_table_shows_how_far_ours_is_ahead_in_the_same_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    shared = {"data": "stamps", "fraction": 1.0, "held_out": 1.0, "minutes": 5.0, "threads": 2, "n": 1000}
    correct = {"ours": (505, 520, 517), "resnet18": (328, 343, 348), "vit_tiny": (265,)}
    results = [
        shared | {"seed": seed, "contender": contender, "correct": value, "epochs": 3.0, "seconds": 300.0}
        for contender, values in correct.items()
        for seed, value in enumerate(values)
    ]
    script().print_table(results)
    ours, resnet, vit = (line for line in capsys.readouterr().out.splitlines() if "stamps" in line)
    assert "+" not in ours
    assert "+17.4 (16.3 to 18.6)" in resnet
    assert "+24.0 " in vit and "+24.0 (" not in vit


def test_part_of_the_garments_keeps_all_that_are_held_out_unless_fewer_are_asked_for(tmp_path: Path) -> None:
    from coatnet import open_dataset

    splits = open_dataset(script().gather("fashion-mnist-small", 0.01, 1.0, tmp_path))
    fewer = open_dataset(script().gather("fashion-mnist-small", 0.01, 0.1, tmp_path)).validation
    whole = open_dataset("fashion-mnist-small")
    assert np.bincount(splits.training.labels).tolist() == [10] * 10
    assert splits.classes == whole.classes and len(splits.validation) == len(whole.validation)
    share = np.bincount(fewer.labels) / np.bincount(whole.validation.labels)
    assert np.allclose(share, 0.1, atol=0.003)
    assert np.array_equal(splits.validation.read(7)[0], whole.validation.read(7)[0])


@pytest.mark.nightly
def test_the_benchmark_runs_and_repeats_nothing(drawings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "--data", str(drawings), "--minutes", "0.3", "--seeds", "0"]
    command += ["--contenders", "ours", "resnet18", "--out", str(out)]
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=240) for _ in range(2))
    assert first.returncode == 0, first.stderr
    results = json.loads((out / "results.json").read_text())
    assert [each["contender"] for each in results] == ["ours", "resnet18"]
    assert all(each["n"] == 6 and 0 <= each["correct"] <= 6 for each in results)
    assert first.stdout.count("seed 0, ") == 2 and second.stdout.count("seed 0, ") == 0
    assert (out / "accuracy.png").stat().st_size > 10_000
