"""Images of twelve bands, and images that are not square, go the way of photographs: trained, measured, explained,
exported, served."""

import base64
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.pages import ROOT
from tests.training.trainers import trainer_for

import coatnet
from coatnet.bundle import Bundle
from coatnet.cli.main import main
from coatnet.data.decode import Scale
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError
from coatnet.export import decode_image
from coatnet.export.signature import Signature
from coatnet.model.network import create_model
from coatnet.model.resize import change_channels, first_convolution

pytest.importorskip("tifffile")
sys.path.insert(0, str(ROOT / "examples"))
example: Any = import_module("twelve_bands")

TINY = {"model": "coatnet-femto-16", "batch_size": 16, "num_workers": 0, "epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bands")
    example.make_folders(root, per_class=14)
    return root


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    report = coatnet.train(coatnet.Recipe(data=str(folder / "bands"), **TINY), folder / "run")
    assert report.figures["n"] > 2
    return folder / "run"


def test_the_scale_of_the_data_is_stored_and_measured_again_alike(run: Path, folder: Path) -> None:
    bundle = coatnet.load(run / "bundle")
    seen = bundle.preprocessing
    assert seen.scale == Scale(12, 0, 4095) and bundle.model.in_channels == 12
    assert len({*seen.mean}) == 12 and all(0 < each < 1 for each in (*seen.mean, *seen.std))
    written = json.loads((run / "report.json").read_text())
    assert coatnet.evaluate(bundle, str(folder / "bands")).figures == written["figures"]
    assert "data:image/webp" in (run / "report.html").read_text()  # thumbnails and maps


