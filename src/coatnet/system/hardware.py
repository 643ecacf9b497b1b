"""What the machine under a run is told, once, before the work begins."""

import ctypes
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next tensor, not give it back; whether it listened.

    By default glibc maps every large tensor afresh, and the kernel clears each page at the first touch: 20 of the
    27 ms of a GELU over (16, 384, 56, 56) float32 on two cores. The process then holds its peak memory until it
    ends. Nothing happens where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1}
    return all(libc.mallopt(option, value) for option, value in settings.items())


def best_device() -> "torch.device":
    """The first GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def multiplies_bf16(device: "torch.device") -> bool:
    """Whether the hardware multiplies matrices in bf16, rather than converting them."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
