"""`Predictor.predict_paths`: predictions equal the model's output, in the order of the paths, with errors in place."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.bundle import Bundle
from coatnet.cli.main import main
from coatnet.cli.predict import print_prediction
from coatnet.data.decode import decode
from coatnet.data.folder import expand_paths, open_images
from coatnet.data.transforms import EvaluationTransform, Preprocessing
from coatnet.errors import UserError
from coatnet.inference.predictor import Prediction, Predictor
from coatnet.model.network import create_model

CLASSES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.manual_seed(0)
    model = create_model("coatnet-femto", num_classes=4, resolution=32)
    torch.nn.init.normal_(model.get_classifier().weight)
    return Bundle(model.eval(), CLASSES, Preprocessing(resolution=32))


@pytest.fixture(scope="module")
def predictor(bundle: Bundle) -> Predictor:
    return Predictor(bundle, "torch", "fp32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in (
        "img10.png",
        "img2.png",
        "deep/er/3.PNG",
        ".hidden.png",
        "deep/.cache/4.png",
        "ü \N{GRINNING FACE}.png",
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = generator.integers(20, 60, 2)
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    (tmp_path / "in" / "notes.txt").write_text("not searched for")
    return tmp_path / "in"


def logits_of(bundle: Bundle, path: Path) -> torch.Tensor:
    images = EvaluationTransform(bundle.preprocessing)(decode(path.read_bytes(), str(path)))[None]
    with torch.inference_mode():
        return bundle.model(images)[0]


def test_a_prediction_is_the_softmax_of_the_model(predictor: Predictor, folder: Path) -> None:
    for prediction in predictor.predict_paths([folder], top_k=3):
        probabilities = logits_of(predictor.bundle, Path(prediction.name)).softmax(0)
        assert prediction.error is None
        assert prediction.classes == tuple(CLASSES[i] for i in probabilities.argsort(descending=True)[:3])
        assert prediction.probabilities == pytest.approx(sorted(probabilities.tolist())[:0:-1], abs=1e-5)


def test_multilabel_probabilities_are_sigmoids(bundle: Bundle, folder: Path) -> None:
    path = folder / "img2.png"
    several = Bundle(bundle.model, CLASSES, bundle.preprocessing, multilabel=True)
    (prediction,) = Predictor(several, "torch", "fp32").predict_paths([path])
    expected = sorted(logits_of(bundle, path).sigmoid().tolist(), reverse=True)
    assert prediction.probabilities == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_folders_are_read_in_natural_order_for_any_batch_size(
    predictor: Predictor, folder: Path, batch_size: int
) -> None:
    predictions = predictor.predict_paths([folder], batch_size=batch_size)
    names = [str(Path(prediction.name).relative_to(folder)) for prediction in predictions]
    assert names == ["img2.png", "img10.png", "ü \N{GRINNING FACE}.png", "deep/er/3.PNG"]


def test_unreadable_files_keep_their_place_and_have_an_error(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    whole = folder / "img2.png"
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:300])
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "empty").mkdir()
    names = ("cut.png", "page.jpg", "nowhere.jpg", "empty")
    paths = [whole, *(tmp_path / name for name in names), whole]
    predictions = list(predictor.predict_paths(paths, batch_size=2))
    assert [prediction.name for prediction in predictions] == [str(path) for path in paths]
    assert [prediction.error is None for prediction in predictions] == [True, False, False, False, False, True]
    assert predictions[3].error == "no such file" and predictions[4].error == "no images in this folder"
    assert all("\n" not in prediction.error for prediction in predictions[1:5] if prediction.error)
    assert predictions[0] == predictions[5]


def test_a_named_file_needs_no_suffix(predictor: Predictor, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes((folder / "img2.png").read_bytes())
    (prediction,) = predictor.predict_paths([tmp_path / "image"], top_k=99)
    assert prediction.error is None and len(prediction.classes) == 4


def test_numbers_below_one_are_refused_before_iteration(predictor: Predictor) -> None:
    for numbers in ({"top_k": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match="both must be at least 1"):
            predictor.predict_paths([], **numbers)


def test_the_command_follows_links_and_counts_what_it_leaves_out(
    bundle: Bundle, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "more").symlink_to(folder)
    (given / "up").symlink_to(given)
    for name in ("a.mp4", "b.mp4", "notes", ".hidden.png"):
        (given / name).write_bytes(b"something")
    saved = str(bundle.save(tmp_path / "bundle"))
    expected = [str(given / "more" / path.relative_to(folder)) for path, _ in expand_paths([folder])]
    main(["predict", saved, str(given), "--top-k", "1", "--json"])
    printed = capsys.readouterr()
    assert [json.loads(line)["path"] for line in printed.out.splitlines()] == expected
    left_out = "hidden or not images by their names: 3 hidden, 2 .mp4, 1 without suffix, 1 .txt\n"
    assert printed.err.endswith(f"coatnet: 7 files in the folders left out, {left_out}")
    main(["predict", saved, f"{given}/*/*.png", "https://host/a.png", "no*.png", "--json"])  # quoted, or on Windows
    *found, url, pattern = map(json.loads, capsys.readouterr().out.splitlines())
    assert found and all(each["path"].startswith(f"{given}/more/") for each in found)
    assert url["error"].startswith("a URL, which is not opened") and "no file matches it" in pattern["error"]


def test_a_long_class_name_is_cut_in_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_prediction(Prediction("a.png", ("x" * 1_000_000,), (1.0,)), as_json=False)
    assert len(capsys.readouterr().out) < 2_000


def test_a_single_path_is_one_path(predictor: Predictor, folder: Path) -> None:
    for path in (folder / "img2.png", str(folder / "img2.png")):
        (prediction,) = predictor.predict_paths(path)
        assert prediction.name == str(path) and prediction.error is None
        assert len(open_images(path)) == 1


def test_bytes_in_an_array_are_one_error(predictor: Predictor) -> None:
    for array in (np.zeros(9, np.uint8), torch.zeros(9, dtype=torch.uint8), np.uint8(3)):
        with pytest.raises(UserError):
            predictor(array)


def test_a_nul_in_what_is_written_is_one_line(
    bundle: Bundle, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, out = str(bundle.save(tmp_path / "bundle")), f"{tmp_path}/a\0"
    for command in (
        ["train", "--data", "digits", "--out", out],
        ["features", saved, "--images", str(folder / "img2.png"), "--out", f"{out}.npy"],
        ["export", saved, "--format", "safetensors", "--out", out],
    ):
        assert main(command) == 2
        assert capsys.readouterr().err.endswith(" is not a path: it holds a NUL\n")
