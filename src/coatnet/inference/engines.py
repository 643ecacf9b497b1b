"""Engines compute logits and novelty of a bundle, all with the same result; `open_engine` chooses one.

OpenVINO and ONNX Runtime are imported when their engine is opened.

Shapes: N images, R resolution, C channels, K classes. The results for a calibrated bundle are (N, K + 1), with the
novelty as the last column.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from coatnet.bundle import Bundle
from coatnet.errors import UserError, first_line
from coatnet.inference.graph import NormalizedNetwork, example_images, save_openvino, to_onnx, to_openvino, to_program
from coatnet.inference.graph_cache import cached_graph
from coatnet.system.hardware import choose_device, explain_compiler, multiplies_bf16, num_cores, require_compiler
from coatnet.system.telemetry import import_onnxruntime
from coatnet.system.terminal import report_wait, warn

if TYPE_CHECKING:
    import openvino

PRECISIONS = ("fp32", "bf16")
MAX_SPLIT_IMAGES = 16  # chosen: beyond it no engine is faster per image
_NOT_COMPILED = "take another engine"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}


class Engine(Protocol):
    """A network ready to run, by one thread at a time."""

    name: str
    precision: str

    def run(self, images: NDArray) -> NDArray[np.float32]:
        """Images (N, R, R, C), N at least 1, to logits (N, K); a calibrated bundle adds the novelty, (N, K + 1).

        Images are uint8, or float32 levels where the preprocessing of the bundle has a scale.
        """
        ...


class TorchEngine:
    """The folded network in eager mode, on a GPU or the CPU."""

    name = "torch"

    def __init__(self, bundle: Bundle, precision: str, device: torch.device) -> None:
        self.precision = precision
        self._device = device
        self._network = NormalizedNetwork(bundle, _DTYPES[precision]).to(device).eval()

    @torch.inference_mode()
    def run(self, images: NDArray) -> NDArray[np.float32]:
        return self._network(torch.from_numpy(images).to(self._device)).cpu().numpy()


class CompiledEngine(TorchEngine):
    """The folded network compiled by `torch.compile`: a minute or two for each batch size of `split_batch`."""

    name = "torch-compiled"

    def __init__(self, bundle: Bundle, precision: str, device: torch.device) -> None:
        require_compiler(device, _NOT_COMPILED)
        super().__init__(bundle, precision, device)
        # Freezing makes weights constants, stored in the layout that the kernels read.
        self._network.compile(options={"freezing": True}, dynamic=False)
        self._compiled: set[int] = set()  # batch sizes

    def run(self, images: NDArray) -> NDArray[np.float32]:
        with explain_compiler(_NOT_COMPILED):
            return np.concatenate([self._run_part(part) for part in split_batch(images)])

    def _run_part(self, images: NDArray) -> NDArray[np.float32]:
        if len(images) in self._compiled:
            return super().run(images)
        self._compiled.add(len(images))
        with report_wait(f"compiling the network for batches of {len(images)}, which may take minutes"):
            return super().run(images)


class OpenVinoEngine:
    """The folded network in OpenVINO, on all cores that this process may use; the fastest on CPUs.

    It is compiled for each batch size of `split_batch` when that is first needed: a graph for any size takes a fifth
    longer, half of it in broadcasts that are optimized away where the size is fixed.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, precision: str, device: torch.device) -> None:
        import openvino

        def write(path: Path) -> None:
            save_openvino(to_openvino(to_program(NormalizedNetwork(bundle), example_images(bundle))), path)

        self.precision = precision
        self._core = openvino.Core()
        self._graph = self._core.read_model(cached_graph(bundle, "model.xml", openvino.__version__, write))
        self._settings = {
            "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[precision],  # the default would be bf16 on CPUs that have it
            "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, on all cores
            "INFERENCE_NUM_THREADS": num_cores(),
        }
        self._requests: dict[tuple[int, ...], openvino.InferRequest] = {}

    def run(self, images: NDArray) -> NDArray[np.float32]:
        parts = split_batch(np.ascontiguousarray(images))
        return np.concatenate([self._request(part.shape).infer([part])[0] for part in parts])

    def _request(self, shape: tuple[int, ...]) -> "openvino.InferRequest":
        if shape not in self._requests:
            graph = self._graph.clone()
            graph.reshape(list(shape))
            with report_wait(f"compiling the network for batches of {shape[0]}"):
                compiled = self._core.compile_model(graph, "CPU", self._settings)
            self._requests[shape] = compiled.create_infer_request()
        return self._requests[shape]


