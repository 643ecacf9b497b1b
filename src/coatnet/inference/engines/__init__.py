"""What computes logits: one class an engine, the same answers from all; `open_engine` chooses.

Shapes: N images, R resolution, C channels, K classes.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from coatnet.bundle import Bundle
from coatnet.errors import UserError
from coatnet.system.hardware import best_device, multiplies_bf16

PRECISIONS = ("fp32", "bf16")
# Its class, and the package without which it is not there, with the extra that brings it.
HOMES = {
    "openvino": ("coatnet.inference.engines.openvino_engine", "OpenVinoEngine", "openvino", "openvino"),
    "onnxruntime": ("coatnet.inference.engines.onnxruntime_engine", "OnnxRuntimeEngine", "onnxruntime", "onnx"),
    "torch": ("coatnet.inference.engines.torch_engine", "TorchEngine", "torch", ""),
    "torch-compiled": ("coatnet.inference.engines.torch_engine", "CompiledEngine", "torch", ""),
}
ENGINES = tuple(HOMES)


class Engine(Protocol):
    """One network, ready to run; by one thread at a time, whichever it is."""

    name: str
    precision: str

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, R, R, C), N at least 1, to logits (N, K)."""
        ...


def open_engine(bundle: Bundle, engine: str = "auto", precision: str = "auto") -> Engine:
    """The engine of that name, with the network of the bundle in it.

    "auto" is torch on a GPU, and on a CPU the first of openvino, onnxruntime and torch that is installed, which is the
    order of their speed there. The precision "auto" is bf16 where engine and hardware compute in it.

    Raises:
        UserError: there is no such engine or precision, or it is not installed.
    """
    if engine not in ("auto", *ENGINES):
        raise UserError(f"engine is {engine!r}; it is one of auto, {', '.join(ENGINES)}")
    if precision not in ("auto", *PRECISIONS):
        raise UserError(f"precision is {precision!r}; it is one of auto, {', '.join(PRECISIONS)}")
    if engine == "auto":
        engine = "torch" if best_device().type != "cpu" else next(name for name in ENGINES if _is_installed(name))
    module, name, package, extra = HOMES[engine]
    if not _is_installed(engine):
        raise UserError(f"engine {engine} needs {package}: pip install 'coatnet[{extra}]'")
    if precision == "auto":
        precision = "bf16" if engine != "onnxruntime" and multiplies_bf16(_device(engine)) else "fp32"
    return getattr(import_module(module), name)(bundle, precision)


def _is_installed(engine: str) -> bool:
    return find_spec(HOMES[engine][2]) is not None


def _device(engine: str) -> torch.device:
    return best_device() if engine.startswith("torch") else torch.device("cpu")
