"""Write the images that travel inside the package, from a folder with Fashion-MNIST's four IDX files.

    python scripts/embed_datasets.py /usr/share/datasets/fashion-mnist

Each split becomes one PNG sheet, sorted by class: labels need no file, and a person can look at it.
The digits come from scikit-learn's copy of UCI's "Optical Recognition of Handwritten Digits".
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from coatnet.data.builtin import read_idx

EMBEDDED = Path(__file__).parents[1] / "src/coatnet/data/embedded"
COLUMNS = 100


def main(folder: Path) -> None:
    for split, name, per_class in (("train", "training", 1000), ("t10k", "validation", 200)):
        images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
        first = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(10)])
        write_sheet(images[first], EMBEDDED / f"fashion-mnist-small-{name}.png")
    digits = load_digits()
    order = np.argsort(digits.target, kind="stable")
    np.savez_compressed(
        EMBEDDED / "digits.npz",
        pictures=np.round(digits.images[order] * (255 / 16)).astype(np.uint8),  # 17 levels of ink
        labels=digits.target[order].astype(np.uint8),
    )


def write_sheet(images: np.ndarray, path: Path) -> None:
    """Images (N, H, W), N a multiple of 100, as rows of 100."""
    num_images, height, width = images.shape
    rows = images.reshape(num_images // COLUMNS, COLUMNS, height, width)
    sheet = rows.transpose(0, 2, 1, 3).reshape(-1, COLUMNS * width)
    Image.fromarray(np.ascontiguousarray(sheet)).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