class OnnxRuntimeEngine:
    """The folded network in ONNX Runtime, on all cores that this process may use."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, precision: str, device: torch.device) -> None:
        onnxruntime = import_onnxruntime()

        def write(path: Path) -> None:
            to_onnx(to_program(NormalizedNetwork(bundle), example_images(bundle))).save(path)

        if precision != "fp32":
            raise UserError(f"engine onnxruntime computes in fp32 on CPUs, not in {precision}; openvino and torch do")
        self.precision = precision
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = num_cores()
        graph = cached_graph(bundle, "model.onnx", onnxruntime.__version__, write)
        self._session = onnxruntime.InferenceSession(graph, settings, ["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def run(self, images: NDArray) -> NDArray[np.float32]:
        return np.asarray(self._session.run(None, {self._input: images})[0])


class EngineEntry(NamedTuple):
    """An engine, the package that it needs, and the extra of this package that installs it."""

    engine: Any
    package: str
    extra: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        return find_spec(self.package) is not None

    @property
    def runs_on_gpu(self) -> bool:
        """Whether it computes on the device that is asked for; the others run on the CPU."""
        return self.package == "torch"


# The fastest on CPUs first.
REGISTRY = {
    "openvino": EngineEntry(OpenVinoEngine, "openvino", "openvino"),
    "onnxruntime": EngineEntry(OnnxRuntimeEngine, "onnxruntime", "onnx"),
    "torch": EngineEntry(TorchEngine, "torch"),
    "torch-compiled": EngineEntry(CompiledEngine, "torch"),
}
ENGINES = tuple(REGISTRY)


def open_engine(bundle: Bundle, engine: str = "auto", precision: str = "auto", device: str = "auto") -> Engine:
    """Prepare the network of a bundle in an engine.

    Args:
        bundle: the model.
        engine: one of `ENGINES`; "auto" is torch on a GPU, and on a CPU the first that is installed.
        precision: "fp32" or "bf16"; "auto" is bf16 where engine and hardware compute in it, and on CPUs only where
            that is faster.
        device: "cpu", "cuda" or "cuda:1"; "auto" is the first GPU if there is one. Only torch runs on a GPU.

    Raises:
        UserError: there is no such engine, precision or device, the engine is not installed, or it does not run there.
    """
    if engine not in ("auto", *ENGINES):
        raise UserError(f"engine is {engine!r}; it is one of auto, {', '.join(ENGINES)}")
    if precision not in ("auto", *PRECISIONS):
        raise UserError(f"precision is {precision!r}; it is one of auto, {', '.join(PRECISIONS)}")
    place = choose_device(device)
    if engine == "auto" and place.type == "cpu":
        for name in (name for name, entry in REGISTRY.items() if entry.is_installed and not entry.runs_on_gpu):
            if name == "onnxruntime" and precision == "bf16":  # it computes in fp32
                continue
            try:
                return open_engine(bundle, name, precision, device)
            except (UserError, ImportError) as error:  # no cache folder, or a package is missing or does not work
                warn(f"engine {name} is left out: {first_line(error)}")
    entry = REGISTRY["torch" if engine == "auto" else engine]
    if not entry.is_installed:
        raise UserError(f"engine {engine} needs {entry.package}: pip install 'coatnet[{entry.extra}]'")
    if not entry.runs_on_gpu:
        if device != "auto" and place.type != "cpu":
            raise UserError(f"engine {engine} runs on the CPU, not on {device}; engine torch does")
        place = choose_device("cpu")
    if precision == "auto":
        precision = "bf16" if engine != "onnxruntime" and multiplies_bf16(place) else "fp32"
    return entry.engine(bundle, precision, place)


def split_batch(images: NDArray) -> list[NDArray]:
    """Split a batch into powers of two, without padding, for engines that compile for each batch size.

    As many batches of 16 as there are, then at most one of 8, 4, 2 and 1, in order.
    """
    sizes = [MAX_SPLIT_IMAGES] * (len(images) // MAX_SPLIT_IMAGES)
    sizes += [size for size in (8, 4, 2, 1) if len(images) & size]
    return np.split(images, np.cumsum(sizes)[:-1])
