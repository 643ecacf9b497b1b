"""GPUs that people train on: memory, and arithmetic by their data sheets."""

from dataclasses import dataclass

from coatnet.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    """`memory` in 10^9 bytes; `tflops` dense bf16 products, 10^12 operations a second, without sparsity."""

    name: str
    memory: float
    tflops: float


# By their data sheets; the names are SkyPilot's.
_ROWS = (
    Gpu("L4", 24, 121),
    Gpu("A100", 40, 312),
    Gpu("L40S", 48, 362),
    Gpu("A100-80GB", 80, 312),
    Gpu("H100", 80, 989),
    Gpu("H200", 141, 989),
    Gpu("B200", 180, 2250),
)
GPUS = {row.name: row for row in _ROWS}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name. Raises UserError with the nearest names if there is none."""
    if name not in GPUS:
        raise UserError(f"GPU {name!r} is unknown{nearest(name, GPUS)}; there are {', '.join(GPUS)}")
    return GPUS[name]


def gpu_with(memory: float) -> Gpu:
    """The first GPU of the table with that much memory, or the largest there is."""
    return next((row for row in _ROWS if row.memory >= memory), _ROWS[-1])
