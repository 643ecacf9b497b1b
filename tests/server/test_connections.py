"""Bounds of connections: how many, how long, how much before a route is reached, and what the log says."""

import contextlib
import io
import logging
import resource
import socket
import struct
import subprocess
import sys
import time

import pytest
from tests.server.serving import Address, eventually, make_predictor, running

from coatnet.errors import UserError
from coatnet.server import Settings
from coatnet.server.connections import client_key, reserve_descriptors
from coatnet.server.main import OncePerMinute

LARGE = b"GET /docs/files/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"


def heard(client: socket.socket) -> bytes:
    said = b""
    with contextlib.suppress(OSError):
        while part := client.recv(65536):
            said += part
    return said


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"max_connections": 8}, b"too many connections"), ({"max_client_connections": 8}, b"one client may have 8")],
)
def test_one_connection_too_many_is_told_so(limits: dict, message: bytes) -> None:
    with running(make_predictor(), Settings(**limits)) as address, contextlib.ExitStack() as stack:
        first = [stack.enter_context(address.socket()) for _ in range(8)]
        for path, body in (("/models", b'{"error": {"code": "full"'), ("/v2", b'{"error": "')):
            answer = address.ask("GET", path)
            assert answer.status == 503 and answer.headers["retry-after"] == "1"
            assert answer.headers["connection"] == "close"
            assert answer.body.startswith(body) and message in answer.body
        silent = stack.enter_context(address.socket())
        started = time.monotonic()
        assert heard(silent).startswith(b"HTTP/1.1 503") and time.monotonic() - started < 5
        for _ in range(8):  # as good as at once, for any number of them
            stack.enter_context(address.socket())
        beyond = heard(stack.enter_context(address.socket()))
        assert beyond.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in beyond and message in beyond
        first[0].sendall(LARGE)
        assert first[0].recv(12) == b"HTTP/1.1 200"  # who came in time is served
        for client in first:
            client.close()
        eventually(lambda: address.ask("GET", "/models").status == 200)


def test_clients_that_do_not_read_are_given_up() -> None:
    settings = Settings(write_seconds=0.5, max_client_connections=20)
    with running(make_predictor(), settings) as address, contextlib.ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", address.port))
            client.sendall(LARGE * 3)
        eventually(lambda: address.ask("GET", "/models").status == 200)


def test_a_client_that_reads_slowly_is_served() -> None:
    with running(make_predictor(), Settings(write_seconds=0.5)) as address, address.socket() as client:
        client.sendall(LARGE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        said = 0
        while part := client.recv(131072):
            said += len(part)
            time.sleep(0.05)
        assert said > 1_000_000


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/models", {"X": "a" * 70_000}, 431),
        ("/models", {f"X{number}": "a" * 1000 for number in range(20)}, 431),
        ("/" + "a" * 70_000, {}, 414),
        ("/models?" + "a" * 9000, {}, 414),
        ("/models", {"X": "a" * 8000}, 200),
    ],
)
def test_headers_and_paths_are_bounded(server: Address, path: str, headers: dict, status: int) -> None:
    answer = server.ask("GET", path, None, headers)
    assert answer.status == status
    assert status == 200 or answer.json["error"]["message"]


def test_a_header_that_comes_in_pieces_is_bounded(server: Address) -> None:
    with server.socket() as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: ")
        for _ in range(10):
            client.sendall(b"a" * 5000)
            time.sleep(0.01)
        said = heard(client)
    assert said.startswith(b"HTTP/1.1 431") and b'"code": "header"' in said


def test_bodies_in_tiny_chunks_are_refused(server: Address) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert server.raw(head + b"1\r\na\r\n" * 20_000).startswith(b"HTTP/1.1 400")
    whole = head + b"40\r\n" + b"a" * 64 + b"\r\n" + b"80\r\n" + (b"a" * 128 + b"\r\n80\r\n") * 2000
    assert server.raw(whole + b"a" * 128 + b"\r\n0\r\n\r\n").startswith(b"HTTP/1.1 415")


def test_ranges_multiply_nothing(server: Address) -> None:
    path = "/docs/files/swagger-ui-bundle.js"
    whole = server.ask("GET", path)
    answer = server.ask("GET", path, None, {"Range": "bytes=" + ",".join(["0-"] * 900)})
    assert (answer.status, answer.body) == (200, whole.body)
    assert "accept-ranges" not in whole.headers


def test_what_is_not_http_gets_one_error_in_json(server: Address) -> None:
    said = server.raw(b"nonsense\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 400") and b'"code": "http"' in said


def test_clients_that_leave_anywhere_leave_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    requests = (
        LARGE,
        LARGE * 5,
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9000,
        b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n" + b"x" * 5000,
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\nZZ\r\n",
        b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\nnonsense\r\n\r\n",
    )
    with running(make_predictor()) as address:
        for number in range(90):
            client, request = address.socket(), requests[number % len(requests)]
            with contextlib.suppress(OSError):
                client.sendall(request[: len(request) - number % 7 * 20])
            if number % 2:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            client.close()
        assert address.ask("GET", "/models").status == 200
    assert "Traceback" not in "".join(capfd.readouterr())  # the loggers of uvicorn do not propagate


def test_an_address_is_a_client_and_so_is_a_network_of_ipv6() -> None:
    assert client_key(("10.0.0.1", 5)) == client_key(("::ffff:10.0.0.1", 6)) != client_key(("10.0.0.2", 5))
    assert client_key(("2001:db8::1", 1)) == client_key(("2001:db8::2%eth0", 1)) != client_key(("2001:db8:0:1::1", 1))
    assert client_key(None) == client_key(("",)) == "unknown"


def test_descriptors_are_reserved_as_far_as_the_system_allows() -> None:
    program = """
import resource, sys
from coatnet.server.connections import reserve_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
print(reserve_descriptors(1024), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def reserved(*limits: int) -> list[int]:
        command = [sys.executable, "-c", program, *map(str, limits)]
        return [*map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())]

    assert reserved(256, hard)[0] == 1024 if hard > 2000 or hard < 0 else True
    connections, soft = reserved(512, 512)
    assert 200 < connections < 350 and soft == 512


def test_too_few_descriptors_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(UserError, match="allows 64 open files"):
        reserve_descriptors(1024)


def test_the_log_has_one_line_a_minute_of_a_kind() -> None:
    said = io.StringIO()
    logger = logging.Logger("of this test")
    logger.addHandler(logging.StreamHandler(said))
    logger.addFilter(OncePerMinute())
    for _ in range(1000):
        logger.warning("Invalid HTTP request received.")
        try:
            raise OSError(24, "Too many open files")
        except OSError:
            logger.exception("socket.accept() out of system resource\nsocket: <socket %d>", 3)
    assert said.getvalue().splitlines() == [
        "Invalid HTTP request received.",
        "socket.accept() out of system resource: [Errno 24] Too many open files",
    ]
