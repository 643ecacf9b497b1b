"""ONNX Runtime, on CPUs faster than torch and slower than OpenVINO."""

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from coatnet.bundle import Bundle
from coatnet.errors import UserError
from coatnet.inference.engines.graph_cache import cached_graph
from coatnet.inference.graph import NormalizedNetwork, example_images, to_onnx, to_program
from coatnet.system.hardware import num_cores


class OnnxRuntimeEngine:
    """The folded network in ONNX Runtime, on all cores that this process may use."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, precision: str) -> None:
        if precision != "fp32":
            raise UserError(f"engine onnxruntime computes in fp32 on CPUs, not in {precision}; openvino and torch do")
        self.precision = precision
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = num_cores()
        graph = cached_graph(bundle, "model.onnx", onnxruntime.__version__, lambda path: _export(bundle, path))
        self._session = onnxruntime.InferenceSession(graph, settings, ["CPUExecutionProvider"])

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, R, R, C) to logits (N, K)."""
        return np.asarray(self._session.run(None, {"pictures": images})[0])


def _export(bundle: Bundle, path: Path) -> None:
    """Write the network as an ONNX graph."""
    to_onnx(to_program(NormalizedNetwork(bundle), example_images(bundle))).save(path)
