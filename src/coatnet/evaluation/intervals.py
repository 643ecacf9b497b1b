"""95 % confidence intervals: Wilson for fractions, normal for means, bootstrap standard errors for all others.

Wilson: E. B. Wilson, 1927, "Probable inference, the law of succession, and statistical inference".
"""

import math
from collections.abc import Callable

import numpy as np

Interval = tuple[float, float]

_Z = 1.959963984540054  # the 97.5 % point of the standard normal distribution


def wilson_interval(successes: int, total: int) -> Interval:
    """The interval of a fraction; unlike the normal one it stays valid at 0, at 1 and for few images."""
    if total == 0:
        return (0.0, 1.0)
    fraction = successes / total
    spread = _Z**2 / total
    center = (fraction + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(fraction * (1 - fraction) / total + spread / (4 * total)) / (1 + spread)
    # At 0 and 1, rounding could put a bound on the wrong side of the fraction.
    return (max(0.0, min(fraction, center - half)), min(1.0, max(fraction, center + half)))


def mean_interval(values: np.ndarray) -> Interval | None:
    """The interval of the mean of independent values >= 0, (N,); None for a single value."""
    if len(values) < 2:
        return None
    mean = float(values.mean())
    half = _Z * float(values.std(ddof=1)) / math.sqrt(len(values))
    return (max(0.0, mean - half), mean + half)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], size: int, *, replicates: int = 100
) -> Interval | None:
    """The interval of a statistic in 0..1: plus and minus 1.96 bootstrap standard errors; None for a single image.

    Standard errors rather than percentiles: the calibration error is biased under resampling, and its percentile
    interval may exclude the value itself.

    Args:
        statistic: computes it from how often each image was drawn, integers (size,).
        size: number of images.
        replicates: number of resamples.
    """
    if size < 2:
        return None
    generator = np.random.Generator(np.random.PCG64(0))
    value = statistic(np.ones(size, dtype=np.int64))
    drawn = [statistic(np.bincount(generator.integers(size, size=size), minlength=size)) for _ in range(replicates)]
    half = _Z * float(np.std(drawn, ddof=1))
    return (max(0.0, value - half), min(1.0, value + half))
