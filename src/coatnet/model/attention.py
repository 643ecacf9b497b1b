"""Self-attention over the cells of a feature map: the paper's relative attention and the alternatives it compares.

Every class maps `(B, C, H, W)` to `(B, C', H, W)`.

Shapes: B batch, C width, H W feature map, N = H * W cells, A heads, D head_dim, S window side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatnet.model.layers import compiled_for_inference, grid_of, to_map, to_tokens
from coatnet.model.relative_bias import GlobalRelativeBias, LocalRelativeBias, expand_table, opaque_expand_table

# chosen: in a training step (bf16, one core, windows of 7) local attention on 64 maps of 7 x 7 cells takes 7 ms dense
# and 140 with gathered neighbors, on 16 maps of 28 x 28 540 and 1,680, on 4 of 42 x 42 870 and 840.
MAX_DENSE_CELLS = 1024


class MultiHeadProjection(nn.Module):
    """Base class of attentions: the projections to queries, keys and values, and the output projection.

    Args:
        in_width: C.
        width: C' = A * D, also the width of queries, keys and values.
        head_dim: D.
    """

    def __init__(self, in_width: int, width: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = width // head_dim
        # An attribute, so that a planner can count the kernel that another device would run.
        self.attention_kernel = scaled_dot_product_attention
        # chosen: biases on all four, from the authors' later code.
        # 1x1 convolutions, since oneDNN runs them faster than linear layers: 13.5 against 22.8 ms for 384 -> 1152 over
        # (16, 14, 14) in float32 on two cores, 7.2 against 8.3 ms in bf16.
        self.qkv = nn.Conv2d(in_width, 3 * width, kernel_size=1)
        self.output = nn.Conv2d(width, width, kernel_size=1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project `(B, C, H, W)` to queries, keys and values `(B, A, N, D)`, views of one tensor."""
        qkv = to_tokens(self.qkv(x))  # (B, N, 3 * A * D)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, A, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, A, N, D) each
        return q, k, v

    def merge(self, heads: Tensor, grid: tuple[int, int]) -> Tensor:
        """Concatenate the heads and project: `(B, A, N, D) -> (B, C', H, W)`."""
        tokens = heads.transpose(1, 2)  # (B, N, A, D)
        tokens = tokens.flatten(2)  # (B, N, A * D)
        return self.output(to_map(tokens, grid))

    def weights(self, x: Tensor) -> Tensor:
        """What each cell (rows) takes from each (columns), `(B, A, N, N)`: `forward(x)` merges `weights(x) @ v`."""
        raise NotImplementedError


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(D) + bias) v.

    Args:
        q, k, v: `(B, A, N, D)`.
        bias: `(A, N, N)`.

    Returns:
        `(B, A, N, D)`
    """
    # On CPUs two matrix products are faster than torch's fused kernel with a bias: at (16, 12, 196, 32) in bf16 on one
    # core 75 against 162 ms with the backward pass, 32 against 80 ms without. Only compiled float32 inference is faster
    # with the fused kernel, 44 against 48 ms on two cores.
    use_fused = q.device.type != "cpu" or (compiled_for_inference() and q.dtype == torch.float32)
    if use_fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.unsqueeze(0))
    return attention_weights(q, k, bias) @ v


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(D) + bias), `(B, A, N, N)`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, A, N, N)
    return (scores if bias is None else scores + bias).softmax(-1)


class PlainAttention(MultiHeadProjection):
    """y_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j: equation (2), without position information."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.merge(self.attention_kernel(q, k, v), grid_of(x))

    def weights(self, x: Tensor) -> Tensor:
        q, k, _ = self.split(x)
        return attention_weights(q, k)


class RelativeAttention(MultiHeadProjection):
    """y_i = sum_j softmax_j(q_i . k_j / sqrt(D) + w_{i-j}) v_j: equation (3), "pre", the paper's choice.

    Args:
        relative_bias: computes w for width / head_dim heads.
    """

    def __init__(self, in_width: int, width: int, head_dim: int, relative_bias: GlobalRelativeBias) -> None:
        super().__init__(in_width, width, head_dim)
        self.relative_bias = relative_bias

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        bias = self.relative_bias(grid_of(x), q.dtype)  # (A, N, N)
        return self.merge(self.attention_kernel(q, k, v, bias), grid_of(x))

    def weights(self, x: Tensor) -> Tensor:
        q, k, _ = self.split(x)
        return attention_weights(q, k, self.relative_bias(grid_of(x), q.dtype))


