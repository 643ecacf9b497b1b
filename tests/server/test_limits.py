"""What a client may cost: bytes, seconds, places in the queue."""

import contextlib
import os
import socket
import statistics
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.data.test_channels import npy, npz
from tests.server.serving import (
    Address,
    FailingEngine,
    eventually,
    image,
    make_predictor,
    make_scaled_predictor,
    resident_bytes,
    running,
)

from coatnet.errors import UserError
from coatnet.server import Settings

CAP = 100_000


def head(**headers: object) -> bytes:
    lines = [b"POST /predict HTTP/1.1", b"Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}".encode() for name, value in headers.items()]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def status(heard: bytes) -> int:
    return int(heard.split(b" ", 2)[1]) if heard else 0


@pytest.fixture(scope="module")
def strict():
    """A server that is short of everything."""
    settings = Settings(max_bytes=CAP, max_upload_bytes=3 * CAP, body_seconds=1, idle_seconds=1)
    with running(make_predictor(), settings) as address:
        yield address


def test_too_many_bytes_by_their_announced_length(strict: Address) -> None:
    assert status(strict.raw(head(content_length=CAP + 1))) == 413  # before any of them is sent


def test_the_answer_arrives_although_the_client_still_sends(strict: Address) -> None:
    answer = strict.predict(bytes(30 * CAP))
    assert (answer.status, answer.code) == (413, "bytes") and answer.headers["connection"] == "close"


def test_too_many_bytes_without_a_length(strict: Address) -> None:
    before = resident_bytes()
    answer = strict.ask("POST", "/predict", (bytes(10_000) for _ in range(3000)))  # chunked, 30 MB
    assert (answer.status, answer.code) == (413, "bytes")
    assert resident_bytes() - before < 20e6


@pytest.mark.parametrize("length", ["-1", "NaN", "1e3", "0x10", "1, 2", "9" * 30])
def test_lengths_that_are_none(strict: Address, length: str) -> None:
    assert status(strict.raw(head(content_length=length) + b"abc")) in (400, 413)


def test_two_different_lengths(strict: Address) -> None:
    assert status(strict.raw(head(content_length=3)[:-2] + b"Content-Length: 4\r\n\r\nabcd")) == 400


def test_a_length_that_lies(strict: Address) -> None:
    short = strict.raw(head(content_length=len(image()) + 10) + image(), hang_up=True)
    assert status(short) in (0, 400)
    more = strict.raw(head(content_length=len(image())) + image() + b"trailing junk\r\n\r\n")
    assert status(more) == 200  # the rest is a request of its own, and none
    assert strict.predict(image()).status == 200


def test_a_body_that_comes_a_byte_at_a_time(strict: Address) -> None:
    with strict.socket() as client:
        client.sendall(head(content_length=1000))
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 10:
                client.sendall(b"x")
                client.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    assert status(client.recv(65536)) == 408
                    break
        assert 0.5 < time.monotonic() - started < 4


def test_a_header_that_comes_a_byte_at_a_time(strict: Address) -> None:
    with strict.socket() as client:
        started = time.monotonic()
        client.settimeout(0.2)
        for byte in head(content_length=3):
            client.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                assert status(client.recv(65536)) == 408
                break
        assert 0.5 < time.monotonic() - started < 4


def test_a_second_header_that_never_ends(strict: Address) -> None:
    with strict.socket() as client:
        client.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status(client.recv(65536)) == 200
        client.sendall(b"GET /v2 HTT")
        heard = b""
        while part := client.recv(65536):
            heard += part
        assert b"HTTP/1.1 408" in heard


def test_a_silent_connection_is_closed(strict: Address) -> None:
    with strict.socket() as client:
        client.settimeout(5)
        assert client.recv(100) == b""


def test_a_header_without_end_is_refused(strict: Address) -> None:
    bomb = b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (number, b"a" * 1000) for number in range(200))
    assert status(strict.raw(bomb)) in (400, 431)


def test_all_uploads_together_are_bounded(strict: Address) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(3):  # each sends all but the last byte
            client = stack.enter_context(strict.socket())
            client.sendall(head(content_length=CAP) + bytes(CAP - 1))
        assert strict.service is not None
        eventually(lambda: strict.service.uploads.num_bytes >= 3 * (CAP - 1))
        answer = strict.predict(bytes(CAP))
        assert (answer.status, answer.code) == (503, "full") and int(answer.headers["retry-after"]) >= 1
    eventually(lambda: strict.service.uploads.num_bytes == 0)
    assert strict.predict(image()).status == 200


def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    engine.free.clear()
    with running(predictor, Settings(batch_size=4, max_queue=8)) as address:
        with ThreadPoolExecutor(8) as clients:
            inside = [clients.submit(address.predict, image(seed)) for seed in range(8)]
            eventually(lambda: address.service.models["one"].batcher.free == 0)
            times = []
            for _ in range(20):
                started = time.perf_counter()
                refused = address.predict(image())
                times.append(time.perf_counter() - started)
                assert (refused.status, refused.code) == (503, "full") and refused.headers["retry-after"] == "1"
            assert statistics.median(times) < 0.05
            assert address.metric("coatnet_rejections_total") == 20
            engine.free.set()
            assert [future.result().status for future in inside] == [200] * 8
        assert address.predict(image()).status == 200
        assert address.service.models["one"].batcher.free == 8


def test_a_flood_is_answered_by_200_or_503() -> None:
    with running(make_predictor(), Settings(max_queue=32)) as address, ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(lambda seed: address.predict(image(seed % 7)), range(500)))
        found = {answer.status for answer in answers}
        assert found <= {200, 503} and 200 in found
        assert all("retry-after" in answer.headers for answer in answers if answer.status == 503)
        assert address.predict(image()).status == 200


