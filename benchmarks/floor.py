"""The peak rate of this machine, to compare figures with."""

import time

import torch


def product_rate(dtype: torch.dtype, side: int = 2048) -> float:
    """Operations a second of a large matrix product, the best of five."""
    a, b = torch.randn(side, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
