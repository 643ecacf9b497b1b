"""An exported graph answers as its bundle does, at any batch and size, opened by the program it is for alone."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from numpy.typing import NDArray

from coatnet.bundle import load
from coatnet.cli.main import main
from coatnet.data.transforms import EvaluationTransform, Preprocessing, match_channels, normalize

Images = dict[str, torch.Tensor]
Opened = tuple[Callable[[NDArray], NDArray], dict[str, str]]
pytestmark = pytest.mark.slow
NIGHTLY = pytest.mark.nightly
GRAPHS = ["onnx", "openvino", "torch-export", pytest.param("aoti", marks=NIGHTLY)]
FEW = ["torch-export", *(pytest.param(name, marks=NIGHTLY) for name in ("onnx", "openvino", "aoti"))]


def open_export(folder: Path, format: str, given: str, made: str) -> Opened:
    """What runs it, and the metadata inside the model's own file."""
    match format:
        case "onnx":
            graph = onnx.load(folder / "model.onnx")
            onnx.checker.check_model(graph, full_check=True)
            assert not {node.op_type for node in graph.graph.node} & {"BatchNormalization"}
            session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
            assert [each.name for each in session.get_outputs()] in ([made], [made, "novelty"])
            inside = session.get_modelmeta().custom_metadata_map
            return lambda images: session.run(None, {given: images})[0], inside
        case "openvino":
            model = openvino.Core().read_model(folder / "model.xml")
            exact = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            inside = {key: model.get_rt_info(["coatnet", key]).value for key in model.get_rt_info()["coatnet"]}
            return lambda images: exact({given: images})[made], inside
        case "torch-export":
            files = {"metadata.json": ""}
            module = torch.export.load(folder / "model.pt2", extra_files=files).module()
            values = json.loads(files["metadata.json"]).items()
            inside = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values}
            return lambda images: first_output(module(torch.from_numpy(images))), inside
        case "aoti":
            compiled = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
            return lambda images: first_output(compiled(torch.from_numpy(images))), compiled.loader.get_metadata()
    raise AssertionError(format)


def first_output(found: torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]) -> NDArray:
    """Probabilities; a calibrated bundle gives the novelty as well."""
    return (found if isinstance(found, torch.Tensor) else found[0]).detach().numpy()


def network_inputs(images: torch.Tensor) -> NDArray[np.uint8]:
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


@pytest.mark.filterwarnings("default")  # torch's own, on opening
@pytest.mark.parametrize("format", GRAPHS)
def test_images_of_any_size_become_the_probabilities_of_the_bundle(
    clothes_bundle: Path, images: Images, tmp_path: Path, format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(clothes_bundle), "--format", format, "--out", str(out)]) == 0
    printed = capfd.readouterr()
    assert printed.out.startswith(f"{out}: on 64 images of fashion-mnist-small within ") and str(out) in printed.out
    # torch 2.6 says so on a machine with nvcc and no GPU.
    assert [line for line in printed.err.splitlines() if not line.startswith("No CUDA runtime is found")] == []

    files = {"openvino": ["model.bin", "model.xml"], "onnx": ["model.onnx"]}.get(format, ["model.pt2"])
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*files, "classify.py", "example.png", "metadata.json", "parity.json", "parity.md"]
    )
    run, inside = open_export(out, format, "images", "probabilities")
    bundle = load(clothes_bundle)
    for batch in images.values():
        with torch.no_grad():
            expected = bundle.model(EvaluationTransform(bundle.preprocessing).batch(batch)).softmax(1)
        np.testing.assert_allclose(run(network_inputs(batch)), expected.numpy(), atol=1e-3)
    assert len(expected.unique()) > 1

    metadata = json.loads((out / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["classes"] == list(bundle.classes) == json.loads(inside["classes"])
    assert json.loads(inside["preprocessing"]) == metadata["preprocessing"] and inside["format"] == format
    assert metadata["preprocessing"].pop("inside") == ["resize", "cut", "normalise"]
    assert Preprocessing(**metadata["preprocessing"]) == bundle.preprocessing
    assert metadata["input"]["shape"] == [-1, -1, -1, 3] and metadata["output"]["activation"] == "softmax"

    parity = json.loads((out / "parity.json").read_text(encoding="utf-8"))
    assert parity["num_images"] == 64 and parity["batch_sizes"] == [1, 2, 5]
    assert parity["probability_difference"] < 1e-3 and parity["agreement"] == 1.0
    assert [each["batch_size"] for each in parity["latency"]] == [1, 5]
    assert "largest difference of a probability" in (out / "parity.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("default")
@pytest.mark.nightly
@pytest.mark.parametrize("format", ["torch-export", "onnx", "openvino"])
def test_several_labels_are_sigmoids_and_names_stay_what_they_are(
    colorful: Path, images: Images, tmp_path: Path, format: str
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(colorful), "--format", format, "--out", str(out)]) == 0
    run, inside = open_export(out, format, "images", "probabilities")
    bundle = load(colorful)
    for batch in images.values():
        with torch.no_grad():
            expected = bundle.model(EvaluationTransform(bundle.preprocessing).batch(batch)).sigmoid()
        np.testing.assert_allclose(run(network_inputs(batch)), expected.numpy(), atol=1e-3)
    assert json.loads(inside["classes"]) == ["é", "<b>", "c"] and json.loads(inside["multilabel"]) is True


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("format", FEW)
def test_with_logits_it_is_the_bare_network(colorful: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / "out"
    assert main(["export", str(colorful), "--format", format, "--logits", "--out", str(out)]) == 0
    run, inside = open_export(out, format, "images", "logits")
    bundle, images = load(colorful), torch.randn(7, 3, 64, 64)
    for number in (1, 2, 5, 7):
        with torch.no_grad():
            expected = bundle.model(images[:number])
        np.testing.assert_allclose(run(images[:number].numpy()), expected.numpy(), rtol=1e-3, atol=1e-3)
    assert json.loads(inside["input"])["shape"] == [-1, 3, 64, 64]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("logits", [False, pytest.param(True, marks=NIGHTLY)], ids=["probabilities", "logits"])
@pytest.mark.parametrize("format", FEW)
def test_with_dynamic_size_the_network_sees_an_image_at_its_own(
    clothes_bundle: Path, images: Images, tmp_path: Path, format: str, logits: bool
) -> None:
    out = tmp_path / "out"
    options = ["--dynamic-size", *(["--logits"] if logits else [])]
    assert main(["export", str(clothes_bundle), "--format", format, "--out", str(out), *options]) == 0
    run, _ = open_export(out, format, "images", "logits" if logits else "probabilities")
    bundle = load(clothes_bundle)
    for batch in (images["five"], images["two"][..., :64, :96], images["tall"][..., :33, :32]):
        inputs = normalize(match_channels(batch, bundle.preprocessing), bundle.preprocessing)
        with torch.no_grad():
            expected = bundle.model(inputs)
        found = run(inputs.contiguous().numpy() if logits else network_inputs(batch))
        np.testing.assert_allclose(found, (expected if logits else expected.softmax(1)).numpy(), atol=2e-3)


def test_weights_too_large_for_one_file_lie_beside_it(
    clothes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 100_000)
    out = tmp_path / "out"
    assert main(["export", str(clothes_bundle), "--format", "onnx", "--out", str(out)]) == 0
    written = {path.name: path.stat().st_size for path in out.iterdir()}
    assert written["model.onnx.data"] > written["model.onnx"]
    assert json.loads((out / "parity.json").read_text())["agreement"] == 1
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    assert len(json.loads(session.get_modelmeta().custom_metadata_map["classes"])) == 10
