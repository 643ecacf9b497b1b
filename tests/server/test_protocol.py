"""The Open Inference Protocol v2: its answers are the predictor's, its errors its own."""

import base64
import json

import numpy as np
import pytest
from tests.server.serving import HOSTILE, Address, FailingEngine, image, make_predictor, running

SHAPE = [2, 32, 32, 3]
PIXELS = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def pixels(data: object = None, shape: object = SHAPE, **changes: object) -> dict:
    data = PIXELS.ravel().tolist() if data is None else data
    return {"inputs": [{"name": "images", "datatype": "UINT8", "shape": shape, "data": data, **changes}]}


def test_the_server_and_its_model_describe_themselves(server: Address) -> None:
    assert server.ask("GET", "/v2").json["name"] == "coatnet"
    model = server.ask("GET", "/v2/models/one").json
    assert model["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    assert model["outputs"][0] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}
    assert server.ask("GET", "/v2/models/one/ready").json == {"name": "one", "ready": True}
    missing = server.ask("GET", "/v2/models/two")
    assert missing.status == 404 and isinstance(missing.json["error"], str)


def test_what_is_read_is_also_asked_for_without_its_body(server: Address) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2", "/v2/models/one/ready", "/models", "/metrics", "/docs"):
        answer = server.ask("HEAD", path)
        assert (answer.status, answer.body) == (200, b"") and int(answer.headers["content-length"]) > 0
    assert server.ask("HEAD", "/v2/models/two").status == 404
    assert server.ask("HEAD", "/predict").status == 405


@pytest.mark.parametrize("data", [PIXELS.ravel().tolist(), PIXELS.tolist()], ids=["flat", "nested"])
def test_pixels_are_answered_as_the_predictor_does(server: Address, data: list) -> None:
    answer = server.infer({"id": "a", **pixels(data)}).json
    probabilities, best = answer["outputs"]
    expected = make_predictor().probabilities(PIXELS[:, None])
    assert (answer["model_name"], answer["id"]) == ("one", "a")
    assert (probabilities["name"], probabilities["datatype"], probabilities["shape"]) == (
        "probabilities",
        "FP32",
        [2, 10],
    )
    np.testing.assert_allclose(np.reshape(probabilities["data"], (2, 10)), expected, atol=1e-5)
    earlier = server.infer(pixels(data, name="pictures")).json  # the name of the input in release 0.1
    assert earlier["outputs"] == answer["outputs"]
    assert best["data"] == [HOSTILE[index] for index in expected.argmax(axis=1)]


def test_encoded_images_are_answered_as_predict_does(server: Address) -> None:
    files = [image(seed, 60 + seed, 50) for seed in range(3)]
    asked = {
        "inputs": [
            {
                "name": "images",
                "datatype": "BYTES",
                "shape": [3],
                "data": [base64.b64encode(file).decode() for file in files],
            }
        ],
        "outputs": [{"name": "probabilities"}],
    }
    (output,) = server.infer(asked).json["outputs"]
    for row, file in zip(np.reshape(output["data"], (3, 10)), files, strict=True):
        best = server.predict(file, "?top_k=1").json["predictions"][0]
        assert HOSTILE[row.argmax()] == best["class"] and row.max() == pytest.approx(best["probability"], abs=1e-5)


BAD = {
    "no JSON": b"{",
    "no object": b"[]",
    "no UTF-8": b'{"inputs": "\xff"}',
    "no inputs": {},
    "two inputs": {"inputs": pixels()["inputs"] * 2},
    "wrong name": pixels(name="image"),
    "wrong datatype": pixels(datatype="FP32"),
    "strange datatype": pixels(datatype={"a": 1}),
    "wrong shape": pixels(shape=[2, 3, 32, 32]),
    "shape of another size": pixels(shape=[3, 32, 32, 3]),
    "no shape": pixels(shape=None),
    "shape of zero": pixels(data=[], shape=[0, 32, 32, 3]),
    "negative shape": pixels(shape=[-2, 32, 32, -3]),
    "huge shape": pixels(shape=[2**62, 32, 32, 3]),
    "shape of truth": pixels(shape=[True, 32, 32, 3]),
    "too many": pixels(shape=[1000, 32, 32, 3]),
    "ragged": pixels(data=[[1], [1, 2]]),
    "texts": pixels(data=["1"] * PIXELS.size),
    "fractions": pixels(data=[0.5] * PIXELS.size),
    "truths": pixels(data=[True] * PIXELS.size),
    "nothing": pixels(data=[None] * PIXELS.size),
    "above": pixels(data=[256] * PIXELS.size),
    "below": pixels(data=[-1] * PIXELS.size),
    "huge": pixels(data=[10**30] * PIXELS.size),
    "an object": pixels(data={"a": 1}),
    "NaN": json.dumps(pixels()).replace("[", "[NaN, ", 2).encode(),
    "Infinity": b'{"inputs": [-Infinity]}',
    "a number of many digits": b'{"id": ' + b"9" * 10_000 + b"}",
    "deep": b"[" * 100_000,
    "deep data": b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,32,32,3],"data":'
    + b"[" * 500
    + b"]" * 500
    + b"}]}",
    "no base64": pixels(["?"], [1], datatype="BYTES"),
    "bytes no text": pixels([1], [1], datatype="BYTES"),
    "bytes of two sizes": pixels([["aaaa"]], [1, 1], datatype="BYTES"),
    "unicode base64": pixels(["é"], [1], datatype="BYTES"),
    "unknown output": {**pixels(), "outputs": [{"name": "logits"}]},
    "twice the same output": {**pixels(), "outputs": [{"name": "class"}] * 2},
    "outputs no list": {**pixels(), "outputs": 3},
    "output of a list": {**pixels(), "outputs": [{"name": []}]},
    "id no text": {**pixels(), "id": 3},
}


@pytest.mark.parametrize("request_body", BAD.values(), ids=BAD)
def test_what_is_not_of_the_protocol_is_refused_with_its_error_object(server: Address, request_body: object) -> None:
    answer = server.infer(request_body)
    assert answer.status == 400
    error = answer.json["error"]
    assert set(answer.json) == {"error"} and isinstance(error, str) and "\n" not in error and len(error) < 300


@pytest.mark.parametrize("name", ["novelty", "unknown"])
def test_an_output_that_there_is_not_is_refused_before_anything_is_computed(name: str) -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    with running(predictor) as address:
        answer = address.infer({**pixels(), "outputs": [{"name": "class"}, {"name": name}]})
    assert answer.status == 400
    assert answer.json["error"] == f"outputs: there is no {name}: this model is not calibrated"
    assert engine.sizes == []


def test_a_file_that_is_no_image_fails_its_request(server: Address) -> None:
    for file, status in ((b"junk", 415), (image()[:300], 422)):
        encoded = [base64.b64encode(one).decode() for one in (image(), file)]
        assert server.infer(pixels(encoded, [2], datatype="BYTES")).status == status
    assert server.service.models["one"].batcher.free == 64


def test_binary_tensors_are_refused_by_name(server: Address) -> None:
    answer = server.ask("POST", "/v2/models/one/infer", b"{}", {"Inference-Header-Content-Length": "2"})
    assert answer.status == 400 and "binary" in answer.json["error"]
