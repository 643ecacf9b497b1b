"""What the command prints at its end opens the export; a Triton repository is as its guide shows it."""

import json
import re
import shutil
import subprocess
import sys
from inspect import getsource
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from PIL import Image
from tests.pages import ROOT, blocks, programs

import coatnet
from coatnet.bundle import Bundle
from coatnet.cli.main import main
from coatnet.data.decode import decode
from coatnet.data.transforms import Preprocessing
from coatnet.export import decode_image
from coatnet.export.parity import image_files
from coatnet.inference import Predictor

TRITON = ROOT / "docs/guides/triton.md"


@pytest.fixture
def desk(clothes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the guide takes it for granted."""
    shutil.copytree(clothes_bundle, tmp_path / "runs/mine/bundle")
    noise = np.random.default_rng(0).integers(0, 255, (120, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Without coatnet: `-I -S` leaves out what .pth files add, such as an editable install.
ALONE = [sys.executable, "-I", "-S", "-c"]
PATHS = [path for path in sys.path if path.endswith("site-packages")]
PROLOGUE = f"import sys; sys.path += {PATHS!r}; sys.modules['coatnet'] = None\n"


def files_of_every_kind(folder: Path) -> list[Path]:
    """Those of the parity check, and more that decoders treat in different ways."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 90, 3), dtype=np.uint8))
    made = dict(enumerate(image_files().values()))
    animation = [photo.resize((40, 30)).quantize(8, dither=Image.Dither.NONE) for _ in range(2)]
    for name, image, options in (
        ("broken.jpg", photo, {"exif": b"Exif\0\0garbage"}),
        ("turned.png", photo, {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x08\0\0\0\0\0\0\0"}),
        ("moving.gif", animation[0], {"save_all": True, "append_images": animation[1:], "transparency": 3}),
        ("moving.webp", photo.convert("RGBA"), {"save_all": True, "append_images": [photo.rotate(9).convert("RGBA")]}),
        ("one_color.png", photo, {"transparency": (12, 13, 14)}),
        ("bits.tif", photo.convert("1"), {}),
        ("sixteen.png", Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)), {"transparency": 77}),
    ):
        image.save(folder / name, **options)
    for name, data in made.items():
        (folder / f"{name}.img").write_bytes(data)
    return sorted(path for path in folder.iterdir() if path.is_file())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_code_of_an_export_without_coatnet_answers_as_predict_does(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fully: what the command prints, classify.py and its decoding, on images of every kind, against `predict`."""
    assert main(["export", "runs/mine/bundle", "--format", "torch-export", "--out", "out"]) == 0
    _, _, printed = capsys.readouterr().out.partition("Details are in parity.md.")
    code = dedent(printed.partition("\n")[2])
    (desk / "kinds").mkdir()
    files = files_of_every_kind(desk / "kinds")
    for file in files:
        pixels = decode_image.decode(file)
        assert np.array_equal(decode(file.read_bytes(), file.name).permute(1, 2, 0).numpy(), pixels), file.name
    bundle = coatnet.load("runs/mine/bundle")
    expected = Predictor(bundle, "torch", "fp32")([*files, desk / "out/example.png"], top_k=10)

    loop = f"from classify import *\nimport torch\nfor file in {[str(file) for file in files]!r}:\n"
    loop += "    print(model(torch.from_numpy(decode(file)[None]))[0][0].tolist())"
    opened = 'import torch; model = torch.export.load("out/model.pt2").module()\n'
    done = subprocess.run(
        [*ALONE, PROLOGUE + "sys.path.insert(0, 'out')\n" + code + opened + loop],
        capture_output=True, text=True, check=True, cwd=desk,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines.pop(5) == f"{expected[-1].novelty:7.2%}  novelty: the share of known images that look less foreign"
    shown = [line.split(maxsplit=1) for line in lines[:5]]
    *of_files, of_example = expected
    assert [name for _, name in shown] == list(of_example.classes[:5])
    assert [float(share[:-1]) for share, _ in shown] == pytest.approx(
        [100 * p for p in of_example.probabilities[:5]], abs=0.006
    )
    for line, prediction in zip(lines[5:], of_files, strict=True):
        given = dict(zip(bundle.classes, json.loads(line), strict=True))
        assert [given[name] for name in prediction.classes] == pytest.approx(prediction.probabilities, abs=1e-5)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "format", ["safetensors", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("timm", "onnx", "openvino"))]
)
def test_what_the_command_prints_names_the_classes_of_its_example(
    desk: Path, format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "runs/mine/bundle"
    if format == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
        source = str(timm_bundle(desk / "runs/timm"))
    assert main(["export", source, "--format", format, "--out", "out"]) == 0
    code = dedent(capsys.readouterr().out.partition("Details are in parity.md.")[2].partition("\n")[2])
    exec(code, {})
    printed = capsys.readouterr().out
    bundle = coatnet.load(source)
    (expected,) = Predictor(bundle, "torch", "fp32")(["out/example.png"], top_k=1)
    assert expected.classes[0] in printed.splitlines()[0] and printed.count("%") == min(5, len(bundle.classes))
    share = float(printed.split("%")[0])
    # Pillow resizes as torch does but for single gray levels
    assert share == pytest.approx(100 * expected.probabilities[0], abs=0.006 if format in ("onnx", "openvino") else 0.5)


def timm_bundle(folder: Path) -> Path:
    torch.manual_seed(0)
    model = coatnet.create_model("coatnet_nano_rw_224", num_classes=3)
    return Bundle(model.eval(), ("a", "b", "c"), Preprocessing(resolution=64), multilabel=False).save(folder)


@pytest.mark.nightly
def test_the_repository_of_the_guide_to_triton_is_written(desk: Path) -> None:
    (arguments,) = programs(blocks(TRITON, "sh")[0].text, "coatnet")
    assert main(arguments) == 0
    (tree,) = (block.text for block in blocks(TRITON) if block.text.startswith("repository/"))
    named = set(re.findall(r"─ ([\w./-]+\.\w+)", tree))
    (model,) = (path for path in Path("repository").iterdir() if path.is_dir())
    files = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    files |= {path.name for path in Path("repository").iterdir() if path.is_file()}
    assert files == named


def test_the_guide_shows_the_code_that_decodes() -> None:
    shown = "".join(block.text for block in blocks(ROOT / "docs/guides/export.md", "python"))
    assert getsource(decode_image.decode) in shown
