"""Every command and every script of the guides to exporting is run, but for those that need a Triton server."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coatnet
from coatnet.bundle import Bundle
from coatnet.cli.main import main
from coatnet.data.transforms import Preprocessing
from coatnet.export import FORMATS

GUIDES = Path(__file__).resolve().parents[2] / "docs" / "guides"
EXPORT, TRITON = ((GUIDES / name).read_text(encoding="utf-8") for name in ("export.md", "triton.md"))


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", guide, re.DOTALL)


def commands(guide: str) -> list[list[str]]:
    """The arguments of each call of coatnet."""
    lines = [shlex.split(line, comments=True) for block in blocks(guide, "sh") for line in block.splitlines()]
    return [arguments for name, *arguments in lines if name == "coatnet"]


SCRIPTS = blocks(EXPORT, "python")


@pytest.fixture
def desk(clothes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the guides take it for granted."""
    shutil.copytree(clothes_folder, tmp_path / "runs/mine/bundle")
    torch.manual_seed(0)
    model = coatnet.create_model("test_coatnet", num_classes=2, resolution=64)
    model.train()(torch.randn(4, 3, 64, 64))
    Bundle(model.eval(), ("a", "b"), Preprocessing(resolution=64)).save(tmp_path / "runs/timm/bundle")
    noise = np.random.default_rng(0).integers(0, 255, (120, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_format_has_its_command() -> None:
    told = commands(EXPORT) + commands(TRITON)
    assert {arguments[arguments.index("--format") + 1] for arguments in told} == set(FORMATS)
    assert {verb for verb, *_ in told} == {"export"}


@pytest.mark.filterwarnings("default")  # of those whose files are opened
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            arguments, marks=[pytest.mark.slow] if {"aoti", "openvino"} & set(arguments) else [], id=arguments[-1]
        )
        for arguments in commands(EXPORT)
    ],
)
def test_a_command_is_run_and_then_the_scripts_that_open_what_it_wrote(desk: Path, arguments: list[str]) -> None:
    assert main(arguments) == 0
    out = arguments[arguments.index("--out") + 1]
    scripts = [script for script in SCRIPTS if f"{out}/" in script or f'{out}"' in script]
    assert scripts or "--int8" in arguments
    for script in scripts:
        names: dict = {}
        exec(compile(script, "docs/guides/export.md", "exec"), names)
        if "probabilities" in names:
            probabilities = np.asarray(torch.as_tensor(names["probabilities"]).detach())
            assert probabilities.shape == (1, 10) and probabilities.sum() == pytest.approx(1, abs=1e-3)
        if "classes" in names:
            assert names["classes"][1] == "Trouser"


def test_every_script_opens_what_a_command_wrote() -> None:
    outs = [arguments[arguments.index("--out") + 1] for arguments in commands(EXPORT)]
    assert all(any(f"{out}/" in script or f'{out}"' in script for out in outs) for script in SCRIPTS)


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
    names = {"pictures": given, "images": torch.zeros(1, coatnet.load("runs/mine/bundle").model.in_channels, 16, 16)}
    exec("\n".join(line[2:] for line in lines), names)
    made = names["logits" if format == "safetensors" else "probabilities"]
    assert tuple(made.shape) == (1, 10)


@pytest.mark.slow
def test_the_repository_of_the_guide_to_triton_is_written(desk: Path) -> None:
    (arguments,) = commands(TRITON)
    assert main(arguments) == 0
    tree = TRITON[TRITON.index("\nrepository/\n") :].partition("```")[0]
    named = set(re.findall(r"─ ([\w./-]+\.\w+)", tree))
    (model,) = (path for path in Path("repository").iterdir() if path.is_dir())
    files = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    files |= {path.name for path in Path("repository").iterdir() if path.is_file()}
    assert files == named
    for script in blocks(TRITON, "python"):
        ast.parse(script)
