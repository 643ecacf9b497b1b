"""Clients that send what costs much, that do not read, or that come by the thousand, to the program `coatnet serve`."""

import contextlib
import json
import resource
import signal
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from tests.server.serving import SLOW_START, Address, eventually, image, make_bundle, program

LARGE = b"GET /docs/files/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bundle().save(tmp_path_factory.mktemp("run") / "one" / "bundle"))


@pytest.fixture
def many_sockets():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]) if before[1] > 0 else 4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def peak_megabytes(process: int) -> float:
    return int(Path(f"/proc/{process}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def log_so_far(process) -> str:
    """What a server, which is ended, said on standard error, but for lines about a slow start."""
    process.kill()
    return "".join(line for line in process.communicate()[1].splitlines(True) if not line.startswith(SLOW_START))


@contextlib.contextmanager
def watched(address: Address):
    """The longest time in seconds that the health check took meanwhile."""
    longest, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            started = time.monotonic()
            address.ask("GET", "/v2/health/live")
            longest[0] = max(longest[0], time.monotonic() - started)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield longest
    finally:
        over.set()
        thread.join()


@pytest.mark.fault("C1", "tensors of one long text, of 6 million empty lists, of 20 MB of brackets", "400, in 150 MB")
@pytest.mark.timeout(120)
def test_tensors_that_are_none_cost_little(bundle):
    tensor = b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "%s": %s}]}'
    with program(bundle) as (process, address):
        assert address.predict(image()).status == 200
        before = peak_megabytes(process.pid)
        with watched(address) as longest:
            for data in (
                json.dumps(["a" * 1_000_000] + ["b"] * 800).encode(),
                b"[" + b"[]," * 6_000_000 + b"[]]",
                b"[" * 20_000_000,
                b"[" + b"1," * 9_000_000 + b"1]",
            ):
                for key in (b"data", b"other"):
                    assert address.infer(tensor % (key, data)).status == 400
        assert peak_megabytes(process.pid) - before < 150 and longest[0] < 3


@pytest.mark.fault("C2", "1,000 clients that ask for 1.4 MB and read nothing", "others are served; all are given up")
@pytest.mark.timeout(120)
def test_clients_that_do_not_read_lock_nobody_out(bundle, many_sockets):
    with program(bundle) as (process, address), contextlib.ExitStack() as stack:
        for _ in range(1000):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", address.port))
            with contextlib.suppress(OSError):  # one too many
                client.sendall(LARGE * 3)
        with socket.create_connection(("127.0.0.1", address.port), 30, source_address=("127.0.0.2", 0)) as other:
            other.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert other.recv(12) == b"HTTP/1.1 200"

        def answered() -> bool:
            with contextlib.suppress(OSError):
                return address.ask("GET", "/models").status == 200
            return False

        eventually(answered, seconds=60)
        assert log_so_far(process) == ""


@pytest.mark.fault(
    "C3", "3,000 connections to a server that may open 300 files", "503 in JSON with Retry-After; no log"
)
@pytest.mark.timeout(120)
def test_more_connections_than_descriptors(bundle, many_sockets):
    with program(bundle, shell="ulimit -n 300;") as (process, address):
        with contextlib.ExitStack() as stack:
            for number in range(3000):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.bind((f"127.0.0.{2 + number % 20}", 0))
                client.connect_ex(("127.0.0.1", address.port))

            def refused() -> bool:
                with contextlib.suppress(OSError):
                    answer = address.ask("GET", "/models")
                    return answer.status == 503 and "retry-after" in answer.headers and answer.code == "full"
                return False

            eventually(refused)
        eventually(lambda: address.ask("GET", "/models").status == 200)
        assert len(log_so_far(process)) < 300


@pytest.mark.fault("C4", "SIGTERM while an upload never ends", "waits 30 s, exit 1, one line that counts it")
@pytest.mark.timeout(120)
def test_an_upload_without_end_costs_the_exit_code(bundle):
    with program(bundle) as (process, address), address.socket() as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
        said = process.stderr.read()
        assert "requests without an answer at the end: 1" in said and "Traceback" not in said


@pytest.mark.fault("C5", "2,000 clients that leave in the middle of anything", "no traceback, everything is free again")
@pytest.mark.timeout(120)
def test_clients_that_leave(bundle):
    requests = (
        LARGE * 3,
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9000,
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\nZZ\r\n",
        b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n" + b"x" * 50_000,
        b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 30 + b"nonsense\r\n\r\n",
    )
    with program(bundle) as (process, address):
        for number in range(2000):
            request = requests[number % len(requests)]
            with contextlib.suppress(OSError), address.socket() as client:
                client.setblocking(False)
                client.send(request[: len(request) - number % 11 * 30])
                if number % 3 == 0:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        eventually(lambda: address.metric("coatnet_upload_bytes") == 0)
        assert address.metric("coatnet_free_places") == 64 and address.predict(image()).status == 200
        said = log_so_far(process)
        assert "Traceback" not in said and said.count("\n") <= 6
