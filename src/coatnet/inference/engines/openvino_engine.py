"""OpenVINO: the fastest on CPUs by a wide margin."""

from pathlib import Path

import numpy as np
import openvino
from numpy.typing import NDArray

from coatnet.bundle import Bundle
from coatnet.inference.engines.batch_sizes import split
from coatnet.inference.engines.graph_cache import cached_graph
from coatnet.inference.graphs import to_openvino, to_program
from coatnet.inference.network import ImageNetwork, example_images
from coatnet.system.hardware import num_cores

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """The folded network in OpenVINO's runtime, on all cores that this process may use.

    It is compiled for each of the sizes of `sizes.split` when that is first wanted: a graph of any size takes a fifth
    longer, half of which goes into broadcasts that vanish where the size is known.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, precision: str) -> None:
        self.precision = precision
        self._core = openvino.Core()
        self._graph = self._core.read_model(
            cached_graph(bundle, "model.xml", openvino.__version__, lambda path: export(bundle, path))
        )
        self._settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],  # on CPUs that have bf16 it would be the default
            "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, on all cores
            "INFERENCE_NUM_THREADS": num_cores(),
        }
        self._requests: dict[tuple[int, ...], openvino.InferRequest] = {}

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, R, R, C) to logits (N, K)."""
        parts = split(np.ascontiguousarray(images))
        return np.concatenate([self._request(part.shape).infer([part])[0] for part in parts])

    def _request(self, shape: tuple[int, ...]) -> openvino.InferRequest:
        if shape not in self._requests:
            graph = self._graph.clone()
            graph.reshape(list(shape))
            self._requests[shape] = self._core.compile_model(graph, "CPU", self._settings).create_infer_request()
        return self._requests[shape]


def export(bundle: Bundle, path: Path) -> None:
    """Write the network for OpenVINO: an .xml with a .bin beside it."""
    graph = to_openvino(to_program(ImageNetwork(bundle), example_images(bundle)))
    openvino.save_model(graph, path, compress_to_fp16=False)
