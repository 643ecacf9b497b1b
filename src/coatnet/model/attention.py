"""Self-attention over the cells of a map: the paper's relative attention, and the two ways it rejects.

Every class here maps `(B, C, H, W)` to `(B, C', H, W)`.

Shapes: B batch, C width, H W feature map, N = H * W cells, A heads, D head_dim, S window side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatnet.model.layers import compiled_for_inference, grid_of, to_map, to_tokens
from coatnet.model.relative_bias import GlobalBias, LocalRelativeBias


class MultiHeadProjection(nn.Module):
    """The multi-head projections around an attention: queries, keys and values before, the output after."""

    def __init__(self, in_width: int, width: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = width // head_dim
        # An attribute, so that a planner can count the kernel that another device would run.
        self.attention_kernel = scaled_dot_product_attention
        # chosen: biases on all four, from the authors' later code.
        # As 1x1 convolutions, which oneDNN makes faster than the same product as a linear layer: 13.5 against 22.8 ms
        # for 384 -> 1152 over (16, 14, 14) in float32 on two cores, 7.2 against 8.3 ms in bf16.
        self.qkv = nn.Conv2d(in_width, 3 * width, kernel_size=1)
        self.output = nn.Conv2d(width, width, kernel_size=1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, C, H, W)` -> q, k, v `(B, A, N, D)`, as views of one product."""
        q, k, v = to_tokens(self.qkv(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def merge(self, heads: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, A, N, D)` -> `(B, C', H, W)`."""
        return self.output(to_map(heads.transpose(1, 2).flatten(2), grid))


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: `(B, A, N, D)` each and `(A, N, N)` -> `(B, A, N, D)`."""
    # On CPUs the products themselves are faster than torch's fused attention with a bias: at (16, 12, 196, 32) in bf16
    # on one core 75 ms against 162 ms with the backward pass, 32 ms against 80 ms without. Only a graph in float32 that
    # answers is faster with it, 44 ms against 48 on two cores.
    fused_is_faster = q.device.type != "cpu" or (compiled_for_inference() and q.dtype == torch.float32)
    if fused_is_faster:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.unsqueeze(0))
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (weights if bias is None else weights + bias).softmax(-1) @ v


class PlainAttention(MultiHeadProjection):
    """y_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j: equation (2), no position at all."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.merge(self.attention_kernel(q, k, v), grid_of(x))


class RelativeAttention(MultiHeadProjection):
    """y_i = sum_j softmax_j(q_i . k_j / sqrt(D) + w_{i-j}) v_j: equation (3), "pre", the paper's choice.

    Args:
        relative_bias: gives w, for width / head_dim heads.
    """

    def __init__(self, in_width: int, width: int, head_dim: int, relative_bias: GlobalBias) -> None:
        super().__init__(in_width, width, head_dim)
        self.relative_bias = relative_bias

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        bias = self.relative_bias(grid_of(x), q.dtype)
        return self.merge(self.attention_kernel(q, k, v, bias), grid_of(x))


class PostRelativeAttention(RelativeAttention):
    """y_i = sum_j (softmax_j(q_i . k_j / sqrt(D)) + w_{i-j}) v_j: equation (3), "post"."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        static = self.relative_bias(grid_of(x), v.dtype) @ v
        return self.merge(self.attention_kernel(q, k, v) + static, grid_of(x))


class LocalAttention(MultiHeadProjection):
    """Relative attention whose query sees only the S x S cells around it: the paper's option (B).

    Memory grows with N * S^2; the N x N matrix of global attention is never formed. Cells beyond the border of
    the map do not exist: they get no weight.
    """

    def __init__(self, in_width: int, width: int, head_dim: int, window: int, *, relative_bias: bool) -> None:
        super().__init__(in_width, width, head_dim)
        self.window = window
        self.relative_bias = LocalRelativeBias(self.num_heads, window) if relative_bias else None

    def forward(self, x: Tensor) -> Tensor:
        (q, k, v), grid = self.split(x), grid_of(x)
        weights = torch.einsum("band,bansd->bans", q, self.neighbours(k, grid)) * q.shape[-1] ** -0.5
        if self.relative_bias is not None:
            weights = weights + self.relative_bias(weights.dtype)
        weights = weights.masked_fill(~self.inside(grid, x.device), float("-inf")).softmax(-1)
        return self.merge(torch.einsum("bans,bansd->band", weights, self.neighbours(v, grid)), grid)

    def neighbours(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, A, N, D)` -> `(B, A, N, S * S, D)`: around each cell, row by row; zeros beyond the border."""
        size, radius = self.window, self.window // 2
        cells = F.pad(tokens.unflatten(2, grid), (0, 0, radius, radius, radius, radius))  # (B, A, H+S-1, W+S-1, D)
        windows = cells.unfold(2, size, 1).unfold(3, size, 1)  # (B, A, H, W, D, S, S)
        return windows.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5).flatten(2, 3)

    def inside(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """`(N, S * S)`: whether that neighbour of that cell lies on the map."""
        reach = torch.arange(self.window, device=device) - self.window // 2
        on_axis = []
        for side in grid:
            index = torch.arange(side, device=device)[:, None] + reach  # (side, S)
            on_axis.append((index >= 0) & (index < side))
        rows, columns = on_axis
        return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)


class LinearAttention(MultiHeadProjection):
    """y_i = phi(q_i) sum_j phi(k_j)^T v_j / phi(q_i) . sum_j phi(k_j): the paper's option (C).

    chosen: phi = elu + 1 (Katharopoulos et al. 2020). Time and memory grow with N; no matrix is formed to which a
    relative bias could be added.
    """

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = k.transpose(-2, -1) @ v  # (B, A, D, D)
        normaliser = q @ k.sum(dim=-2).unsqueeze(-1)  # (B, A, N, 1)
        return self.merge(q @ context / normaliser, grid_of(x))
