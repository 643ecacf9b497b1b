"""`POST /explain`: the map of `Predictor.explain`, with the errors and the access control of `POST /predict`."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from tests.server.serving import Address, image, make_predictor, running

from coatnet.inference.explanation import heat_colors


@pytest.mark.parametrize("query", ["", "?method=attention", "?target=dog&stage=1"])
def test_the_heat_map_is_that_of_the_predictor(server: Address, query: str) -> None:
    options = dict(pair.split("=") for pair in query.removeprefix("?").split("&") if pair)
    stage = int(options.pop("stage")) if "stage" in options else None
    expected = make_predictor().explain(image(1), stage=stage, **options)[0]
    answer = server.ask("POST", f"/explain{query}", image(1))
    assert answer.status == 200
    assert set(answer.json) == {"model", "method", "class", "probability", "box", "heat_map"}
    assert answer.json["class"] == expected.target
    assert answer.json["probability"] == pytest.approx(expected.probability, abs=1e-5)
    assert answer.json["box"] == pytest.approx(expected.box)
    with Image.open(io.BytesIO(base64.b64decode(answer.json["heat_map"]))) as heat:
        colors = np.asarray(heat).astype(int)
    assert colors.shape == (32, 32, 4)
    assert np.abs(colors - heat_colors(expected.heat)).mean() < 1


@pytest.mark.parametrize(
    ("query", "body", "status", "message"),
    [
        ("?method=occlusion", None, 422, "'layercam' or 'attention'"),
        ("?target=dgo", None, 422, "did you mean 'dog'"),
        ("?stage=7", None, 422, "0 is the stem"),
        ("?layer=1", None, 422, "there are model, method, target, stage"),
        ("?model=two", None, 404, "there is no model 'two'"),
        ("", b"no image", 415, "not one of"),
        ("", b"", 422, "the body is empty"),
    ],
)
def test_what_cannot_be_explained_is_one_line(
    server: Address, query: str, body: bytes | None, status: int, message: str
) -> None:
    answer = server.ask("POST", f"/explain{query}", image() if body is None else body)
    assert answer.status == status
    assert message in answer.json["error"]["message"]
    assert "b'" not in answer.json["error"]["message"]


def test_explanations_are_counted_described_and_behind_the_token(server: Address) -> None:
    before = server.metric("coatnet_explain_seconds_count")
    server.ask("POST", "/explain", image())
    assert server.metric("coatnet_explain_seconds_count") == before + 1
    assert "504" in server.ask("GET", "/openapi.json").json["paths"]["/explain"]["post"]["responses"]
    with running(make_predictor(), token="sesame") as guarded:
        assert guarded.ask("POST", "/explain", image()).status == 401
        assert guarded.ask("POST", "/explain", image(), {"authorization": "Bearer sesame"}).status == 200
