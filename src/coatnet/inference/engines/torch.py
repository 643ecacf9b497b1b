"""PyTorch, eager or compiled, on a GPU or the CPU."""

import numpy as np
import torch
from numpy.typing import NDArray

from coatnet.bundle import Bundle
from coatnet.inference.engines import split_batch
from coatnet.inference.graph import NormalizedNetwork

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TorchEngine:
    """The folded network in eager mode."""

    name = "torch"

    def __init__(self, bundle: Bundle, precision: str, device: torch.device) -> None:
        self.precision = precision
        self._device = device
        self._network = NormalizedNetwork(bundle, DTYPES[precision]).to(device).eval()

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, R, R, C) to logits (N, K)."""
        return self._network(torch.from_numpy(images).to(self._device)).cpu().numpy()


class CompiledEngine(TorchEngine):
    """The folded network compiled by `torch.compile`: a minute or two for each batch size of `split_batch`."""

    name = "torch-compiled"

    def __init__(self, bundle: Bundle, precision: str, device: torch.device) -> None:
        super().__init__(bundle, precision, device)
        # Freezing makes weights constants, stored in the layout that the kernels read.
        self._network.compile(options={"freezing": True}, dynamic=False)

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, R, R, C) to logits (N, K)."""
        return np.concatenate([super(CompiledEngine, self).run(part) for part in split_batch(images)])
