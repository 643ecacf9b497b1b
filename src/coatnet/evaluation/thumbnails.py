"""Small copies of a dataset's images, for people to look at."""

import numpy as np
import torch.nn.functional as F

from coatnet.data.batches import read_image
from coatnet.data.datasets import Dataset
from coatnet.data.transforms import as_images

LONGEST_SIDE = 160


def thumbnail(dataset: Dataset, index: int) -> np.ndarray:
    """Image number `index`, whole, at most 160 pixels a side: uint8 (H, W, 3)."""
    pixels = as_images(read_image(dataset, index)[0])  # (3 or 1, H, W)
    scale = LONGEST_SIDE / max(pixels.shape[1:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in pixels.shape[1:]]
        pixels = F.interpolate(pixels[None].float(), size=size, mode="bilinear", antialias=True)[0]
        pixels = pixels.round().clamp(0, 255).byte()
    return pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
