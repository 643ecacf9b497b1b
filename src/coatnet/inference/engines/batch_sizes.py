"""Batches of few sizes, for engines that prepare for each: powers of two, none of which is filled up."""

import numpy as np
from numpy.typing import NDArray

LARGEST = 16  # images; chosen: beyond it no engine is faster by the image


def split(images: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The same images in order, in as many sixteens as there are, then in an eight, four, two and one if need be."""
    sizes = [LARGEST] * (len(images) // LARGEST)
    sizes += [size for size in (8, 4, 2, 1) if len(images) & size]
    return np.split(images, np.cumsum(sizes)[:-1])
