"""Predictions over HTTP are those of the predictor; mistakes are answered with a code and one readable line."""

import io
import json
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from tests.server.serving import HOSTILE, Address, image, make_predictor, running


def test_a_prediction_is_that_of_the_predictor(server: Address) -> None:
    expected = make_predictor()(image(1), top_k=3)[0]
    answer = server.predict(image(1), "?top_k=3")
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    found = answer.json["predictions"]
    assert tuple(one["class"] for one in found) == expected.classes
    assert [one["probability"] for one in found] == pytest.approx(expected.probabilities, abs=1e-5)
    assert answer.json["model"] == "one"
    times = answer.json["milliseconds"]
    assert set(times) == {"decode", "queue", "inference", "total"} and times["total"] >= times["inference"] > 0


def test_more_answers_than_classes_are_all_of_them(server: Address) -> None:
    found = server.predict(image(), "?top_k=1000").json["predictions"]
    assert len(found) == len(HOSTILE) and sum(one["probability"] for one in found) == pytest.approx(1, abs=1e-5)


def test_images_of_all_formats_and_sizes(server: Address) -> None:
    for kind, size in (("PNG", (3, 700)), ("WEBP", (640, 20)), ("GIF", (1, 1)), ("BMP", (33, 32)), ("TIFF", (50, 60))):
        assert server.predict(image(2, *size, kind=kind)).status == 200


def test_the_list_of_models_keeps_the_contract_with_the_page(server: Address) -> None:
    (model,) = server.ask("GET", "/models").json
    assert model.pop("card").startswith("---\n")
    assert model.pop("num_parameters") > 1000
    assert model == {
        "name": "one",
        "variant": "coatnet-femto-64",
        "classes": len(HOSTILE),
        "class_names": list(HOSTILE),
        "resolution": 32,
        "multilabel": False,
        "engine": "torch",
        "precision": "fp32",
        "max_bytes": 20 * 2**20,
    }


def test_hostile_class_names_stay_data(server: Address) -> None:
    answer = server.predict(image(), "?top_k=10")
    assert {one["class"] for one in answer.json["predictions"]} == set(HOSTILE)
    assert answer.body.isascii() and answer.headers["x-content-type-options"] == "nosniff"


def test_several_models_in_one_server() -> None:
    other = make_predictor(classes=("ant", "bee"), resolution=64)
    with running({"first": make_predictor(), "second": other}) as address:
        assert [model["name"] for model in address.ask("GET", "/models").json] == ["first", "second"]
        assert address.predict(image()).json["model"] == "first"
        answer = address.predict(image(), "?model=second").json
        assert {one["class"] for one in answer["predictions"]} == {"ant", "bee"}
        assert answer["predictions"][0]["probability"] == pytest.approx(other(image())[0].probabilities[0], abs=1e-5)
        missing = address.predict(image(), "?model=secnd")
        assert (missing.status, missing.code) == (404, "model") and "second" in missing.json["error"]["message"]


def png(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def floating_point() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "empty"),
        (b"<html>", 415, "format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "format"),
        (b"GIF89a", 422, "corrupt"),
        (b"\xff\xd8\xff" + b"\xff" * 100_000, 422, "truncated"),
        (image()[:500], 422, "truncated"),
        (image(kind="PNG")[:300], 422, "truncated"),
        (image(kind="PNG")[:40] + b"junk" + image(kind="PNG")[44:], 422, "corrupt"),
        (png(60_000, 60_000), 422, "large"),
        (png(70_000, 2), 422, "large"),
        (floating_point(), 422, "pixels"),
        (b"RIFF\x00\x00\x00\x00WEBP", 422, "corrupt"),
        (b"II*\0" + b"\xff" * 64, 422, "corrupt"),
        (b"BM" + bytes(60), 422, "corrupt"),
    ],
    ids=lambda value: value[:12].hex() if isinstance(value, bytes) else str(value),
)
def test_what_is_no_image_is_refused_with_its_reason(server: Address, body: bytes, status: int, code: str) -> None:
    answer = server.predict(body)
    assert (answer.status, answer.code) == (status, code)
    message = answer.json["error"]["message"]
    assert message and "\n" not in message and "Traceback" not in message
    assert server.predict(image()).status == 200


def test_uploads_never_touch_a_disk(server: Address) -> None:
    written = []

    def watch(event: str, arguments: tuple) -> None:
        if watching and event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(arguments[0])

    watching = True
    sys.addaudithook(watch)  # for ever, so it is to have an end
    try:
        for kind in ("JPEG", "PNG", "TIFF"):
            assert server.predict(image(0, 1500, 1200, kind)).status == 200
        server.predict(bytes(3_000_000))
    finally:
        watching = False
    assert written == []


