"""`coatnet features` and `coatnet probe`: what they write, print and refuse."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from coatnet.bundle import Bundle, load
from coatnet.cli.main import main
from coatnet.data.builtin import open_digits
from coatnet.data.transforms import Preprocessing
from coatnet.evaluation.features import extract_features
from coatnet.model.network import create_model


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: 30 images of each of three digits."""
    folder = tmp_path_factory.mktemp("digits")
    dataset = open_digits(0.1).training
    for name in "037":
        (folder / name).mkdir()
        for number in np.flatnonzero(dataset.labels == int(name))[:30]:
            Image.fromarray(dataset.images[number]).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model whose classes are not those of the images."""
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=2, in_channels=1, resolution=8)
    folder = tmp_path_factory.mktemp("model") / "bundle"
    return Bundle(model, ("x", "y"), Preprocessing(resolution=8, crop_fraction=1.0, mean=(0.5,), std=(0.5,))).save(
        folder
    )


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The line that the program prints about a user's error."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("coatnet: error: ") and printed.err.count("\n") == 1
    return printed.err


def test_features_are_written_for_data(
    bundle: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.npy"
    assert main(["features", str(bundle), "--data", str(digits), "--out", str(out), "--batch-size", "20"]) == 0
    assert capsys.readouterr().out == f"{out}: 90 images, 128 features each\n"
    expected, _, names = extract_features(load(bundle), digits).gather()
    np.testing.assert_allclose(np.load(out), expected, rtol=1e-4, atol=1e-5)
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == list(names)
    assert all(row["label"] == Path(row["path"]).parent.name for row in rows)

    part = tmp_path / "part.parquet"
    assert main(["features", str(bundle), "--data", str(digits), "--out", str(part), "--split", "validation"]) == 0
    held_out = parquet.read_table(part)["path"].to_pylist()
    assert 3 <= len(held_out) < 90 and held_out == list(names[-len(held_out) :])


def test_features_are_written_for_images_and_unreadable_ones_are_named(
    bundle: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits / "3", tmp_path / "threes")
    bad = sorted((tmp_path / "threes").iterdir())[4]
    bad.write_bytes(bad.read_bytes()[:40])
    out = tmp_path / "found.npy"
    assert main(["features", str(bundle), "--out", str(out), "--images", str(tmp_path / "threes"), str(digits)]) == 1
    printed = capsys.readouterr()
    assert "found.npy: 119 images" in printed.out
    name = bad.relative_to(os.path.commonpath([bad.parent, digits]))
    assert printed.err.count("\n") == 1 and printed.err.startswith(f"coatnet: error: {name}: ")
    assert np.load(out).shape == (119, 128)


def test_probe_prints_text_or_json(bundle: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["probe", str(bundle), "--data", str(digits), "--k", "3"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["k"] == 3 and report["num_classes"] == 3 and report["n"] + report["num_training"] == 90
    assert report["linear"] > 0.6 and report["knn"] > 0.6 and report["knn_interval"][0] <= report["knn"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert f"linear probe: top-1 accuracy {100 * report['linear']:.1f} % (95 % interval " in text
    assert "k-NN, k = 3" in text


def test_a_user_error_is_one_line_and_writes_nothing(
    bundle: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "f.npy"
    features = ("features", bundle, "--out", out)
    for answer, arguments in {
        "not allowed with": (*features, "--data", digits, "--images", digits),
        "--data --images is required": features,
        "--out": ("features", bundle, "--data", digits),
        "--data is empty: give a path": (*features, "--data", ""),
        "--split is for --data": (*features, "--images", digits, "--split", "training"),
        "no such file": (*features, "--images", digits, "nowhere.png"),
        "'--batch-size'": (*features, "--data", digits, "--bs", "3"),
        "batch_size is 0": (*features, "--data", digits, "--batch-size", "0"),
        ".parquet": ("features", bundle, "--data", digits, "--out", tmp_path / "f.txt"),
        "no/such/data": ("probe", bundle, "--data", "no/such/data"),
        "it must be 1 to": ("probe", bundle, "--data", digits, "--k", "99"),
        "is not a bundle": ("probe", digits, "--data", digits),
    }.items():
        assert answer in error_line(capsys, *arguments)
    assert not list(tmp_path.iterdir())