def test_the_deadline_passes() -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    engine.free.clear()
    with running(predictor, Settings(deadline_seconds=0.3)) as address:
        running_one = address.predict(image())
        assert (running_one.status, running_one.code) == (504, "deadline")
        waiting_one = address.predict(image(1))
        assert waiting_one.status == 504
        assert address.metric("coatnet_dropped_total") == 1  # the first was in the engine already
        engine.free.set()
        assert address.predict(image(2)).status == 200
        assert len(engine.sizes) == 2  # nobody computed what nobody waits for


def test_a_client_that_leaves_is_forgotten() -> None:
    predictor = make_predictor()
    engine = FailingEngine(predictor)
    engine.free.clear()
    with running(predictor) as address:
        batcher = address.service.models["one"].batcher

        def send(seed: int) -> socket.socket:
            client = address.socket()
            client.sendall(head(content_length=len(image(seed))) + image(seed))
            return client

        inside = send(0)
        eventually(lambda: engine.sizes == [1])
        queued = send(1)
        eventually(lambda: batcher.depth == 1)
        queued.close()
        eventually(lambda: batcher.depth == 0)
        assert address.metric("coatnet_dropped_total") == 1
        inside.close()
        eventually(lambda: address.metric("coatnet_disconnects_total") == 2)
        uploading = address.socket()
        uploading.sendall(head(content_length=1000) + b"half")
        uploading.close()
        eventually(lambda: address.metric("coatnet_disconnects_total") == 3)
        engine.free.set()
        assert address.predict(image(2)).status == 200
        assert engine.sizes == [1, 1]
        assert batcher.free == batcher.settings.max_queue and address.service.uploads.num_bytes == 0


def test_a_thread_that_waits_for_pixels_is_free_after_the_deadline() -> None:
    predictor = make_predictor()
    decoding, prepared = threading.Event(), []

    def prepare(encoded: bytes) -> object:
        prepared.append(encoded)
        assert decoding.wait(60)
        return type(predictor).prepare_and_locate(predictor, encoded)

    predictor.prepare_and_locate = prepare
    with running(predictor, Settings(deadline_seconds=0.3, max_decoding_pixels=10_000)) as address:
        pool = address.service.pool
        with ThreadPoolExecutor(4) as clients:  # one is decoded, another waits for pixels, others for a thread
            asked = [clients.submit(address.predict, image(seed, 100, 100)) for seed in range(4)]
            assert {future.result().status for future in asked} == {504}
        assert len(prepared) == 1
        eventually(lambda: pool._threads._work_queue.empty())
        tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
        assert address.infer({"inputs": [tensor]}).status == (200 if pool._threads._max_workers > 1 else 504)
        decoding.set()
        eventually(lambda: address.predict(image(5)).status == 200)
        assert len(prepared) == 2  # nobody decoded what nobody waits for


RESERVED = {
    "npz": (12, npz(np.zeros((500, 600, 12), np.uint16))),
    "npz of doubles": (3, npz(np.zeros((500, 600, 3)))),
    "npy": (12, npy(np.zeros((500, 600, 12), np.uint16))),
    "PNG": (3, image(0, 600, 500, "PNG")),
    "JPEG": (3, image(0, 600, 500)),
}


@pytest.mark.parametrize("kind", RESERVED)
def test_what_an_image_takes_is_reserved(kind: str) -> None:
    channels, encoded = RESERVED[kind]
    predictor = make_scaled_predictor(channels)
    found: list[tuple[int, int]] = []  # bytes that are taken, pixels that are not reserved

    def prepare(encoded: bytes) -> object:
        tracemalloc.start()
        try:
            return type(predictor).prepare_and_locate(predictor, encoded)
        finally:
            found.append((tracemalloc.get_traced_memory()[1], address.service.pool._free))
            tracemalloc.stop()

    predictor.prepare_and_locate = prepare
    with running(predictor) as address:
        assert address.predict(encoded).status == 200
    ((taken, free),) = found
    reserved = 6 * (Settings.max_decoding_pixels - free)  # bytes
    assert 15 * 500 * 600 < taken < 1.3 * reserved


def test_requests_cut_off_by_the_end_are_told_and_counted() -> None:
    with running(make_predictor(), Settings(grace_seconds=1)) as address:
        client = address.socket()
        client.sendall(head(content_length=1000) + b"half")
        eventually(lambda: address.service.uploads.num_bytes == 4)
    assert address.service.unanswered == 1
    with client:
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer


def test_memory_threads_and_files_stay_flat_over_many_requests() -> None:
    soak(warm=200, requests=400)


@pytest.mark.nightly
def test_memory_threads_and_files_stay_flat_over_ten_thousand_requests() -> None:
    soak(warm=10_000, requests=10_000)  # the allocator's arenas grow for some 10,000 requests, then not any more


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def soak(warm: int, requests: int) -> None:
    bodies = [image(seed, 500, 375) for seed in range(5)] + [b"no image", image(0, kind="PNG")[:200]]
    with running(make_predictor()) as address, ThreadPoolExecutor(8) as clients:

        def load(count: int) -> None:
            for answer in clients.map(lambda number: address.predict(bodies[number % len(bodies)]), range(count)):
                assert answer.status in (200, 415, 422)

        load(warm)
        memory, threads, files = resident_bytes(), threading.active_count(), open_files()
        load(requests)
        assert resident_bytes() - memory < 15e6
        assert threading.active_count() == threads and open_files() <= files + 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_queue": 8}, "never fills"),
        ({"deadline_seconds": -1.0}, "above 0"),
    ],
)
def test_limits_that_nothing_could_keep_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**wrong)
