"""What every row of the family says: its stem, its stages, and so the grid after each of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """`depth` blocks of one kind ("mbconv" or "transformer") at `width`; the first has the stride."""

    kind: str
    depth: int
    width: int
    stride: int = 2


@dataclass(frozen=True)
class Row:
    """Stem and stages of a network.

    Args:
        head_dim: width of an attention head.
        resolution: side of the square images that the relative biases are made for by default, pixels.
    """

    name: str
    stem_width: int
    stages: tuple[Stage, ...]
    head_dim: int = 32
    resolution: int = 224
    stem_stride: int = 2

    def grids(self, resolution: int) -> tuple[int, ...]:
        """Side of the square map after each stage, in cells, for square images of that many pixels."""
        sides, side = [], -(-resolution // self.stem_stride)
        for stage in self.stages:
            side = -(-side // stage.stride)
            sides.append(side)
        return tuple(sides)
