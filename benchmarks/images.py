"""JPEGs with the fine detail of photographs, which decides the time of decoding."""

import io
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_photographs(paths: Iterable[Path], width: int, height: int) -> float:
    """Write a JPEG (quality 90) at each path; return their mean bytes.

    They are mosaics of pieces of scikit-learn's two photographs at their own resolution.
    """
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images  # 427 x 640 each
    generator = np.random.default_rng(0)
    sizes = []
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(mosaic(photographs, width, height, generator)).save(buffer, "JPEG", quality=90)
        path.write_bytes(buffer.getvalue())
        sizes.append(len(buffer.getvalue()))
    return statistics.mean(sizes)


def mosaic(photographs: list[np.ndarray], width: int, height: int, generator: np.random.Generator) -> np.ndarray:
    """Pieces of 500 x 375 at most, from random places, left and right sometimes exchanged."""
    image = np.empty((height, width, 3), dtype=np.uint8)
    for top in range(0, height, 375):
        for left in range(0, width, 500):
            place = image[top : top + 375, left : left + 500]
            photograph = photographs[generator.integers(len(photographs))]
            down = generator.integers(photograph.shape[0] - place.shape[0] + 1)
            right = generator.integers(photograph.shape[1] - place.shape[1] + 1)
            piece = photograph[down : down + place.shape[0], right : right + place.shape[1]]
            place[:] = piece[:, ::-1] if generator.random() < 0.5 else piece
    return image
