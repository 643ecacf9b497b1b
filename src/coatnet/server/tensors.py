"""The data of a tensor in JSON, read without a Python object for each number.

A list of numbers is checked and converted block by block, so that 20 MB of anything take a few times 20 MB, no single
step holds other threads up, and a request whose client has left ends at its next block.

Shapes: N images, R resolution, C channels.
"""

import base64
import json
import math
import re
import secrets
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from coatnet.server.errors import RequestError

BLOCK_BYTES = 2**18
MAX_ENVELOPE_BYTES = 2**16  # of a request without its data
PLACEHOLDER = secrets.token_hex()  # so that no request can hold it

_SPACE = b" \t\r\n"
_OF_NUMBERS = b"0123456789.eE+-" + _SPACE
# A quoted name before a colon is a key; behind a backslash it is a part of a text.
_DATA = re.compile(rb'(?<!\\)"data"\s*+:\s*+(?=\[)')
_DECIMALS = re.compile(rb"[\[\] \t\r\n0-9,.eE+-]*+")
_NUMBERS = re.compile(rb"[\[\] \t\r\n0-9,]*+")
_DECIMAL = re.compile(rb"-?(?:0|[1-9][0-9]{0,39})(?:\.[0-9]{1,60})?(?:[eE][+-]?[0-9]{1,3})?")
_FIRST_TEXT = re.compile(rb'\[\s*+(?=")')
_TEXT = re.compile(rb'\s*+"((?:[^"\\]++|\\.)*+)"\s*+([,\]])')
_NESTED = re.compile(rb"\[\s*+\[")
_TWO_NUMBERS = re.compile(rb"[0-9][ \t\r\n]+[0-9]")

# What may follow what: a digit, a comma, an opening and a closing bracket.
_KIND = np.full(256, 3, np.uint8)
_KIND[list(b"0123456789")] = 0
_KIND[list(b",[]")] = 1, 2, 3
_MAY_FOLLOW = np.zeros((4, 4), bool)
_MAY_FOLLOW[[0, 0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 3, 0, 2, 0, 2, 1, 3]] = True


def cut_out_data(body: bytes, max_texts: int, *, decimals: bool = False) -> tuple[bytes, bytes | list[bytes]]:
    """Take the list of the first key "data" out of a request.

    Args:
        body: JSON.
        max_texts: how many texts the list may have.
        decimals: whether numbers may be other than whole ones from 0 on.

    Returns:
        The request with `[PLACEHOLDER]` in place of the list; and the list: as bytes if it is of numbers, else its
        texts without their quotation marks.

    Raises:
        RequestError: code "json": the list is of neither, or the rest is longer than `MAX_ENVELOPE_BYTES`.
    """
    data: bytes | list[bytes] = b""
    if found := _DATA.search(body, 0, MAX_ENVELOPE_BYTES):
        start = found.end()
        if first := _FIRST_TEXT.match(body, start):
            data, end = _texts(body, first.end(), max_texts)
        else:
            data, end = _list_of_numbers(body, start, decimals)
        body = body[:start] + json.dumps([PLACEHOLDER]).encode() + body[end:]
    if len(body) > MAX_ENVELOPE_BYTES:
        refuse(f"there is no list of data, or there are more than {MAX_ENVELOPE_BYTES:,} bytes beside it")
    return body, data


def _list_of_numbers(body: bytes, start: int, decimals: bool) -> tuple[bytes, int]:
    """What has the characters of a list of numbers, and where it ends."""
    run = (_DECIMALS if decimals else _NUMBERS).match(body, start)
    data = run[0].rstrip(b", \t\r\n") if run else b""
    end = start + len(data)
    if body[end:].lstrip(_SPACE)[:1] not in (b",", b"}"):
        number = start + len(data.rstrip(b"0123456789.eE+-" if decimals else b"0123456789"))  # where it begins
        found = body[number : number + 20].decode("ascii", "replace").strip()
        refuse(f"data has {found!r} where a whole number or the end of the list should be")
    return data, end


def _texts(body: bytes, position: int, most: int) -> tuple[list[bytes], int]:
    """The texts of a list from its first one on, and where the list ends."""
    texts = []
    while text := _TEXT.match(body, position):
        texts.append(text[1])
        position = text.end()
        if text[2] == b"]":
            return texts, position
        if len(texts) == most:
            refuse(f"data has more than {most} texts")
    refuse("data must be a list of texts, or of whole numbers")


def read_pixels(
    data: bytes | list[bytes], shape: Sequence[int], check: Callable[[], None] = lambda: None
) -> NDArray[np.uint8]:
    """Whole numbers from 0 to 255, flat or nested as `shape`, to an array of that shape.

    Args:
        data: the list in JSON, of digits, commas, brackets and spaces only.
        shape: (N, R, R, C).
        check: called before each block; what it raises ends the work.

    Raises:
        RequestError: code "json": the list is not of that shape, or a number is not from 0 to 255.
    """
    count = math.prod(shape)
    wanted = f"data must be {count:,} whole numbers from 0 to 255, flat or in nested lists of the shape {list(shape)}"
    return _read(data, np.empty(count, np.uint8), shape, wanted, _numbers, check)


