"""The network as every engine and export has it: folded, behind its own normalisation.

Shapes: N images, R resolution, C channels, K classes.
"""

import torch
from torch import Tensor, nn

from coatnet.bundle import Bundle
from coatnet.inference.folding import fold


class ImageNetwork(nn.Module):
    """Images uint8 `(N, R, R, C)` to logits `(N, K)`, float32, computed in `dtype`."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, bundle: Bundle, dtype: torch.dtype = torch.float32, *, any_size: bool = False) -> None:
        super().__init__()
        self.network = fold(bundle.model, any_size=any_size).to(dtype)
        self.dtype = dtype
        for name, values in (("mean", bundle.preprocessing.mean), ("deviation", bundle.preprocessing.std)):
            self.register_buffer(name, 255 * torch.tensor(values))

    def forward(self, pixels: Tensor) -> Tensor:
        images = (pixels.float() - self.mean) / self.deviation
        return self.network(images.to(self.dtype).permute(0, 3, 1, 2)).float()


def probabilities_of(logits: Tensor, *, multilabel: bool) -> Tensor:
    """`(N, K)` to `(N, K)`: a softmax, or K sigmoids for several labels."""
    return logits.sigmoid() if multilabel else logits.softmax(1)


def example_images(bundle: Bundle) -> Tensor:
    """Two black images, for an exporter to follow through the network."""
    side = bundle.preprocessing.resolution
    return torch.zeros(2, side, side, bundle.preprocessing.channels, dtype=torch.uint8)
