"""The Transformer block: attention and feed-forward network (paper, equation 4 and appendix A.1).

Shapes: B batch, C width, H W feature map.
"""

from torch import Tensor, nn

from coatnet.model.layers import GELU, MapLayerNorm, Pool, Shortcut, StochasticDepth

EXPANSION = 4  # paper: "expansion always 4"


class FeedForward(nn.Sequential):
    """W2 GELU(W1 x) in every cell, with a hidden width of 4 C: `(B, C, H, W) -> (B, C, H, W)`."""

    def __init__(self, width: int) -> None:
        hidden = EXPANSION * width
        super().__init__(nn.Conv2d(width, hidden, kernel_size=1), GELU(), nn.Conv2d(hidden, width, kernel_size=1))


class Transformer(nn.Module):
    """x <- Proj(Pool(x)) + Attention(Pool(Norm(x)));  x <- x + FFN(Norm(x)).

    `(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))`

    Args:
        stride: 1, or 2 to pool before the attention.
        attention: maps `(B, C, H, W)` to `(B, C', H, W)`.
        stochastic_depth: probability of dropping a residual branch of an image in training.
    """

    def __init__(
        self, in_width: int, width: int, stride: int, *, attention: nn.Module, stochastic_depth: float
    ) -> None:
        super().__init__()
        self.shortcut = Shortcut(in_width, width, stride)
        self.attention_norm = MapLayerNorm(in_width)
        self.pool = Pool() if stride == 2 else nn.Identity()
        self.attention = attention
        self.feed_forward_norm = MapLayerNorm(width)
        self.feed_forward = FeedForward(width)
        self.stochastic_depth = StochasticDepth(stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shortcut(x) + self.stochastic_depth(self.attention(self.pool(self.attention_norm(x))))
        return x + self.stochastic_depth(self.feed_forward(self.feed_forward_norm(x)))