def read_floats(
    data: bytes | list[bytes], shape: Sequence[int], check: Callable[[], None] = lambda: None
) -> NDArray[np.float32]:
    """The same for any numbers, in single precision: values of images that are not 8-bit RGB."""
    count = math.prod(shape)
    wanted = f"data must be {count:,} numbers, flat or in nested lists of the shape {list(shape)}"
    return _read(data, np.empty(count, np.float32), shape, wanted, _decimals, check)


def _read(
    data: bytes | list[bytes],
    values: NDArray,
    shape: Sequence[int],
    wanted: str,
    convert: Callable[[bytes, int], NDArray | None],
    check: Callable[[], None],
) -> NDArray:
    """Fill `values` block by block, and give them the shape; `wanted` says what is refused."""
    count = len(values)
    if isinstance(data, list) or data.count(b",") != count - 1:
        refuse(wanted)
    marks = _marks(shape if _NESTED.match(data) else (count,))
    if data.count(b"[") != marks.count(b"["):
        refuse(wanted)
    done = position = start = 0
    while start < len(data):
        check()
        end = data.find(b",", start + BLOCK_BYTES) + 1 or len(data)
        block = data[start:end]
        found = block.translate(None, _OF_NUMBERS)
        if marks[position : position + len(found)] != found:
            refuse(wanted)
        numbers = convert(block, found.count(b",") + 1)
        if numbers is None:
            refuse(wanted)
        values[done : done + len(numbers)] = numbers
        done, position, start = done + len(numbers), position + len(found), end
    if done != count or position != len(marks):
        refuse(wanted)
    return values.reshape(tuple(shape))


def _decimals(block: bytes, most: int) -> NDArray | None:
    """The numbers of a piece of a list, as `_numbers`; None if one is none of JSON, or too large."""
    texts = block.translate(None, b"[]").split(b",")
    texts = [text.strip(_SPACE) for text in texts if text.strip(_SPACE)]
    if len(texts) > most or not all(map(_DECIMAL.fullmatch, texts)):
        return None
    with np.errstate(over="ignore"):
        numbers = np.array(texts, dtype="S").astype(np.float64).astype(np.float32)
    return numbers if np.isfinite(numbers).all() else None


def _marks(shape: Sequence[int]) -> bytes:
    """The brackets and commas of nested lists: `[[,],[,]]` for (2, 2)."""
    marks = b""
    for size in reversed(shape):
        marks = b"[" + ((marks + b",") * size)[:-1] + b"]"
    return marks


def _numbers(block: bytes, most: int) -> NDArray[np.integer] | None:
    """The numbers of a piece of a list that ends behind a comma or with the list; None if it is not well formed."""
    text = block.translate(None, _SPACE)
    if len(text) > 3 * most + len(text.translate(None, b"0123456789")) or _TWO_NUMBERS.search(block):
        return None
    characters = np.frombuffer(b"," + text, np.uint8)  # either "[" or a number may follow a comma
    kinds = _KIND[characters]
    if not _MAY_FOLLOW[kinds[:-1], kinds[1:]].all():
        return None
    digit = np.append(kinds == 0, False)
    last = np.flatnonzero(digit[:-1] & ~digit[1:])
    ones, tens, hundreds = (characters[last - place].astype(np.int64) - 48 for place in range(3))
    two = digit[last - 1]
    three = two & digit[last - 2]
    numbers = ones + two * 10 * tens + three * 100 * hundreds
    four = three & digit[last - 3]
    padded = (two & (numbers < 10)) | (three & (numbers < 100))
    return None if four.any() or padded.any() or (numbers > 255).any() else numbers


def read_files(data: bytes | list[bytes], shape: Sequence[int]) -> list[bytes]:
    """Texts in base64, as many as `shape` says, to image files. Raises RequestError ("json") if they are not that."""
    if len(shape) != 1:
        refuse(f"shape is {list(shape[:10])}; BYTES have [N]")
    if isinstance(data, bytes) or len(data) != shape[0]:
        refuse(f"data must be a list of {shape[0]} texts: images in base64")
    try:
        return [base64.b64decode(_unescaped(text), validate=True) for text in data]
    except (ValueError, RecursionError):
        refuse("BYTES must be images in base64")


def _unescaped(text: bytes) -> bytes | str:
    """Some libraries escape the slash or the plus sign of base64."""
    return json.loads(b'"' + text + b'"') if b"\\" in text else text


def refuse(message: str) -> NoReturn:
    """Raise RequestError with the code "json"."""
    raise RequestError("json", message)
