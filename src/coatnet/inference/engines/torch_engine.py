"""torch itself, as it is or compiled, on the GPU where there is one."""

import numpy as np
import torch
from numpy.typing import NDArray

from coatnet.bundle import Bundle
from coatnet.inference.engines.batch_sizes import split
from coatnet.inference.network import ImageNetwork
from coatnet.system.hardware import best_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TorchEngine:
    """The folded network, run operation by operation."""

    name = "torch"

    def __init__(self, bundle: Bundle, precision: str) -> None:
        self.precision = precision
        self._device = best_device()
        self._network = ImageNetwork(bundle, DTYPES[precision]).to(self._device).eval()

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, R, R, C) to logits (N, K)."""
        return self._network(torch.from_numpy(images).to(self._device)).cpu().numpy()


class CompiledEngine(TorchEngine):
    """The same through torch's compiler, which takes a minute or two for each of the sizes of `sizes.split`."""

    name = "torch-compiled"

    def __init__(self, bundle: Bundle, precision: str) -> None:
        super().__init__(bundle, precision)
        # Constants, weights among them, are laid out once as the kernels want them.
        self._network.compile(options={"freezing": True}, dynamic=False)

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.concatenate([super(CompiledEngine, self).run(part) for part in split(images)])
