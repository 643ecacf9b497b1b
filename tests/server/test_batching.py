"""Batches are what waits; a batch that fails fails alone, and the server says truly how it is."""

import http.client
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.server.serving import FailingEngine, eventually, image, make_predictor, running

from coatnet.server import Settings


def test_an_idle_engine_does_not_wait_and_a_busy_one_runs_full_batches() -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    with running(predictor, Settings(batch_size=8, delay_seconds=5)) as address, ThreadPoolExecutor(24) as clients:
        started = time.perf_counter()
        assert address.predict(image()).json["milliseconds"]["queue"] < 1000
        assert time.perf_counter() - started < 2  # far below the delay
        engine.free.clear()
        first = clients.submit(address.predict, image())
        eventually(lambda: engine.sizes == [1, 1])
        rest = [clients.submit(address.predict, image(seed)) for seed in range(24 - 1)]
        eventually(lambda: address.service.models["one"].batcher.depth == 23)
        engine.free.set()
        assert {future.result().status for future in [first, *rest]} == {200}
        assert engine.sizes == [1, 1, 8, 8, 7]
        assert address.metric("coatnet_batch_size_count") == 5 and address.metric("coatnet_batch_size_sum") == 25


def test_answers_in_a_batch_equal_those_of_single_requests_and_a_bad_image_fails_alone() -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    bodies = [image(seed, 40 + 30 * seed, 200 - 20 * seed) for seed in range(6)]
    with running(predictor) as address, ThreadPoolExecutor(8) as clients:
        alone = [address.predict(body, "?top_k=10").json["predictions"] for body in bodies]
        engine.free.clear()
        plug = clients.submit(address.predict, image())
        eventually(lambda: len(engine.sizes) == 7)
        together = [clients.submit(address.predict, body, "?top_k=10") for body in [*bodies[:3], b"junk", *bodies[3:]]]
        eventually(lambda: address.service.models["one"].batcher.depth == 6)
        engine.free.set()
        answers = [future.result() for future in together]
        assert plug.result().status == 200 and engine.sizes[-1] == 6
        assert answers.pop(3).status == 415
        for single, answer in zip(alone, answers, strict=True):
            wanted = {one["class"]: one["probability"] for one in single}
            found = {one["class"]: one["probability"] for one in answer.json["predictions"]}
            assert found == pytest.approx(wanted, abs=1e-4)


def test_a_model_that_raises_once_fails_one_batch() -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    with running(predictor) as address:
        engine.fail = RuntimeError("secret of the inside")
        failed = address.predict(image())
        assert (failed.status, failed.code) == (500, "inference") and b"secret" not in failed.body
        assert address.predict(image()).status == 200
        assert address.ask("GET", "/v2/health/ready").json == {"ready": True}
        assert 'coatnet_rejections_total{reason="inference"} 1.0' in address.ask("GET", "/metrics").body.decode()


def test_a_model_that_gives_no_number_fails_that_image_only() -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    with running(predictor) as address:
        engine.logit = np.nan
        assert address.predict(image()).status == 500
        engine.logit = None
        assert address.predict(image()).status == 200


def test_a_model_that_gives_no_number_fails_no_other_image_of_the_batch() -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    with running(predictor) as address, ThreadPoolExecutor(4) as clients:
        engine.free.clear()
        plug = clients.submit(address.predict, image())
        eventually(lambda: engine.sizes == [1])
        together = [clients.submit(address.predict, image(seed)) for seed in range(3)]
        eventually(lambda: address.service.models["one"].batcher.depth == 3)
        engine.logit = np.nan  # of the first image of each batch
        engine.free.set()
        assert plug.result().status == 500
        assert sorted(each.result().status for each in together) == [200, 200, 500] and engine.sizes == [1, 3]


def test_a_model_that_dies_is_told_by_liveness() -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    with running(predictor) as address:
        assert address.ask("GET", "/v2/health/live").status == 200
        engine.fail = SystemExit()
        dying = address.predict(image())
        assert (dying.status, dying.code) == (503, "stopped")
        eventually(lambda: address.ask("GET", "/v2/health/live").status == 503)
        for path, answer in (("/v2/health/live", {"live": False}), ("/v2/health/ready", {"ready": False})):
            found = address.ask("GET", path)
            assert (found.status, found.json) == (503, answer)
        assert address.ask("GET", "/v2/models/one/ready").status == 503
        assert address.predict(image()).code == "stopped"


def test_a_model_that_hangs_is_told_by_readiness() -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    settings = Settings(hang_seconds=1, deadline_seconds=0.2)
    with running(predictor, settings) as address:
        time.sleep(1.2)  # idle is not hanging
        assert address.ask("GET", "/v2/health/ready").status == 200
        engine.free.clear()
        assert address.predict(image()).status == 504
        eventually(lambda: address.ask("GET", "/v2/health/ready").status == 503)
        assert address.ask("GET", "/v2/health/live").status == 200
        assert address.metric("coatnet_model_ready") == 0
        engine.free.set()
        eventually(lambda: address.ask("GET", "/v2/health/ready").status == 200)
        assert address.predict(image()).status == 200


def test_the_threads_end_with_the_server() -> None:
    before = threading.active_count()
    with running({"one": make_predictor(), "two": make_predictor()}) as address:
        assert address.predict(image()).status == 200
        assert threading.active_count() > before
    eventually(lambda: threading.active_count() == before)


def test_a_server_whose_model_hangs_still_ends() -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    engine.free.clear()
    with ThreadPoolExecutor(1) as clients:
        with running(predictor, Settings(grace_seconds=1)) as address:
            asking = clients.submit(address.predict, image())
            eventually(lambda: engine.sizes == [1])
            started = time.monotonic()
        assert time.monotonic() - started < 5
        assert address.service.models["one"].batcher.alive  # so the program exits with 1
        assert isinstance(asking.exception(), OSError | http.client.HTTPException) or asking.result().status >= 500
    engine.free.set()
    eventually(lambda: not address.service.models["one"].batcher.alive)
