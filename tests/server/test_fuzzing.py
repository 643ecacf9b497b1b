"""Whatever is sent, the server does not break: no 5xx, no traceback."""

import random

import pytest
from tests.server.serving import Address, image

schemathesis = pytest.importorskip("schemathesis")


def fuzz(address: Address, examples: int) -> None:
    """Every operation of the API, with valid and invalid input."""
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{address.port}/openapi.json")
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=operation.as_strategy())
        def every_answer_is_sound(case) -> None:
            answer = case.call()
            assert answer.status_code < 500, answer.text
            assert "Traceback" not in answer.text

        every_answer_is_sound()
        count += 1
    assert count == 10
    assert address.predict(image()).status == 200


def test_no_input_of_the_api_breaks_the_server(server: Address) -> None:
    fuzz(server, 8)


@pytest.mark.nightly
def test_no_input_of_the_api_breaks_the_server_in_many_tries(server: Address) -> None:
    fuzz(server, 500)


REQUESTS = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models HTTP/1.0\r\n\r\n",
    b"POST /predict?top_k=3 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nabcd",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n",
    b"POST /v2/models/one/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT there:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\nabcd\r\n",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\nabcd",
    b"GET http://there/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\x00" * 100,
)


def mutated(source: random.Random, request: bytes) -> bytes:
    changed = bytearray(request)
    for _ in range(source.randint(0, 4)):
        place = source.randrange(len(changed))
        match source.randrange(4):
            case 0:
                changed[place] = source.randrange(256)
            case 1:
                changed[place:place] = source.randbytes(source.randint(1, 20))
            case 2:
                del changed[place : place + source.randint(1, 8)]
            case 3:
                changed[place:place] = source.choice((b"\r\n", b"\0", b"%2f..%2f", b"Content-Length: 7\r\n", b":" * 9))
        changed = changed or bytearray(b"x")
    return bytes(changed)


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_no_bytes_on_a_socket_break_the_server(server: Address, count: int) -> None:
    source = random.Random(0)
    for number in range(count):
        request = REQUESTS[number] if number < len(REQUESTS) else mutated(source, source.choice(REQUESTS))
        heard = server.raw(request, hang_up=number >= len(REQUESTS), patience=0.3)
        assert b"HTTP/1.1 5" not in heard and b"Traceback" not in heard, request
    assert server.predict(image()).status == 200
    assert server.service.models["one"].batcher.free == 64 and server.service.uploads.num_bytes == 0
