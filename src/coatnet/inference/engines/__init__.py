"""Engines compute the logits of a bundle, all with the same result; `open_engine` chooses one.

The modules of this package have the names of the libraries they use, so this file must import none of them.

Shapes: N images, R resolution, C channels, K classes.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from coatnet.bundle import Bundle
from coatnet.errors import UserError
from coatnet.system.hardware import choose_device, multiplies_bf16

PRECISIONS = ("fp32", "bf16")
MAX_SPLIT_IMAGES = 16  # chosen: beyond it no engine is faster per image


class EngineEntry(NamedTuple):
    """Where an engine is implemented, the package that it needs, and the extra that installs it."""

    module: str
    class_name: str
    package: str
    extra: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        return find_spec(self.package) is not None

    @property
    def runs_on_gpu(self) -> bool:
        """Whether it takes a device; the others run on the CPU."""
        return self.package == "torch"


# The fastest on CPUs first.
REGISTRY = {
    "openvino": EngineEntry("coatnet.inference.engines.openvino", "OpenVinoEngine", "openvino", "openvino"),
    "onnxruntime": EngineEntry("coatnet.inference.engines.onnxruntime", "OnnxRuntimeEngine", "onnxruntime", "onnx"),
    "torch": EngineEntry("coatnet.inference.engines.torch", "TorchEngine", "torch"),
    "torch-compiled": EngineEntry("coatnet.inference.engines.torch", "CompiledEngine", "torch"),
}
ENGINES = tuple(REGISTRY)


class Engine(Protocol):
    """A network ready to run, by one thread at a time."""

    name: str
    precision: str

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, R, R, C), N at least 1, to logits (N, K)."""
        ...


def open_engine(bundle: Bundle, engine: str = "auto", precision: str = "auto", device: str = "auto") -> Engine:
    """Prepare the network of a bundle in an engine.

    Args:
        bundle: the model.
        engine: one of `ENGINES`; "auto" is torch on a GPU, and on a CPU the first that is installed.
        precision: "fp32" or "bf16"; "auto" is bf16 where engine and hardware compute in it.
        device: "cpu", "cuda" or "cuda:1"; "auto" is the first GPU if there is one. Only torch runs on a GPU.

    Raises:
        UserError: there is no such engine, precision or device, the engine is not installed, or it does not run there.
    """
    if engine not in ("auto", *ENGINES):
        raise UserError(f"engine is {engine!r}; it is one of auto, {', '.join(ENGINES)}")
    if precision not in ("auto", *PRECISIONS):
        raise UserError(f"precision is {precision!r}; it is one of auto, {', '.join(PRECISIONS)}")
    place = choose_device(device)
    if engine == "auto":
        on_gpu = place.type != "cpu"
        engine = "torch" if on_gpu else next(name for name, entry in REGISTRY.items() if entry.is_installed)
    entry = REGISTRY[engine]
    if not entry.is_installed:
        raise UserError(f"engine {engine} needs {entry.package}: pip install 'coatnet[{entry.extra}]'")
    if not entry.runs_on_gpu:
        if device != "auto" and place.type != "cpu":
            raise UserError(f"engine {engine} runs on the CPU, not on {device}; engine torch does")
        place = choose_device("cpu")
    if precision == "auto":
        precision = "bf16" if engine != "onnxruntime" and multiplies_bf16(place) else "fp32"
    make = getattr(import_module(entry.module), entry.class_name)
    return make(bundle, precision, place) if entry.runs_on_gpu else make(bundle, precision)


def split_batch(images: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Split a batch into powers of two, without padding, for engines that compile for each batch size.

    As many batches of 16 as there are, then at most one of 8, 4, 2 and 1, in order.
    """
    sizes = [MAX_SPLIT_IMAGES] * (len(images) // MAX_SPLIT_IMAGES)
    sizes += [size for size in (8, 4, 2, 1) if len(images) & size]
    return np.split(images, np.cumsum(sizes)[:-1])
