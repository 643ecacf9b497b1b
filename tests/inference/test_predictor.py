"""`Predictor`: the same predictions for an image in any form and with any engine."""

import io
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from coatnet.bundle import Bundle
from coatnet.cli.main import main
from coatnet.data.decode import BadImage
from coatnet.data.transforms import EvaluationTransform, Preprocessing
from coatnet.errors import UserError
from coatnet.inference import engines
from coatnet.inference.engines import ENGINES, open_engine, split_batch
from coatnet.inference.graph_cache import cached_graph
from coatnet.inference.predictor import Predictor
from coatnet.model.network import create_model
from coatnet.system.hardware import multiplies_bf16

CLASSES = ("ant", "bee", "cat", "dog", "elk")


def make_bundle(channels: int = 3, resolution: int = 48, **changes: object) -> Bundle:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-64", num_classes=5, in_channels=channels, resolution=resolution)
    torch.nn.init.normal_(model.get_classifier().weight)
    level = {"mean": (0.4, 0.5, 0.6)[:channels], "std": (0.2, 0.3, 0.4)[:channels]}
    preprocessing = Preprocessing(resolution=resolution, crop_fraction=0.75, **level)
    return Bundle(model.eval(), CLASSES, preprocessing, **changes)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """An image with something to see in it, larger than the model looks at."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (8, 10, 3), dtype=np.uint8))
    return np.array(coarse.resize((100, 80), Image.Resampling.BICUBIC))


def expected(bundle: Bundle, pixels: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return bundle.model(EvaluationTransform(bundle.preprocessing)(pixels)[None])[0].softmax(0)


def test_every_form_of_an_image_has_the_same_prediction(pixels: np.ndarray, tmp_path: Path) -> None:
    predictor, encoded = Predictor(make_bundle(), "torch", "fp32"), io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    (tmp_path / "a.png").write_bytes(encoded.getvalue())
    forms = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        encoded.getvalue(),
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
        Image.fromarray(pixels),
        bytearray(encoded.getvalue()),
        memoryview(encoded.getvalue()),
    ]
    together = predictor(forms, top_k=5, batch_size=2)
    probabilities = expected(predictor.bundle, pixels)
    order = probabilities.argsort(descending=True)
    for prediction in (*together, *(predictor(form)[0] for form in forms)):
        assert prediction.error is None
        assert prediction.classes == tuple(CLASSES[index] for index in order)
        assert prediction.probabilities == pytest.approx(probabilities[order].tolist(), abs=1e-5)
    assert [prediction.name for prediction in together] == [str(tmp_path / "a.png")] * 2 + [
        "image 2",
        "image 3",
        "image 4",
        "image 5",
        "image 6",
        "image 7",
    ]


def test_open_files_are_read_from_where_they_are(pixels: np.ndarray, tmp_path: Path) -> None:
    predictor = Predictor(make_bundle(), "torch", "fp32")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    probabilities = predictor(tmp_path / "a.png")[0].probabilities
    with (tmp_path / "a.png").open("rb") as file, Image.open(tmp_path / "a.png") as image:
        memory = io.BytesIO(b"before" + (tmp_path / "a.png").read_bytes())
        memory.seek(6)
        for given in (file, memory, image):
            (prediction,) = predictor(given)
            assert prediction.error is None and prediction.probabilities == probabilities
        assert [each.error for each in predictor([file, memory])] == [
            "empty: the file has 0 bytes"
        ] * 2  # at their ends
    assert predictor(file)[0].error == "unreadable: read of closed file"
    with pytest.raises(UserError, match="gives str: open it in binary mode"), (tmp_path / "a.png").open("r") as file:
        file.read = lambda size: "text"  # type: ignore[method-assign]
        predictor(file)  # type: ignore[arg-type]


def test_images_of_pillow_follow_the_rules_for_files(tmp_path: Path) -> None:
    predictor = Predictor(make_bundle(), "torch", "fp32")
    half = Image.new("RGBA", (60, 40), (200, 0, 0, 0))
    half.paste((0, 200, 0, 255), (0, 0, 30, 40))
    half.save(tmp_path / "transparent.png")
    half.convert("RGB").save(tmp_path / "turned.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0")
    half.quantize(4).save(tmp_path / "palette.gif")
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27).save(tmp_path / "wide.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            np.testing.assert_array_equal(predictor.prepare(image), predictor.prepare(path), str(path))
    with pytest.raises(BadImage, match="pixels: floating-point"):
        predictor.prepare(Image.new("F", (8, 8)))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_pillow_follow_the_rules_for_files_where_a_model_has_a_scale(channels: int, tmp_path: Path) -> None:
    seen = Preprocessing(resolution=16, mean=(0.5,) * channels, std=(0.3,) * channels, value_range=(0, 255))
    model = create_model("coatnet-femto-16", num_classes=5, in_channels=channels, resolution=16).eval()
    predictor = Predictor(Bundle(model, CLASSES, seen), "torch", "fp32")
    half = Image.new("RGBA", (60, 40), (200, 0, 0, 0))
    half.paste((0, 200, 0, 255), (0, 0, 30, 40))
    color, gray, turned = half.convert("RGB"), half.convert("L"), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    images = {
        1: {
            "two.png": gray.convert("1"),
            "gray.jpg": gray,
            "wide.png": Image.fromarray(np.asarray(gray) * np.uint16(200)),
        },
        3: {"turned.png": color, "palette.png": color.quantize(4), "palette.gif": color.quantize(4), "a.jpg": color},
        4: {"clear.png": half, "palette.png": half.quantize(4)},
    }[channels]
    for name, image in images.items():
        image.save(tmp_path / name, exif=turned)
        with Image.open(tmp_path / name) as opened:
            np.testing.assert_array_equal(predictor.prepare(opened), predictor.prepare(tmp_path / name), name)


def test_a_truncated_image_of_pillow_is_an_error_of_that_image(tmp_path: Path) -> None:
    seen = Preprocessing(resolution=16, value_range=(0, 255))
    model = create_model("coatnet-femto-16", num_classes=5, resolution=16).eval()
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1500])
        with Image.open(tmp_path / name) as opened:
            broken, whole = Predictor(Bundle(model, CLASSES, seen), "torch", "fp32")([opened, noise])
        assert broken.error is not None and broken.error.startswith("corrupt: ") and whole.error is None


def test_paths_that_cannot_be_images_have_an_error_each(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    given = [tmp_path / "pipe.jpg", tmp_path / "zeros.jpg", tmp_path, "a\0b.png", "https://host/a.png"]
    reasons = ("a named pipe", "a device", "a folder", "no name of a file", "a URL, which is not opened")
    for prediction, reason in zip(Predictor(make_bundle(), "torch", "fp32")(given), reasons, strict=True):
        assert prediction.error and prediction.error.startswith(f"unreadable: {reason}")


def test_grayscale_and_color_images_are_converted_for_the_model(pixels: np.ndarray) -> None:
    gray = pixels[..., 0]
    color_predictor = Predictor(make_bundle(), "torch", "fp32")
    assert color_predictor(gray)[0].probabilities == color_predictor(np.stack([gray] * 3, axis=-1))[0].probabilities
    gray_predictor = Predictor(make_bundle(channels=1), "torch", "fp32")
    assert gray_predictor(pixels)[0].probabilities[0] == pytest.approx(
        expected(gray_predictor.bundle, pixels).max().item(), abs=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "torch-compiled"])
@pytest.mark.parametrize("channels", [1, 3])
def test_engines_compute_the_same_probabilities(engine: str, channels: int, pixels: np.ndarray) -> None:
    pytest.importorskip(engine)
    bundle = make_bundle(channels)
    predictor = Predictor(bundle, engine, "fp32")
    assert (predictor.engine.name, predictor.engine.precision) == (engine, "fp32")
    for count in (1, 2, 5):  # the graph was exported with two
        images = [np.roll(pixels, 7 * shift, axis=1) for shift in range(count)]
        for prediction, image in zip(predictor(images, top_k=5), images, strict=True):
            wanted = expected(bundle, image).sort(descending=True).values
            assert prediction.probabilities == pytest.approx(wanted.tolist(), abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_bf16_is_close_to_fp32_and_not_equal(engine: str, pixels: np.ndarray) -> None:
    pytest.importorskip(engine)
    bundle = make_bundle()
    predictor = Predictor(bundle, engine, "bf16")
    found = predictor.probabilities(predictor.prepare(pixels)[None])[0]
    assert np.abs(found - expected(bundle, pixels).numpy()).max() < 0.05
    exact = Predictor(bundle, engine, "fp32").probabilities(predictor.prepare(pixels)[None])[0]
    assert found.dtype == np.float32
    if engine == "torch" or multiplies_bf16(torch.device("cpu")):  # OpenVINO computes in fp32 on other processors
        assert not np.array_equal(found, exact)


@pytest.mark.nightly
def test_compiled_engine_equals_eager_engine(pixels: np.ndarray) -> None:
    bundle = make_bundle()
    eager, compiled = (Predictor(bundle, engine, "fp32") for engine in ("torch", "torch-compiled"))
    for count in (1, 3):
        views = np.stack([eager.prepare(np.roll(pixels, 5 * shift, axis=0)) for shift in range(count)])
        np.testing.assert_allclose(compiled.probabilities(views), eager.probabilities(views), atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 16, 23, 40])
def test_batches_are_split_into_powers_of_two_without_padding(count: int) -> None:
    images = np.arange(count, dtype=np.uint8)[:, None]
    parts = split_batch(images)
    assert {len(part) for part in parts} <= {1, 2, 4, 8, 16}
    np.testing.assert_array_equal(np.concatenate(parts), images)


def test_probabilities_of_views_are_averaged(pixels: np.ndarray) -> None:
    bundle = make_bundle()
    plain, flipped = Predictor(bundle, "torch", "fp32"), Predictor(bundle, "torch", "fp32", views="flip")
    one, mirrored = (plain.probabilities(plain.prepare(each)[None])[0] for each in (pixels, pixels[:, ::-1].copy()))
    both = flipped.probabilities(flipped.prepare(pixels)[None])[0]
    np.testing.assert_allclose(both, (one + mirrored) / 2, atol=1e-2)  # the mirrored image is resized anew
    ten = Predictor(bundle, "torch", "fp32", views="ten-crop").prepare(pixels)
    assert ten.shape == (10, 48, 48, 3)
    np.testing.assert_array_equal(ten[5:], ten[:5, :, ::-1])
    np.testing.assert_array_equal(Predictor(bundle, "torch", "fp32", views="five-crop").prepare(pixels), ten[:5])
    np.testing.assert_array_equal(ten[0], plain.prepare(pixels)[0])
    shifted = Predictor(bundle, "torch", "fp32", views="ten-shift").prepare(pixels)
    np.testing.assert_array_equal(shifted[5:], shifted[:5, :, ::-1])
    np.testing.assert_array_equal(shifted[0], ten[0])
    up, down, left, right = shifted[1:5]  # by a pixel
    np.testing.assert_array_equal(up[:-1], ten[0][1:])
    np.testing.assert_array_equal(down[1:], ten[0][:-1])
    np.testing.assert_array_equal(left[:, :-1], ten[0][:, 1:])
    np.testing.assert_array_equal(right[:, 1:], ten[0][:, :-1])
    assert not any(edge.any() for edge in (up[-1], down[0], left[:, -1], right[:, 0]))
    resized = Predictor(make_bundle(resolution=64), "torch", "fp32")  # its shorter side would be 85
    assert len({view.tobytes() for view in ten}) == 10 and resized.image_shape == (1, 64, 64, 3)


def test_multilabel_probabilities_are_sigmoids(pixels: np.ndarray) -> None:
    predictor = Predictor(make_bundle(multilabel=True), "torch", "fp32")
    found = predictor.probabilities(predictor.prepare(pixels)[None])[0]
    assert not np.isclose(found.sum(), 1) and ((found > 0) & (found < 1)).all()


def test_unreadable_images_keep_their_place_and_have_an_error(pixels: np.ndarray) -> None:
    predictor = Predictor(make_bundle(), "torch", "fp32")
    predictions = predictor([pixels, b"", "nowhere.png", pixels])
    assert [prediction.error is None for prediction in predictions] == [True, False, False, True]
    assert predictions[1].error and predictions[1].error.startswith("empty")
    assert predictions[2].error and predictions[2].error.startswith("unreadable")
    with pytest.raises(BadImage, match="mine: format"):
        predictor.prepare(b"<html>", "mine")


def test_an_answer_that_is_not_finite_is_an_error_of_the_image(pixels: np.ndarray, tmp_path: Path, capsys) -> None:
    bundle = make_bundle()
    bundle.model.get_classifier().weight.data.fill_(3e38)  # finite, as loading demands; products with it are not
    (prediction,) = Predictor(bundle, "torch", "fp32")(pixels)
    assert prediction.classes == () and prediction.error and "not finite" in prediction.error
    Image.fromarray(pixels).save(tmp_path / "a.png")
    saved = str(bundle.save(tmp_path / "bundle"))
    assert main(["predict", saved, str(tmp_path / "a.png"), "--json"]) == 1
    line = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert line["probabilities"] == {} and "not finite" in line["error"]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert (
        main(["predict", saved, str(tmp_path / "a.png"), "--engine", "torch", "--out", str(tmp_path / "a.parquet")])
        == 1
    )
    (row,) = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert row["top1"] is None and row["classes"] == [] and "not finite" in row["error"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "float32 of shape .* as uint8"),
        (np.zeros((8, 8, 4), np.uint8), r"has shape \(8, 8, 4\)"),
        (7, "is a int: give a path"),
        (Path, "is a type: give a path"),
    ],
)
def test_values_that_are_not_images_are_refused(given: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Predictor(make_bundle(), "torch", "fp32")([given])  # type: ignore[list-item]


def test_errors_about_unknown_options_list_the_known_ones() -> None:
    for choice, right in (({"engine": "tpu"}, "openvino"), ({"precision": "fp8"}, "bf16"), ({"views": "two"}, "flip")):
        with pytest.raises(UserError, match=right):
            Predictor(make_bundle(), **choice)


def test_crops_that_would_all_be_equal_are_refused() -> None:
    bundle = make_bundle()
    for crop, fraction, is_refused in (("squash", 1.0, True), ("squash", 0.8, False), ("center", 1.0, False)):
        seen = replace(bundle.preprocessing, crop=crop, crop_fraction=fraction)
        with pytest.raises(UserError, match="would be equal") if is_refused else nullcontext():
            Predictor(replace(bundle, preprocessing=seen), "torch", "fp32", views="ten-crop")
        Predictor(replace(bundle, preprocessing=seen), "torch", "fp32", views="flip")


def test_only_torch_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    assert Predictor(make_bundle(), "torch", "fp32", device="cpu").engine.name == "torch"
    with pytest.raises(UserError, match="device 'tpu' is unknown"):
        Predictor(make_bundle(), device="tpu")
    monkeypatch.setattr("coatnet.inference.engines.choose_device", torch.device)
    with pytest.raises(UserError, match="engine onnxruntime runs on the CPU, not on cuda"):
        Predictor(make_bundle(), "onnxruntime", device="cuda")


def test_error_about_a_missing_engine_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatnet.inference.engines.find_spec", lambda name: None if name == "openvino" else sys)
    with pytest.raises(UserError, match=r"pip install 'coatnet\[openvino\]'"):
        open_engine(make_bundle(), "openvino")


def test_an_engine_whose_graph_needs_another_package_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    find = engines.find_spec
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "openvino" else find(name))
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert open_engine(make_bundle(), device="cpu").name == "torch"
    warning = "engine onnxruntime is left out: an ONNX model needs onnx: pip install 'coatnet[onnx]'"
    assert capsys.readouterr().err == f"coatnet: warning: {warning}\n"
    with pytest.raises(UserError, match="an ONNX model needs onnx"):
        open_engine(make_bundle(), "onnxruntime")


def graphs(cache: Path) -> list[Path]:
    """The kept ones, without their locks."""
    return [path for path in (cache / "graphs").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_a_cached_graph_is_used_for_equal_weights_only(own_cache: Path, pixels: np.ndarray) -> None:
    pytest.importorskip("openvino")
    bundle = make_bundle()
    first = Predictor(bundle, "openvino", "fp32")(pixels)
    (cached,) = graphs(own_cache)
    (cached / "model.xml").touch()
    before = (cached / "model.bin").stat().st_mtime_ns
    assert Predictor(bundle, "openvino", "fp32")(pixels) == first
    assert (cached / "model.bin").stat().st_mtime_ns == before and len(graphs(own_cache)) == 1
    with torch.no_grad():
        bundle.model.get_classifier().bias.add_(torch.arange(5.0))
    changed = Predictor(bundle, "openvino", "fp32")(pixels)
    assert len(graphs(own_cache)) == 2
    assert changed[0].probabilities == pytest.approx(sorted(expected(bundle, pixels).tolist())[::-1], abs=2e-5)


@pytest.mark.nightly
def test_a_cached_graph_may_have_its_weights_in_another_file(
    own_cache: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 100_000)
    bundle = make_bundle()
    (prediction,) = Predictor(bundle, "onnxruntime")(pixels)
    (cached,) = graphs(own_cache)
    assert sorted(path.name for path in cached.iterdir()) == ["SHA256SUMS", "model.onnx", "model.onnx.data"]
    assert prediction.probabilities == pytest.approx(sorted(expected(bundle, pixels).tolist())[::-1], abs=2e-5)


def test_the_least_recently_used_graph_is_removed(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatnet.inference.graph_cache.MAX_CACHED_GRAPHS", 2)
    bundle = make_bundle()
    written = [cached_graph(bundle, "graph", str(version), Path.touch) for version in (1, 2)]
    cached_graph(bundle, "graph", "1", Path.unlink)  # used again, and not made again
    written.append(cached_graph(bundle, "graph", "3", Path.touch))
    assert [path.exists() for path in written] == [True, False, True]
