"""The program `coatnet serve`: how it starts, how it ends, and what it says when it cannot start."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.server.serving import PROGRAM, SLOW_START, eventually, image, make_bundle, program


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle().save(tmp_path_factory.mktemp("run") / "animals" / "bundle")


@pytest.mark.slow
def test_told_to_stop_under_load_it_answers_what_is_under_way_and_ends_well(bundle: Path) -> None:
    with program(str(bundle)) as (process, address), ThreadPoolExecutor(8) as clients:
        assert address.ask("GET", "/models").json[0]["name"] == "animals"
        load = [clients.submit(address.predict, image(seed, 1000, 750)) for seed in range(60)]
        slow = address.socket()  # an upload that is under way when the signal comes
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(image()))
        probe = http.client.HTTPConnection("127.0.0.1", address.port, timeout=5)
        probe.request("GET", "/v2/health/ready")
        assert probe.getresponse().read() == b'{"ready": true}'
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        probe.request("GET", "/v2/health/ready")
        told = probe.getresponse()
        assert (told.status, told.read()) == (503, b'{"ready": false}')
        probe.close()
        time.sleep(1.2)
        slow.sendall(image())
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
        slow.close()
        statuses = []
        for future in load:
            with contextlib.suppress(OSError, http.client.HTTPException):  # those that came after the notice
                statuses.append(future.result().status)
        assert statuses and set(statuses) == {200}
        assert process.wait(20) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_interrupted_while_idle_it_ends_soon_and_well_and_keeps_its_token(bundle: Path) -> None:
    with program(f"mine={bundle}", COATNET_TOKEN="from-the-shell") as (process, address):
        assert address.ask("GET", "/models").status == 401
        (model,) = address.ask("GET", "/models", None, {"Authorization": "Bearer from-the-shell"}).json
        assert model["name"] == "mine"
        assert address.ask("POST", "/predict", image(), {"Origin": "http://127.0.0.1:1"}).status == 403
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


@pytest.mark.slow
def test_told_to_stop_twice_it_ends_at_once_with_1_if_a_request_is_left(bundle: Path) -> None:
    with program(str(bundle)) as (process, address), address.socket() as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 1
        assert process.stderr is not None
        said = process.stderr.read()
        assert "requests without an answer at the end: 1" in said and "Traceback" not in said


@pytest.mark.slow
def test_limits_and_access_of_the_command_line_are_those_of_the_server(bundle: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("from-a-file")
    token.chmod(0o600)
    options = ("--token-file", str(token), "--allowed-host", "models.example.com")
    allowed = {"Authorization": "Bearer from-a-file", "Host": "models.example.com"}
    small = image(width=8, height=8, kind="PNG")
    with program(str(bundle), *options, "--max-megabytes", "0.001", "--deadline", "0.001") as (_, address):
        assert len(small) < 0.001 * 2**20
        assert address.predict(small, **{**allowed, "Host": "other.example.com"}).status == 421
        assert address.predict(small, Host="models.example.com").status == 401
        assert address.predict(bytes(2**11), **allowed).status == 413
        assert address.predict(small, **allowed).status == 504


@pytest.mark.slow
def test_queue_batch_and_delay_of_the_command_line_are_those_of_the_server(bundle: Path) -> None:
    large, small = image(width=5000, height=5000, kind="PNG"), image()  # half a second to decode, and a millisecond
    with ThreadPoolExecutor(1) as clients:
        # A queue shorter than a batch of 16 would be refused.
        with program(str(bundle), "--queue", "1", "--batch-size", "1") as (_, address):
            first = clients.submit(address.predict, large)
            eventually(lambda: address.metric("coatnet_free_places") == 0)
            assert address.predict(small).status == 503
            assert first.result().status == 200
        with program(str(bundle), "--delay-ms", "5000") as (_, address):
            first = clients.submit(address.predict, large)
            eventually(lambda: address.predict(small).json["milliseconds"]["queue"] > 100)
            assert first.result().status == 200


def refusal(*arguments: str, **variables: str) -> str:
    """The error of a program that cannot start, its last line; before it there may be what took over two seconds."""
    found = subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **variables}
    )
    assert found.returncode == 2 and "listening" not in found.stdout
    *told, error = found.stderr.splitlines()
    assert error.startswith("coatnet: error: ")
    assert all(line.startswith(SLOW_START) for line in told)
    return error


def test_a_port_in_use_is_told_before_anything_is_read(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refusal(str(bundle), "--port", port)


def test_a_bundle_with_damaged_weights_is_told(bundle: Path, tmp_path: Path) -> None:
    broken = make_bundle().save(tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors" in refusal(str(bundle), f"b={broken}", "--port", "0")


def test_a_bundle_without_class_names_is_told(tmp_path: Path) -> None:
    broken = make_bundle().save(tmp_path / "broken")
    (broken / "config.json").unlink()
    assert "is not a bundle" in refusal(str(broken), "--port", "0")
