"""95 % intervals: Wilson for shares, normal for means, bootstrap standard errors for everything else.

Wilson: E. B. Wilson, 1927, "Probable inference, the law of succession, and statistical inference".
"""

import math
from collections.abc import Callable

import numpy as np

Interval = tuple[float, float]

_Z = 1.959963984540054  # the 97.5 % point of the standard normal distribution


def wilson_interval(successes: int, total: int) -> Interval:
    """The 95 % interval of a share; unlike the normal one it is sensible at 0, at 1 and for few images."""
    if total == 0:
        return (0.0, 1.0)
    share = successes / total
    spread = _Z**2 / total
    center = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # At the ends rounding can put the bound a hair past the share itself.
    return (max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))


def mean_interval(values: np.ndarray) -> Interval | None:
    """The 95 % interval of the mean of independent values >= 0, (N,); None for a single value."""
    if len(values) < 2:
        return None
    mean = float(values.mean())
    half = _Z * float(values.std(ddof=1)) / math.sqrt(len(values))
    return (max(0.0, mean - half), mean + half)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], size: int, *, replicates: int = 100
) -> Interval | None:
    """A statistic in 0..1 of `size` images, plus and minus 1.96 bootstrap standard errors; None for size 1.

    `statistic` takes how often each image was drawn, shape (size,), integers. Standard errors rather than
    percentiles: calibration error is biased under resampling, and a percentile interval can miss the value.
    """
    if size < 2:
        return None
    generator = np.random.Generator(np.random.PCG64(0))
    value = statistic(np.ones(size, dtype=np.int64))
    drawn = [statistic(np.bincount(generator.integers(size, size=size), minlength=size)) for _ in range(replicates)]
    half = _Z * float(np.std(drawn, ddof=1))
    return (max(0.0, value - half), min(1.0, value + half))
