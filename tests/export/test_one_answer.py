"""An image has one answer, refusal and novelty included: by every engine, an export, the server and a batch file."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.server.serving import running

from coatnet.bundle import load
from coatnet.data.builtin import open_fashion_mnist_small
from coatnet.export import decode_image
from coatnet.export.export import export_bundle
from coatnet.inference import Predictor
from coatnet.inference.batch import open_samples, predict_to_file

REJECT, COVERAGE = 0.1, 0.8
PROBABILITY, NOVELTY = 1e-4, 0.005  # float32 in another order; a novelty has steps of 0.001


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve garments and eight images of noise, as files."""
    folder = tmp_path_factory.mktemp("images")
    garments = open_fashion_mnist_small().validation.images[::170]
    noise = np.random.default_rng(0).integers(0, 256, (8, 28, 28), dtype=np.uint8)
    for number, pixels in enumerate([*np.asarray(garments), *noise]):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the programs that open an export
def test_every_way_to_ask_gives_the_same_answer(clothes_bundle: Path, folder: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    parquet = pytest.importorskip("pyarrow.parquet")
    files, options = sorted(folder.iterdir()), {"reject": REJECT, "coverage": COVERAGE}
    predictor = Predictor(clothes_bundle, "torch", "fp32", **options)  # pyrefly: ignore
    expected = predictor(files, top_k=10)
    unknown = [each.unknown for each in expected]
    assert 0 < sum(unknown) < len(files) and all(unknown[-8:])
    found: dict[str, list[tuple]] = {}

    for engine in ("openvino", "onnxruntime"):
        other = Predictor(clothes_bundle, engine, "fp32", **options)  # pyrefly: ignore
        found[engine] = [
            (a.classes, a.probabilities, a.novelty, a.unknown, a.class_set) for a in other(files, top_k=10)
        ]

    predict_to_file(predictor, open_samples([str(folder)]), tmp_path / "out.parquet", top_k=10)
    found["file"] = [
        (row["classes"], row["probabilities"], row["novelty"], row["unknown"], row["class_set"])
        for row in parquet.read_table(tmp_path / "out.parquet").to_pylist()
    ]

    with running({"one": predictor}) as address:
        answers = [address.predict(file.read_bytes(), "?top_k=10").json for file in files]
        tensor = {"name": "images", "shape": [len(files)], "datatype": "BYTES"}
        data = [base64.b64encode(file.read_bytes()).decode() for file in files]
        reply = address.infer({"inputs": [tensor | {"data": data}]}).json
    found["server"] = [
        (
            [row["class"] for row in each["predictions"]],
            [row["probability"] for row in each["predictions"]],
            each["novelty"],
            each["unknown"],
            each["set"],
        )
        for each in answers
    ]
    outputs = {each["name"]: each["data"] for each in reply["outputs"]}
    assert outputs["novelty"] == pytest.approx([each.novelty for each in expected], abs=NOVELTY)
    assert outputs["unknown"] == unknown

    export_bundle(load(clothes_bundle), "onnx", tmp_path / "exported")
    metadata = json.loads((tmp_path / "exported/metadata.json").read_text("utf-8"))
    session = onnxruntime.InferenceSession(tmp_path / "exported/model.onnx")
    limit = metadata["calibration"]["sets"]["limits"][str(COVERAGE)]
    found["export"] = []
    for file in files:
        probabilities, novelty = session.run(None, {"images": decode_image.decode(file)[None]})
        order = (-probabilities[0]).argsort(kind="stable")
        names = [metadata["classes"][k] for k in order]
        inside = [metadata["classes"][k] for k in order if 1 - probabilities[0, k] <= limit]
        found["export"].append(
            (names, probabilities[0, order].tolist(), novelty[0], novelty[0] > 1 - REJECT + 1e-6, inside)
        )

    for way, rows in found.items():
        for one, (classes, probabilities, novelty, is_unknown, class_set) in zip(expected, rows, strict=True):
            assert classes[0] == one.classes[0], way
            assert dict(zip(classes, probabilities, strict=True)) == pytest.approx(
                dict(zip(one.classes, one.probabilities, strict=True)), abs=PROBABILITY
            ), way
            assert novelty == pytest.approx(one.novelty, abs=NOVELTY), way
            assert (bool(is_unknown), set(class_set)) == (one.unknown, set(one.class_set or ())), way
