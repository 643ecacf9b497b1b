"""OpenVINO, the fastest engine on CPUs."""

from pathlib import Path

import numpy as np
import openvino
from numpy.typing import NDArray

from coatnet.bundle import Bundle
from coatnet.inference.engines import split_batch
from coatnet.inference.engines.graph_cache import cached_graph
from coatnet.inference.graph import NormalizedNetwork, example_images, to_openvino, to_program
from coatnet.system.hardware import num_cores

_PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """The folded network in OpenVINO, on all cores that this process may use.

    It is compiled for each batch size of `split_batch` when that is first needed: a graph for any size takes a fifth
    longer, half of it in broadcasts that are optimized away where the size is fixed.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, precision: str) -> None:
        self.precision = precision
        self._core = openvino.Core()
        self._graph = self._core.read_model(
            cached_graph(bundle, "model.xml", openvino.__version__, lambda path: _export(bundle, path))
        )
        self._settings = {
            "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[precision],  # the default would be bf16 on CPUs that have it
            "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, on all cores
            "INFERENCE_NUM_THREADS": num_cores(),
        }
        self._requests: dict[tuple[int, ...], openvino.InferRequest] = {}

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, R, R, C) to logits (N, K)."""
        parts = split_batch(np.ascontiguousarray(images))
        return np.concatenate([self._request(part.shape).infer([part])[0] for part in parts])

    def _request(self, shape: tuple[int, ...]) -> openvino.InferRequest:
        if shape not in self._requests:
            graph = self._graph.clone()
            graph.reshape(list(shape))
            self._requests[shape] = self._core.compile_model(graph, "CPU", self._settings).create_infer_request()
        return self._requests[shape]


def _export(bundle: Bundle, path: Path) -> None:
    """Write the network as an OpenVINO graph: an .xml with a .bin beside it."""
    graph = to_openvino(to_program(NormalizedNetwork(bundle), example_images(bundle)))
    openvino.save_model(graph, path, compress_to_fp16=False)
