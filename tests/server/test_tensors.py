"""The data of a tensor: what json reads as a list of the shape is accepted, all else is refused, in bounded memory."""

import json
import math
import random
import tracemalloc

import numpy as np
import pytest

from coatnet.server import tensors
from coatnet.server.errors import RequestError
from coatnet.server.tensors import PLACEHOLDER, cut_out_data, read_files, read_pixels

SHAPE = [1, 224, 224, 3]


def expected(text: bytes, shape: list[int]) -> list[int] | None:
    """The numbers of a list in JSON that is flat or of that shape, and None for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None

    def flat(part: object, sizes: list[int]) -> list[int]:
        if not sizes and type(part) is int and 0 <= part <= 255:
            return [part]
        if sizes and isinstance(part, list) and len(part) == sizes[0]:
            return [number for each in part for number in flat(each, sizes[1:])]
        raise ValueError

    for sizes in (shape, [math.prod(shape)]):
        try:
            return flat(value, sizes)
        except ValueError:
            continue
    return None


def found(text: bytes, shape: list[int]) -> list[int] | None:
    try:
        return read_pixels(text, shape).ravel().tolist()
    except RequestError:
        return None


@pytest.mark.parametrize("block_bytes", [8, 2**18])
def test_lists_are_read_as_json_reads_them(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", block_bytes)
    source, outcomes = random.Random(0), {True: 0, False: 0}
    for _ in range(1500):
        shape = [source.randint(1, 3) for _ in range(source.randint(1, 4))]
        numbers = np.array([source.randint(0, 255) for _ in range(math.prod(shape))]).reshape(shape)
        value = source.choice([numbers, numbers.ravel()]).tolist()
        text = bytearray(json.dumps(value, separators=source.choice([(",", ":"), (", ", ": ")])).encode())
        for _ in range(source.randint(0, 2)):
            place = source.randrange(1, len(text))
            text[place : place + source.randint(0, 1)] = source.choice([b"", bytes([source.choice(b"0123,[] \n")])])
        wanted = expected(bytes(text), shape)
        assert found(bytes(text).rstrip(), shape) == wanted, (text, shape)
        outcomes[wanted is not None] += 1
    assert min(outcomes.values()) > 300


HOSTILE = {
    "one long text beside many short ones": b'["' + b"a" * 1_000_000 + b'"' + b',"b"' * 800 + b"]",
    "empty lists": b"[" + b"[]," * 6_000_000 + b"[]]",
    "lists in lists": b"[" * 19_000_000,
    "numbers": b"[" + b"1," * 9_000_000 + b"1]",
    "a long number": b"[" + b"1" * 19_000_000 + b"]",
    "spaces": b"[1" + b" " * 19_000_000 + b"]",
    "empty texts": b"[" + b'"",' * 6_000_000 + b'""]',
    "fractions": b"[" + b"0.5," * 4_000_000 + b"1]",
    "objects": b"[" + b'{"a":1},' * 2_000_000 + b"1]",
    "a text without end": b'["' + b"a" * 19_000_000,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("key", [b"data", b"atad"])
def test_hostile_data_is_refused_in_bounded_memory(data: bytes, key: bytes) -> None:
    body = b'{"inputs": [{"shape": [1, 224, 224, 3], "' + key + b'": ' + data + b"}]}"
    tracemalloc.start()
    try:
        with pytest.raises(RequestError):
            read_pixels(cut_out_data(body, 64)[1], SHAPE)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body) + 1_000_000
    finally:
        tracemalloc.stop()


def test_data_may_stand_anywhere_in_the_input() -> None:
    for given, data in ((b"[1, 2]", b"[1, 2]"), (b'[ "YQ==" , "Yg\\u003d="]', [b"YQ==", b"Yg\\u003d="])):
        for body in (b'{"data": %b, "x": [2]}' % given, b'{"x": [2], "data" : %b }' % given):
            envelope, cut = cut_out_data(body, 64)
            assert json.loads(envelope) == {"x": [2], "data": [PLACEHOLDER]} and cut == data
    assert read_files([b"YQ==", b"Yg\\u003d=", b"Pz8\\/"], [3]) == [b"a", b"b", b"???"]


def test_an_error_shows_what_is_no_whole_number() -> None:
    with pytest.raises(RequestError, match=r"data has '21.5, 3\]"):
        cut_out_data(b'{"data": [1, 21.5, 3]}', 64)


def test_a_request_that_nobody_waits_for_ends_at_the_next_block() -> None:
    blocks = 0

    def check() -> None:
        nonlocal blocks
        blocks += 1
        if blocks == 3:
            raise TimeoutError

    shape = [8, 224, 224, 3]
    with pytest.raises(TimeoutError):
        read_pixels(b"[" + b",".join([b"200"] * math.prod(shape)) + b"]", shape, check)
