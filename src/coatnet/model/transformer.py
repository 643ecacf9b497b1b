"""The block around attention (paper, equation 4 and appendix A.1).

Shapes: B batch, C width, H W feature map, N = H * W cells.
"""

from torch import Tensor, nn

from coatnet.model.layers import GELU, Pool, Shortcut, StochasticDepth, layer_norm, to_map, to_tokens

EXPANSION = 4  # paper: "expansion always 4"


class FeedForward(nn.Sequential):
    """W2 GELU(W1 x), four times as wide in the middle: `(B, N, C) -> (B, N, C)`."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, EXPANSION * width), GELU(), nn.Linear(EXPANSION * width, width))


class Transformer(nn.Module):
    """x <- Proj(Pool(x)) + Attention(Pool(Norm(x)));  x <- x + FFN(Norm(x)).

    `(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))`

    Args:
        attention: maps tokens `(B, N, C)` of a grid to `(B, N, C')`.
    """

    def __init__(
        self, in_width: int, width: int, stride: int, *, attention: nn.Module, stochastic_depth: float
    ) -> None:
        super().__init__()
        self.shortcut = Shortcut(in_width, width, stride)
        self.attention_norm = layer_norm(in_width)
        self.pool = Pool() if stride == 2 else nn.Identity()
        self.attention = attention
        self.feed_forward_norm = layer_norm(width)
        self.feed_forward = FeedForward(width)
        self.stochastic_depth = StochasticDepth(stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:
        normed = to_map(self.attention_norm(to_tokens(x)), (x.shape[2], x.shape[3]))
        pooled = self.pool(normed)
        grid = (pooled.shape[2], pooled.shape[3])
        tokens = to_tokens(self.shortcut(x))
        tokens = tokens + self.stochastic_depth(self.attention(to_tokens(pooled), grid))
        tokens = tokens + self.stochastic_depth(self.feed_forward(self.feed_forward_norm(tokens)))
        return to_map(tokens, grid)
