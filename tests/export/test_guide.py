"""What the command prints at its end opens the export; a Triton repository is as its guide shows it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.pages import ROOT, blocks, programs

import coatnet
from coatnet.cli.main import main

TRITON = ROOT / "docs/guides/triton.md"


@pytest.fixture
def desk(clothes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the guide takes it for granted."""
    shutil.copytree(clothes_folder, tmp_path / "runs/mine/bundle")
    noise = np.random.default_rng(0).integers(0, 255, (120, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "format",
    ["safetensors", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch-export", "onnx", "openvino"))],
)
def test_what_the_command_says_at_its_end_opens_the_export(
    desk: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "runs/mine/bundle", "--format", format, "--out", "out"]) == 0
    _, _, script = capsys.readouterr().out.partition("Details are in parity.md.")
    lines = [line for line in script.splitlines() if line.startswith("  ")]
    given = np.asarray(Image.open("image.jpg").convert("RGB"))[None].copy()
    normalized = torch.zeros(1, coatnet.load("runs/mine/bundle").model.in_channels, 16, 16)
    names = {"images": normalized if format == "safetensors" else given}
    exec("\n".join(line[2:] for line in lines), names)
    made = names["logits" if format == "safetensors" else "probabilities"]
    assert tuple(made.shape) == (1, 10)


@pytest.mark.slow
def test_the_repository_of_the_guide_to_triton_is_written(desk: Path) -> None:
    (arguments,) = programs(blocks(TRITON, "sh")[0].text, "coatnet")
    assert main(arguments) == 0
    (tree,) = (block.text for block in blocks(TRITON) if block.text.startswith("repository/"))
    named = set(re.findall(r"─ ([\w./-]+\.\w+)", tree))
    (model,) = (path for path in Path("repository").iterdir() if path.is_dir())
    files = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    files |= {path.name for path in Path("repository").iterdir() if path.is_file()}
    assert files == named
