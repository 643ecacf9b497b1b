"""Batches of few sizes, for engines that prepare for each: powers of two, none of which is filled up."""

import numpy as np
from numpy.typing import NDArray

LARGEST = 16  # pictures; chosen: beyond it no engine is faster by the picture


def split(pictures: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The same pictures in order, in as many sixteens as there are, then in an eight, four, two and one if need be."""
    sizes = [LARGEST] * (len(pictures) // LARGEST)
    sizes += [size for size in (8, 4, 2, 1) if len(pictures) & size]
    return np.split(pictures, np.cumsum(sizes)[:-1])
