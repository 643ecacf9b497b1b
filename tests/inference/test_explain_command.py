"""`coatnet explain` as a program: where options stand, names that begin with a hyphen, and a full standard output."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.bundle import Bundle
from coatnet.cli import predict
from coatnet.cli.main import main
from coatnet.data.transforms import Preprocessing
from coatnet.model.network import create_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=2, resolution=16).eval()
    saved = Bundle(model, ("cat", "dog"), Preprocessing(resolution=16)).save(tmp_path_factory.mktemp("x") / "bundle")
    return str(saved)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two images."""
    for number, name in enumerate(("holiday.png", "-x.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_option_may_stand_between_the_bundle_and_the_images(bundle: str, folder: Path) -> None:
    assert main(["explain", bundle, "--out", "heat", "holiday.png"]) == 0
    assert len(list((folder / "heat").iterdir())) == 1
    assert main(["explain", "--out", "both", bundle, "holiday.png", "--method", "attention", "holiday.png"]) == 0
    assert len(list((folder / "both").iterdir())) == 2


def test_a_file_whose_name_begins_with_a_hyphen_stands_behind_two(
    bundle: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", bundle, "--out", "heat", "--", "-x.png"]) == 0
    assert main(["explain", bundle, "holiday.png", "--out", "heat", "--", "-x.png"]) == 0
    assert {path.name.partition(".")[0] for path in (folder / "heat").iterdir()} == {"-x", "holiday"}
    capsys.readouterr()
    assert main(["predict", "--engine", "torch", "--", bundle, "-x.png"]) == 0
    assert capsys.readouterr().out.startswith("-x.png: ")
    given = predict.parse_arguments(["--top-k", "3", "--", "bundle", "--top_k", "-"])
    assert (given.top_k, given.bundle, given.paths) == (3, "bundle", ["--top_k", "-"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["holiday.png"], ["--biases"]])
def test_a_full_standard_output_is_not_blamed_on_the_folder(bundle: str, folder: Path, arguments: list[str]) -> None:
    program = [sys.executable, "-m", "coatnet", "explain", bundle, *arguments, "--out", "heat"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    assert "standard output: No space left on device" in ended.stderr and "could not be written" not in ended.stderr
    assert list((folder / "heat").iterdir())


def test_a_folder_that_cannot_be_made_is_named(bundle: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").touch()
    for arguments in (["holiday.png"], ["--biases"]):
        assert main(["explain", bundle, *arguments, "--out", "file/heat"]) == 2
        assert capsys.readouterr().err == "coatnet: error: file/heat could not be written: Not a directory\n"
