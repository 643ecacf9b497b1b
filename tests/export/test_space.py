"""A real Gradio serves the page of a Space, with the answers of the bundle; transformers opens timm's networks."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from coatnet import Predictor, create_model
from coatnet.bundle import Bundle, load
from coatnet.cli.main import main
from coatnet.data.transforms import Preprocessing
from coatnet.export.export import export_bundle
from coatnet.version import __version__

IMAGE = Path(__file__).parents[2] / "examples/images/trouser.png"


def test_a_space_holds_the_bundle_and_says_how_it_runs(clothes_bundle: Path, tmp_path: Path) -> None:
    assert main(["export", str(clothes_bundle), "--format", "space", "--out", str(tmp_path / "space")]) == 0
    space = tmp_path / "space"
    head = yaml.safe_load((space / "README.md").read_text("utf-8").split("---")[1])
    assert head["sdk"] == "gradio" and (space / head["app_file"]).exists()
    assert (space / "requirements.txt").read_text() == f"coatnet=={__version__}\n"
    assert load(space / "model").classes == load(clothes_bundle).classes
    compile((space / "app.py").read_text("utf-8"), "app.py", "exec")
    assert "reject=0.05" in (space / "app.py").read_text("utf-8")


def ask_space(space: Path, image: Path) -> tuple[dict, str]:
    """What the page answers, started as the hub starts it."""
    from gradio_client import Client, handle_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(space.parent), "no_proxy": "*"}
    app = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment)
    try:
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        return Client(f"http://127.0.0.1:{port}", verbose=False).predict(handle_file(str(image)))
    finally:
        app.terminate()
        app.wait(30)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_gradio_gives_the_answers_of_the_bundle(clothes_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install gradio")
    export_bundle(load(clothes_bundle), "space", tmp_path / "space")
    answer, note = ask_space(tmp_path / "space", IMAGE)
    (expected,) = Predictor(clothes_bundle, reject=0.05)(IMAGE)
    assert [row["label"] for row in answer["confidences"]] == list(expected.classes)
    assert [row["confidence"] for row in answer["confidences"]] == pytest.approx(expected.probabilities, abs=1e-3)
    assert bool(note) == expected.unknown


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_gradio_takes_the_files_of_a_model_for_other_values_than_rgb(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install gradio")
    torch.manual_seed(0)
    seen = Preprocessing(resolution=16, mean=(0.4,) * 12, std=(0.2,) * 12, value_range=(0, 4095))
    model = create_model("coatnet-femto-16", num_classes=3, in_channels=12, resolution=16)
    bundle = Bundle(model.eval(), ("a", "b", "c"), seen)
    export_bundle(bundle, "space", tmp_path / "space")
    assert (tmp_path / "space" / "requirements.txt").read_text().startswith("coatnet[tiff]==")
    example = tmp_path / "space" / "example.npy"
    answer, _ = ask_space(tmp_path / "space", example)
    (expected,) = Predictor(bundle)(example)
    assert {row["label"]: row["confidence"] for row in answer["confidences"]} == pytest.approx(
        dict(zip(expected.classes, expected.probabilities, strict=True)), abs=1e-3
    )


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_transformers_opens_a_network_of_timm_without_remote_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = create_model("test_coatnet", num_classes=3, resolution=64)
    model.train()(torch.randn(8, 3, 64, 64))
    bundle = Bundle(model.eval(), ("cat", "dog", "owl"), Preprocessing(resolution=64))
    export_bundle(bundle, "timm", tmp_path / "timm")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "timm"), trust_remote_code=False)
    found = {row["label"]: row["score"] for row in classify(str(tmp_path / "image.png"))}
    (expected,) = Predictor(bundle, "torch", "fp32")(tmp_path / "image.png")
    # transformers' own Pillow backend resizes in 8 bits
    assert found == pytest.approx(dict(zip(expected.classes, expected.probabilities, strict=True)), abs=0.02)
