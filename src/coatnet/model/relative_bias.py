"""The relative bias w_{i-j}: one scalar per offset between two cells and per head (paper, equation 3).

Shapes: A heads, N = H * W cells, S window side.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatnet.model.inference_cache import InferenceCache

BIAS_ALIGNMENT = 8  # values: what torch's memory-efficient attention asks of its bias
INITIAL_DEVIATION = 0.02  # chosen: from the authors' later code; the paper says only "trainable"


class GlobalRelativeBias(nn.Module):
    """Base class of relative biases over a whole grid: a table of offsets, expanded to all pairs of cells.

    In evaluation the last matrix is cached until grid, dtype, device or weights change (appendix A.1).
    """

    def __init__(self) -> None:
        super().__init__()
        self._matrix: InferenceCache[Tensor] = InferenceCache()

    def train(self, mode: bool = True) -> Self:
        self._matrix.clear()
        return super().train(mode)

    def table_for(self, grid: tuple[int, int]) -> Tensor:
        """One scalar per head and offset of query minus key on that grid: `(A, 2H-1, 2W-1)`."""
        raise NotImplementedError

    def forward(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The bias `(A, N, N)` for queries (rows) and keys (columns), both row by row over the grid."""
        if torch.compiler.is_dynamo_compiling():
            return opaque_expand_table(self.table_for(grid).to(dtype), *grid)
        if not self._matrix.is_usable(self):
            return self.matrix(grid).to(dtype)
        return self._matrix.get((grid, dtype), self.parameters(), lambda: self.matrix(grid).to(dtype))

    def matrix(self, grid: tuple[int, int]) -> Tensor:
        """P[i - i' + H - 1, j - j' + W - 1] for query (i, j) and key (i', j'), `(A, N, N)`."""
        return expand_table(self.table_for(grid), *grid)


class RelativeBias(GlobalRelativeBias):
    """The paper's relative bias: one parameter per head and offset.

    The table `(A, 2H-1, 2W-1)` belongs to one grid; for any other grid it is resampled bilinearly (appendix A.1).

    Args:
        grid: height and width of the feature map, in cells.
    """

    def __init__(self, num_heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_heads, 2 * grid[0] - 1, 2 * grid[1] - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the table from a normal distribution."""
        initialize_table(self.table)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid that the table belongs to, in cells."""
        return (self.table.shape[1] + 1) // 2, (self.table.shape[2] + 1) // 2

    def table_for(self, grid: tuple[int, int]) -> Tensor:
        return resample(self.table, grid)


class LocalRelativeBias(nn.Module):
    """The relative bias of local attention: one parameter per head and offset, `(A, S, S)`."""

    def __init__(self, num_heads: int, window: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_heads, window, window))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the table from a normal distribution."""
        initialize_table(self.table)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The bias `(A, 1, S * S)` of the neighbors, row by row."""
        table = self.table.flip(1, 2)  # from query minus key, as in the global table, to the positions of keys
        return table.flatten(1)[:, None].to(dtype)  # (A, 1, S * S)


def expand_table(table: Tensor, height: int, width: int) -> Tensor:
    """Expand one scalar per offset, `(A, 2H-1, 2W-1)`, to one per pair of cells, `(A, N, N)`.

    An H x W window slides over the table: the window at (i, j), mirrored, is the row of query (i, j).
    """
    windows = table.unfold(1, height, 1)  # (A, H, 2W-1, H)
    windows = windows.unfold(2, width, 1)  # (A, H, W, H, W)
    windows = windows.flip(3, 4)
    windows = windows.flatten(3, 4)  # (A, H, W, N)
    return windows.flatten(1, 2)  # (A, N, N)


# Inductor fuses `expand_table` into the softmax, recomputes it for every image, and on CPUs no longer vectorizes: 49
# instead of 29 ms for an attention of 12 heads over (16, 384, 14, 14), bf16. An opaque operation is computed once.
@torch.library.custom_op("coatnet::relative_bias_pairs", mutates_args=())
def opaque_expand_table(table: Tensor, height: int, width: int) -> Tensor:
    """`expand_table` as one operation that a compiler does not look into."""
    return aligned_pairs(table, height * width).copy_(expand_table(table, height, width))


@opaque_expand_table.register_fake
def _(table: Tensor, height: int, width: int) -> Tensor:
    return aligned_pairs(table, height * width)


def aligned_pairs(table: Tensor, num_cells: int) -> Tensor:
    """Unset values `(A, N, N)`, whose rows begin at multiples of `BIAS_ALIGNMENT` values.

    torch's fused attention pads a bias whose rows do not, and Inductor lays the padded one out by heads, which the
    backward kernel refuses ("last dimension must be contiguous", torch 2.11 on an H100).
    """
    row = -(-num_cells // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    return table.new_empty(table.shape[0], num_cells, row)[..., :num_cells]


def _save_grid(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    _, ctx.height, ctx.width = inputs


def _sum_over_pairs(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """The gradient of each scalar of the table: the sum over all pairs of cells at that offset."""
    heads, height, width = gradient.shape[0], ctx.height, ctx.width
    windows = gradient.unflatten(2, (height, width))  # (A, N, H, W)
    windows = windows.unflatten(1, (height, width))  # (A, H, W, H, W)
    windows = windows.flip(3, 4)
    rows = torch.ops.aten.unfold_backward(windows, (heads, height, 2 * width - 1, height), 2, width, 1)
    table = torch.ops.aten.unfold_backward(rows, (heads, 2 * height - 1, 2 * width - 1), 1, height, 1)
    return table, None, None


opaque_expand_table.register_autograd(_sum_over_pairs, setup_context=_save_grid)


def initialize_table(table: Tensor) -> None:
    """Initialize a table of biases from N(0, 0.02), in place."""
    if not table.is_meta:  # there are no values on the meta device, and normal_ imports torch's compiler, a second
        nn.init.normal_(table, std=INITIAL_DEVIATION)


def resample(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a table to another grid, bilinearly: `(A, 2H-1, 2W-1) -> (A, 2H'-1, 2W'-1)` (appendix A.1).

    Returns the table itself if it has that grid already.
    """
    size = (2 * grid[0] - 1, 2 * grid[1] - 1)
    if size == tuple(table.shape[1:]):
        return table
    # chosen: half-pixel centers, as in the authors' later code; the zero offset stays in the middle.
    return F.interpolate(table[None], size=size, mode="bilinear", align_corners=False)[0]
