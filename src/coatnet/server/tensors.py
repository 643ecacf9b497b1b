"""Requests and answers of the Open Inference Protocol v2 as values, strict at the door.

Shapes: N images, R resolution, C channels, K classes. The one input is "images": UINT8 (N, R, R, C), as the
network sees them, or BYTES (N,), encoded images of any size in base64. The outputs are "probabilities", FP32 (N, K),
and "class", BYTES (N,), the likeliest.
"""

import base64
import binascii
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from coatnet.inference.predictor import Predictor
from coatnet.server.errors import Refusal

INPUT, PROBABILITIES, CLASS = "pictures", "probabilities", "class"


@dataclass(frozen=True)
class Inference:
    """What is asked: encoded images, or prepared ones, each (1, R, R, C)."""

    images: Sequence[bytes] | Sequence[NDArray[np.uint8]]
    outputs: tuple[str, ...]
    id: str | None


def read_inference(body: bytes, predictor: Predictor, most: int) -> Inference:
    """The request, checked against the model; at most `most` images. Raises Refusal ("json")."""
    request = _read_json(body)
    if not isinstance(request, dict):
        _refuse("the body must be a JSON object")
    inputs, identity = request.get("inputs"), request.get("id")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        _refuse(f"inputs must be a list of one tensor, {INPUT!r}")
    if identity is not None and not isinstance(identity, str):
        _refuse("id must be a string")
    tensor = inputs[0]
    if tensor.get("name") != INPUT:
        _refuse(f"the input is called {INPUT!r}, not {str(tensor.get('name'))[:100]!r}")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        _refuse("shape must be a list of whole numbers from 1")
    if shape[0] > most:
        _refuse(f"{shape[0]} images in one request; there may be {most}")
    images: Any
    match tensor.get("datatype"):
        case "UINT8":
            images = _read_pixels(tensor.get("data"), shape, predictor.image_shape[1:])
        case "BYTES":
            images = _read_files(tensor.get("data"), shape)
        case other:
            _refuse(f"datatype must be UINT8 or BYTES, not {str(other)[:100]!r}")
    return Inference(images, _read_outputs(request.get("outputs")), identity)


def write_inference(model: str, asked: Inference, rows: Sequence[NDArray[np.float32]], predictor: Predictor) -> Any:
    """The answer as JSON values; one row (K,) an image."""
    tensors = {
        PROBABILITIES: lambda: ("FP32", [len(rows), len(predictor.classes)], np.stack(rows).ravel().tolist()),
        CLASS: lambda: ("BYTES", [len(rows)], [predictor.top(row, 1)[0][0] for row in rows]),
    }
    outputs = []
    for name in asked.outputs:
        datatype, shape, data = tensors[name]()
        outputs.append({"name": name, "datatype": datatype, "shape": shape, "data": data})
    identity = {} if asked.id is None else {"id": asked.id}
    return {"model_name": model, **identity, "outputs": outputs}


def model_metadata(name: str, predictor: Predictor) -> Any:
    """What the protocol tells of a model."""
    return {
        "name": name,
        "versions": [],
        "platform": f"coatnet_{predictor.engine.name}",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *predictor.image_shape[1:]]}],
        "outputs": [
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, len(predictor.classes)]},
            {"name": CLASS, "datatype": "BYTES", "shape": [-1]},
        ],
    }


def _read_json(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of thousands of digits, lists in lists in lists
        _refuse("the body is not JSON that can be read")


def _refuse_constant(name: str) -> NoReturn:
    _refuse(f"{name} is not JSON")


def _read_pixels(data: Any, shape: list[int], expected: tuple[int, ...]) -> list[NDArray[np.uint8]]:
    if tuple(shape[1:]) != expected:
        _refuse(f"shape is {shape[:10]}; this model takes {[-1, *expected]}")
    try:
        values = np.array(data if isinstance(data, list) else None)
    except (ValueError, OverflowError):  # ragged
        values = np.array(None)
    if values.dtype.kind not in "iu" or values.size != math.prod(shape):
        _refuse(f"data must be {math.prod(shape):,} whole numbers, flat or in nested lists of that shape")
    if values.ndim > 1 and values.shape != tuple(shape):
        _refuse(f"data is nested as {list(values.shape)}, shape is {shape}")
    if values.min() < 0 or values.max() > 255:
        _refuse("UINT8 is from 0 to 255")
    return list(values.astype(np.uint8).reshape(shape[0], 1, *expected))


def _read_files(data: Any, shape: list[int]) -> list[bytes]:
    if len(shape) != 1:
        _refuse(f"shape is {shape[:10]}; BYTES have [N]")
    if not isinstance(data, list) or len(data) != shape[0] or not all(isinstance(text, str) for text in data):
        _refuse(f"data must be a list of {shape[0]} strings: images in base64")
    try:
        return [base64.b64decode(text, validate=True) for text in data]
    except (binascii.Error, ValueError):
        _refuse("BYTES must be images in base64")


def _read_outputs(outputs: Any) -> tuple[str, ...]:
    known = (PROBABILITIES, CLASS)
    if outputs is None or outputs == []:
        return known
    given = outputs if isinstance(outputs, list) else [None]
    names = tuple(str(one.get("name")) if isinstance(one, dict) else "" for one in given)
    if not set(names) <= set(known) or len(set(names)) != len(names):
        _refuse(f"outputs must be a list of tensors by name: {', '.join(known)}")
    return names


def _refuse(message: str) -> NoReturn:
    raise Refusal("json", message)
