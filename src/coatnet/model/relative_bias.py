"""The relative bias w_{i-j}: one scalar for each offset between two cells, for each head (paper, equation 3).

Shapes: A heads, N = H * W cells, S window side.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatnet.model.inference_cache import InferenceCache

INITIAL_DEVIATION = 0.02  # chosen: from the authors' later code; the paper says only "trainable"


class GlobalBias(nn.Module):
    """The matrix w_{i-j} for all pairs of cells of a grid, read out of one table of offsets.

    In evaluation the last matrix is kept until grid, dtype, device or weights change.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: InferenceCache[Tensor] = InferenceCache()

    def train(self, mode: bool = True) -> Self:
        self._kept.forget()
        return super().train(mode)

    def table_for(self, grid: tuple[int, int]) -> Tensor:
        """One scalar for each offset of query minus key on that grid, for each head: `(A, 2H-1, 2W-1)`."""
        raise NotImplementedError

    def forward(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The bias `(A, N, N)` of queries (rows) and keys (columns), both row by row over the grid."""
        if torch.compiler.is_dynamo_compiling():
            return pairs_as_one_operation(self.table_for(grid).to(dtype), *grid)
        if not self._kept.serves(self):
            return self.matrix(grid).to(dtype)
        return self._kept.get((grid, dtype), self.parameters(), lambda: self.matrix(grid).to(dtype))

    def matrix(self, grid: tuple[int, int]) -> Tensor:
        """P[i - i' + H - 1, j - j' + W - 1] for query (i, j) and key (i', j'), `(A, N, N)`."""
        return pairs(self.table_for(grid), *grid)


class RelativeBias(GlobalBias):
    """The paper's: every offset of a grid has a parameter of its own.

    The table `(A, 2H-1, 2W-1)` belongs to the grid it was made for; for any other grid it is resampled bilinearly
    (appendix A.1).
    """

    def __init__(self, num_heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_heads, 2 * grid[0] - 1, 2 * grid[1] - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin untrained."""
        draw(self.table)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid that the table belongs to, in cells."""
        return (self.table.shape[1] + 1) // 2, (self.table.shape[2] + 1) // 2

    def table_for(self, grid: tuple[int, int]) -> Tensor:
        return resample(self.table, grid)


class LocalRelativeBias(nn.Module):
    """The bias of local attention: one scalar for each of the S x S offsets, for each head."""

    def __init__(self, num_heads: int, window: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_heads, window, window))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin untrained."""
        draw(self.table)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """`(A, 1, S * S)` for neighbours row by row; indexed by query minus key, like the global table."""
        return self.table.flip(1, 2).flatten(1)[:, None].to(dtype)


def pairs(table: Tensor, height: int, width: int) -> Tensor:
    """One scalar for each offset, `(A, 2H-1, 2W-1)`, as one for each pair of cells, `(A, N, N)`.

    Windows of H x W offsets slide over the table: window (i, j) is row (i, j) of the matrix, keys mirrored.
    """
    windows = table.unfold(1, height, 1).unfold(2, width, 1)  # (A, H, W, H, W)
    return windows.flip(3, 4).flatten(3, 4).flatten(1, 2)


# The compiler would read `pairs` out of the table anew for every image, within the softmax, which on CPUs then runs
# without vectors: 49 instead of 29 ms for an attention of 12 heads over (16, 384, 14, 14), bf16. What it cannot look
# into is computed once.
@torch.library.custom_op("coatnet::relative_bias_pairs", mutates_args=())
def pairs_as_one_operation(table: Tensor, height: int, width: int) -> Tensor:
    """`pairs`, in a graph."""
    return pairs(table, height, width).contiguous()


@pairs_as_one_operation.register_fake
def _(table: Tensor, height: int, width: int) -> Tensor:
    return table.new_empty(table.shape[0], height * width, height * width)


def _remember_grid(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    _, ctx.height, ctx.width = inputs


def _sum_over_pairs(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """The gradient of a scalar of the table: the sum over all pairs at that offset."""
    heads, height, width = gradient.shape[0], ctx.height, ctx.width
    windows = gradient.unflatten(2, (height, width)).unflatten(1, (height, width)).flip(3, 4)
    rows = torch.ops.aten.unfold_backward(windows, (heads, height, 2 * width - 1, height), 2, width, 1)
    return torch.ops.aten.unfold_backward(rows, (heads, 2 * height - 1, 2 * width - 1), 1, height, 1), None, None


pairs_as_one_operation.register_autograd(_sum_over_pairs, setup_context=_remember_grid)


def draw(table: Tensor) -> None:
    """Untrained biases, in place; nothing on the meta device, where normal_ imports torch's compiler for a second."""
    if not table.is_meta:
        nn.init.normal_(table, std=INITIAL_DEVIATION)


def resample(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """The table `(A, 2H'-1, 2W'-1)` for another grid, bilinearly; itself where the grid is its own."""
    size = (2 * grid[0] - 1, 2 * grid[1] - 1)
    if size == tuple(table.shape[1:]):
        return table
    # chosen: half-pixel centres, as the authors' later code; the zero offset stays in the middle.
    return F.interpolate(table[None], size=size, mode="bilinear", align_corners=False)[0]