class PostRelativeAttention(RelativeAttention):
    """y_i = sum_j (softmax_j(q_i . k_j / sqrt(D)) + w_{i-j}) v_j: equation (3), "post"."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        static = self.relative_bias(grid_of(x), v.dtype) @ v  # (B, A, N, D)
        return self.merge(self.attention_kernel(q, k, v) + static, grid_of(x))

    def weights(self, x: Tensor) -> Tensor:
        q, k, _ = self.split(x)
        return attention_weights(q, k) + self.relative_bias(grid_of(x), q.dtype)


class LocalAttention(MultiHeadProjection):
    """Relative attention in which a query attends to the S x S cells around it: the paper's option (B), section 2.2.

    Neighbors beyond the border get no weight. On maps of up to `MAX_DENSE_CELLS` it is global attention with a mask; on
    larger ones the neighbors are gathered, memory grows with N * S^2, and no N x N matrix is formed.
    """

    def __init__(self, in_width: int, width: int, head_dim: int, window: int, *, relative_bias: bool) -> None:
        super().__init__(in_width, width, head_dim)
        self.window = window
        self.relative_bias = LocalRelativeBias(self.num_heads, window) if relative_bias else None

    def forward(self, x: Tensor) -> Tensor:
        (q, k, v), grid = self.split(x), grid_of(x)
        if q.shape[2] <= MAX_DENSE_CELLS:
            return self.merge(self.attention_kernel(q, k, v, self.dense_bias(q, grid)), grid)
        weights = self.window_weights(q, k, grid)
        return self.merge(torch.einsum("bans,bansd->band", weights, self.neighbors(v, grid)), grid)

    def weights(self, x: Tensor) -> Tensor:
        q, k, _ = self.split(x)
        return attention_weights(q, k, self.dense_bias(q, grid_of(x)))

    def dense_bias(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """The bias of all pairs of cells in the type of the queries, minus infinity outside the window.

        Returns:
            `(A, N, N)`, or `(1, N, N)` without relative biases.
        """
        height, width = grid
        if self.relative_bias is None:
            table = q.new_zeros(1, min(self.window, 2 * height - 1), min(self.window, 2 * width - 1))
        else:
            table = self.relative_bias.table.to(q.dtype)
        # From the offsets of the window to those of the grid; padding by less than nothing crops.
        rows, columns = (2 * height - 1 - table.shape[1]) // 2, (2 * width - 1 - table.shape[2]) // 2
        table = F.pad(table, (columns, columns, rows, rows), value=float("-inf"))  # (A, 2H-1, 2W-1)
        expand = opaque_expand_table if torch.compiler.is_dynamo_compiling() else expand_table
        return expand(table, height, width)

    def window_weights(self, q: Tensor, k: Tensor, grid: tuple[int, int]) -> Tensor:
        """What each cell takes from its neighbors, row by row: `(B, A, N, S * S)`."""
        scores = torch.einsum("band,bansd->bans", q, self.neighbors(k, grid)) * q.shape[-1] ** -0.5
        if self.relative_bias is not None:
            scores = scores + self.relative_bias(scores.dtype)
        return scores.masked_fill(~self.inside(grid, q.device), float("-inf")).softmax(-1)

    def neighbors(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Gather the S x S tokens around each cell, row by row: `(B, A, N, D) -> (B, A, N, S * S, D)`.

        Tokens beyond the border are zeros.
        """
        size, radius = self.window, self.window // 2
        cells = tokens.unflatten(2, grid)  # (B, A, H, W, D)
        cells = F.pad(cells, (0, 0, radius, radius, radius, radius))  # (B, A, H+S-1, W+S-1, D)
        windows = cells.unfold(2, size, 1)  # (B, A, H, W+S-1, D, S)
        windows = windows.unfold(3, size, 1)  # (B, A, H, W, D, S, S)
        windows = windows.permute(0, 1, 2, 3, 5, 6, 4)  # (B, A, H, W, S, S, D)
        windows = windows.flatten(4, 5)  # (B, A, H, W, S * S, D)
        return windows.flatten(2, 3)  # (B, A, N, S * S, D)

    def inside(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Mask `(N, S * S)` of the neighbors of each cell that lie on the feature map."""
        offsets = torch.arange(self.window, device=device) - self.window // 2
        on_axis = []
        for side in grid:
            index = torch.arange(side, device=device)[:, None] + offsets  # (side, S)
            on_axis.append((index >= 0) & (index < side))
        rows, columns = on_axis
        mask = rows[:, None, :, None] & columns[None, :, None, :]  # (H, W, S, S)
        return mask.flatten(2, 3).flatten(0, 1)  # (N, S * S)


class LinearAttention(MultiHeadProjection):
    """y_i = phi(q_i) sum_j phi(k_j)^T v_j / phi(q_i) . sum_j phi(k_j): the paper's option (C), section 2.2.

    Time and memory grow linearly with N; no N x N matrix is formed that a relative bias could be added to.
    """

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1  # chosen: phi = elu + 1 (Katharopoulos et al. 2020)
        context = k.transpose(-2, -1) @ v  # (B, A, D, D)
        normalizer = q @ k.sum(dim=-2).unsqueeze(-1)  # (B, A, N, 1)
        return self.merge(q @ context / normalizer, grid_of(x))

    def weights(self, x: Tensor) -> Tensor:
        q, k, _ = self.split(x)
        scores = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
        return scores / scores.sum(-1, keepdim=True)