def test_all_ways_to_ask_give_one_answer(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((folder / "bands" / "wet").glob("*.tif"))
    predictor = coatnet.Predictor(run / "bundle", "torch", "fp32")
    (expected,) = predictor(path, top_k=3)
    values = import_module("coatnet.data.channels").read_values(path.read_bytes(), "a.tif")

    assert predictor(values, top_k=3)[0].probabilities == expected.probabilities
    assert (
        predictor(torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1), top_k=3)[0].classes == expected.classes
    )
    assert main(["predict", str(run), str(path), "--engine", "torch", "--precision", "fp32", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert tuple(printed["probabilities"]) == expected.classes
    assert main(["predict", str(run), str(folder / "bands"), "--engine", "torch", "--out", str(folder / "p.csv")]) == 0
    assert main(["explain", str(run), str(path), "--out", str(folder / "maps")]) == 0
    (drawn,) = (folder / "maps").glob("*.png")
    with Image.open(drawn) as image:
        assert image.width > 100
    assert main(["doctor", str(folder / "bands")]) == 0
    assert "12 channels, values from 0 to 4095" in capsys.readouterr().out


@pytest.mark.slow
def test_an_onnx_export_takes_the_values_of_the_files(run: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = next((folder / "bands" / "dry").glob("*.tif"))
    (expected,) = coatnet.Predictor(run / "bundle", "torch", "fp32")(path)
    assert main(["export", str(run), "--format", "onnx", "--out", str(tmp_path / "onnx")]) == 0
    metadata = json.loads((tmp_path / "onnx/metadata.json").read_text())
    assert metadata["input"]["dtype"] == "float32" and metadata["input"]["shape"] == [-1, -1, -1, 12]
    assert metadata["preprocessing"]["value_range"] == [0, 4095]
    files = json.loads((tmp_path / "onnx/parity.json").read_text())["files"]  # decoded by the code of classify.py
    assert files.keys() == {"a NumPy array", "a NumPy archive", "a turned TIFF"} and max(files.values()) < 1e-3
    program = [sys.executable, str(tmp_path / "onnx/classify.py"), str(path)]
    said = subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()
    assert said[1] == expected.classes[0]
    assert abs(float(said[0].rstrip("%")) / 100 - expected.probabilities[0]) < 1e-3


def test_the_server_takes_files_and_values(run: Path, folder: Path) -> None:
    pytest.importorskip("fastapi")
    from tests.server.serving import running

    path = next((folder / "bands" / "moist").glob("*.tif"))
    predictor = coatnet.Predictor(run / "bundle", "torch", "fp32")
    (expected,) = predictor(path, top_k=3)
    values = import_module("coatnet.data.channels").read_values(path.read_bytes(), "a.tif").astype(float)
    encoded = base64.b64encode(path.read_bytes()).decode()

    def request(**tensor: Any) -> dict[str, Any]:
        return {"inputs": [{"name": "images", **tensor}], "outputs": [{"name": "probabilities"}]}

    with running(predictor) as server:
        uploaded = server.predict(path.read_bytes()).json
        as_file = server.infer(request(datatype="BYTES", shape=[1], data=[encoded])).json
        size = [1, 16, 16, 12]
        as_values = server.infer(request(datatype="FP32", shape=size, data=values[None].tolist())).json
        wrong = server.infer(request(datatype="UINT8", shape=size, data=[1] * 16 * 16 * 12))
        photograph = server.predict(next((folder / "rgb" / "moist").glob("*.png")).read_bytes())
    assert expected.classes[0] in json.dumps(uploaded)
    for found in (as_file, as_values):
        row = dict(zip(predictor.classes, found["outputs"][0]["data"], strict=True))
        np.testing.assert_allclose([row[name] for name in expected.classes], expected.probabilities, atol=1e-5)
    assert "this model takes FP32" in wrong.json["error"]
    assert photograph.code == "channels"


def test_a_network_for_rgb_begins_for_twelve_bands(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=2, in_channels=3, resolution=16)
    rgb = Bundle(model.eval(), ("a", "b"), Preprocessing(resolution=16)).save(tmp_path / "rgb")
    recipe = coatnet.Recipe(data=str(folder / "bands"), name="finetune", init=str(rgb), batch_size=16, epochs=0.3)
    coatnet.train(recipe, tmp_path / "run")
    assert coatnet.load(tmp_path / "run/bundle").model.in_channels == 12
    stem = first_convolution(model)
    theirs = model.state_dict()[stem]
    unnamed = trainer_for(recipe, init=coatnet.load(rgb)).model.state_dict()[stem]
    torch.testing.assert_close(unnamed, change_channels(theirs, 12), rtol=0, atol=0)
    names = ["nir", "red", "green", "blue", *(f"band {number}" for number in range(5, 13))]
    named = recipe.changed({"preprocessing": {"channel_names": names}})
    kept = trainer_for(named, init=coatnet.load(rgb)).model.state_dict()[stem]
    torch.testing.assert_close(kept, change_channels(theirs, 12, (1, 2, 3)), rtol=0, atol=0)
    assert not torch.equal(kept, unnamed)


def test_files_of_other_channels_end_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has 12 channels, 5 are asked for"):
        coatnet.train(coatnet.Recipe(data=str(folder / "bands"), channels=5, **TINY), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_that_are_not_square_are_seen_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for label, shift in (("left", 0), ("right", 24)):
        for number in range(10):
            pixels = random.integers(0, 60, (24, 48, 3), dtype=np.uint8)
            pixels[:, shift : shift + 24] += 150
            (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{number}.png")
    arguments = ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--resolution", "16x32"]
    options = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]
    assert main([*arguments, *options, "--augmentation.placement", "crop"]) == 0
    bundle = coatnet.load(tmp_path / "run/bundle")
    assert bundle.preprocessing.size == (16, 32) and bundle.model.resolution == 32
    config = json.loads((tmp_path / "run/bundle/config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 32] and "value_range" not in config["pretrained_cfg"]
    written = json.loads((tmp_path / "run/report.json").read_text())
    assert written["resolution"] == "16 x 32"
    assert coatnet.evaluate(bundle, str(tmp_path / "data")).figures == written["figures"]

    path = tmp_path / "data/left/0.png"
    for method in ("layercam", "attention", "occlusion"):
        (explained,) = coatnet.Predictor(bundle, "torch", "fp32").explain(path, method=method)
        assert explained.heat is not None and explained.heat.shape == (16, 32)
    for views in ("flip", "ten-crop"):
        assert coatnet.Predictor(bundle, "torch", "fp32", views=views)(path)[0].error is None
    with Image.open(path) as image:
        pixels = np.asarray(image)
    with torch.no_grad():  # what exports compute, from pixels on
        exported = Signature().module(bundle.uncalibrated()).eval()(torch.from_numpy(pixels.copy())[None])[0]
    (raw,) = coatnet.Predictor(bundle, "torch", "fp32", raw=True)(path)
    order = [bundle.classes.index(name) for name in raw.classes]
    np.testing.assert_allclose(exported.numpy()[order], raw.probabilities, atol=1e-3)
    prepared = decode_image.prepare(pixels, {**asdict(bundle.preprocessing)})
    assert prepared.shape == (1, 3, 16, 32)
    # The same command resumes: the size in recipe.yaml is that which was asked for.
    assert main([*arguments, *options, "--augmentation.placement", "crop"]) == 0


@pytest.mark.nightly
def test_twelve_bands_are_learned_and_their_colors_are_not(tmp_path: Path) -> None:
    example.make_folders(tmp_path)
    figures = {}
    for kind in ("bands", "rgb"):
        recipe = coatnet.Recipe(data=str(tmp_path / kind), epochs=15, seed=1)
        figures[kind] = coatnet.train(recipe, tmp_path / "runs" / kind).figures["top1"]
    assert figures["bands"] >= 0.9 and figures["rgb"] <= 0.6  # of three classes


KINDS: dict[str, dict[str, Any]] = {
    "deep": {"resolution": 16, "mean": (0.4,) * 12, "std": (0.2,) * 12, "value_range": (0, 4095)},
    "wide": {"resolution": (16, 32)},
    "several": {"resolution": 16},
}
CHEAP = ("safetensors", "space")
OTHERS = ("torch-export", "onnx", "openvino", "triton", "web", "executorch")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [*CHEAP, *(pytest.param(form, marks=pytest.mark.nightly) for form in OTHERS)])
def test_every_format_gives_the_answers_of_such_a_model(
    form: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each export is compared with its bundle as it is written; a browser takes 8-bit RGB alone, and says so."""
    needed = {"onnx": "onnxscript", "triton": "onnxscript", "web": "onnxscript"}
    if form not in (*CHEAP, "torch-export"):
        pytest.importorskip(needed.get(form, form))
    if form == "web" and not shutil.which("npm"):
        pytest.skip("needs npm")
    seen = Preprocessing(**KINDS[kind])
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=3, in_channels=seen.channels, resolution=seen.side)
    torch.nn.init.normal_(model.get_classifier().weight)
    model.train()(torch.randn(8, seen.channels, *seen.size))
    bundle = Bundle(model.eval(), ("a", "b", "c"), seen, multilabel=kind == "several").save(tmp_path / "bundle")
    code, out = main(["export", str(bundle), "--format", form, "--out", str(tmp_path / "out")]), tmp_path / "out"
    if (form, kind) == ("web", "deep"):
        error = capsys.readouterr().err
        assert code == 2 and "a browser reads 8-bit RGB images" in error and not out.exists()
    else:
        assert code == 0 and (out / "parity.json").exists()