def test_a_form_is_told_how_to_send_an_image(server: Address) -> None:
    answer = server.predict(b"--x\r\n", **{"content-type": "multipart/form-data; boundary=x"})
    assert answer.status == 415 and "--data-binary" in answer.json["error"]["message"]


@pytest.mark.parametrize("query", ["?top_k=0", "?top_k=x", "?top_k=1e3", "?top_k=" + "9" * 5000, "?top_k=-1"])
def test_wrong_parameters_are_named(server: Address, query: str) -> None:
    answer = server.predict(image(), query)
    assert (answer.status, answer.code) == (422, "parameters") and "top_k" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("?topk=3", "'topk' (did you mean 'top_k'?)"),
        ("?top_k=3&modle=one", "'modle' (did you mean 'model'?)"),
        ("?n=3", "did you mean 'top_k'?"),
        ("?zebra=%0a1", "'zebra'; there are model, top_k"),
    ],
)
def test_unknown_parameters_are_refused_with_the_nearest(server: Address, query: str, hint: str) -> None:
    answer = server.predict(image(), query)
    assert (answer.status, answer.code) == (422, "parameters") and hint in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/nowhere", 404),
        ("GET", "/predict", 405),
        ("DELETE", "/models", 405),
        ("POST", "/", 405),
        ("GET", "/..%2f..%2fapp.py", 404),
        ("GET", "/../app.py", 404),
        ("GET", "/%00", 404),
        ("GET", "/app.js%00.html", 404),
        ("GET", "/docs/files/..%2f..%2f__init__.py", 404),
        ("GET", "/" + "a" * 8000, 404),
        ("GET", "/%ff%fe", 404),
    ],
)
def test_wrong_paths_are_answered(server: Address, method: str, path: str, status: int) -> None:
    answer = server.ask(method, path)
    assert answer.status == status
    assert set(answer.json["error"]) == {"code", "message"}


def test_every_answer_has_the_security_headers(server: Address) -> None:
    answers = [server.ask("GET", path) for path in ("/", "/models", "/nowhere", "/docs", "/metrics", "/v2")]
    for answer in [*answers, server.predict(b"junk"), server.predict(image())]:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'") and "unsafe-eval" not in policy
        assert "server" not in answer.headers
    assert "unsafe" not in answers[0].headers["content-security-policy"]


def test_the_page_is_served(server: Address) -> None:
    answer = server.ask("GET", "/")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    assert server.ask("HEAD", "/").status == 200


def test_a_token_is_wanted_where_one_is_set() -> None:
    with running(make_predictor(), token="open sesame".replace(" ", "-")) as address:
        right = {"authorization": "Bearer open-sesame"}
        for method, path in (
            ("GET", "/models"),
            ("POST", "/predict"),
            ("GET", "/metrics"),
            ("GET", "/v2/models/one"),
            ("POST", "/v2/models/one/infer"),
        ):
            for wrong in ({}, {"authorization": "Bearer open-sesam"}, {"authorization": "Basic b3Blbg=="}):
                answer = address.ask(method, path, b"x" * 100, wrong)
                assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert b"sesame" not in answer.body
        assert address.ask("POST", "/predict", image(), right).status == 200
        assert address.ask("GET", "/models", None, right).status == 200
        for path in ("/", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready"):
            assert address.ask("GET", path).status == 200
        odd = address.ask("GET", "/models", None, {"authorization": "Bearer \xe9"})
        assert odd.status == 401


def test_the_description_of_the_api_is_whole(server: Address) -> None:
    api = server.ask("GET", "/openapi.json").json
    assert {"/models", "/predict", "/metrics", "/v2/models/{name}/infer", "/v2/health/ready"} <= set(api["paths"])
    assert "503" in api["paths"]["/predict"]["post"]["responses"]


def test_the_documentation_needs_nothing_from_elsewhere(server: Address) -> None:
    page = server.ask("GET", "/docs").body.decode()
    assert "http:" not in page and "https:" not in page and "//" not in page.replace("</", "")
    for path in ("/docs/files/swagger-ui-bundle.js", "/docs/files/swagger-ui.css", "/docs/start.js"):
        assert path in page and server.ask("GET", path).status == 200


def test_answers_are_json_that_any_parser_reads(server: Address) -> None:
    assert json.loads(server.predict(image()).body.decode("ascii"))
