"""Write IDX files, the format of MNIST, which `coatnet train` and torchvision read."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_idx(folder: Path, name: str, images: NDArray[np.uint8], labels: NDArray) -> None:
    """Write images (N, H, W) and class indices (N,), up to 255, as the files of the split `name`: train or t10k."""
    for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())
