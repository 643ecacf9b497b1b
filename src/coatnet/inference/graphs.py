"""A module as a graph: exported by torch, then as another program reads it. The batch may be of any size."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from coatnet.errors import UserError

if TYPE_CHECKING:
    import openvino

MOST_IMAGES = 4096  # a batch; the exporter wants a bound


def to_program(module: nn.Module, example: Tensor, *, free: tuple[int, ...] = ()) -> ExportedProgram:
    """The graph of a module of one tensor. Its first size is free, and those of the axes that are named.

    `example` has two images or more: of one, the exporter takes the size for a constant.
    """
    sizes: dict[int, Any] = {0: Dim("batch", min=1, max=MOST_IMAGES)} | dict.fromkeys(free, Dim.DYNAMIC)
    with torch.no_grad(), quiet():
        return torch.export.export(module.eval(), (example,), dynamic_shapes=(sizes,))


def to_openvino(program: ExportedProgram) -> "openvino.Model":
    """Raises UserError if OpenVINO is not installed."""
    keep_private()
    try:
        import openvino
    except ImportError:
        raise UserError("OpenVINO is not installed: pip install 'coatnet[openvino]'") from None
    with quiet():
        return openvino.convert_model(program)


def to_onnx(program: ExportedProgram, *, inputs: str = "pictures", outputs: str = "logits") -> "torch.onnx.ONNXProgram":
    """Its `save` puts weights above 1.6 GB into a file beside, since protobuf ends at 2 GB.

    Raises UserError if ONNX is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("ONNX is not installed: pip install 'coatnet[onnx]'") from None
    with quiet():
        converted = torch.onnx.export(
            program, (), input_names=[inputs], output_names=[outputs], dynamo=True, verbose=False
        )
    assert converted is not None
    return converted


def keep_private() -> None:
    """Or OpenVINO and NNCF report every use to Intel; without this package they use a stub of their own."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters tell their own authors many things; what goes wrong comes as an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
