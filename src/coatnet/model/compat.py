"""For code written against `chinhsuanwu/coatnet-pytorch`: the same arguments, the network of the paper."""

from collections.abc import Sequence

from coatnet.errors import UserError
from coatnet.model.config import Stage, Variant
from coatnet.model.network import CoAtNet, create_model

KINDS = {"C": "mbconv", "T": "transformer"}


def from_coatnet_pytorch(
    image_size: tuple[int, int],
    in_channels: int,
    num_blocks: Sequence[int],
    channels: Sequence[int],
    num_classes: int = 1000,
    block_types: Sequence[str] = ("C", "C", "T", "T"),
) -> CoAtNet:
    """The network that the port's `CoAtNet(...)` with these arguments was meant to be.

    Weights of the port do not fit: `docs/guides/coatnet-pytorch.md` lists what differs.

    Args:
        image_size: height and width, pixels; the relative biases are made for the larger; any size goes through.
        num_blocks, channels: of the stem and the four stages.

    Raises:
        UserError: if the numbers make no CoAtNet; the message says which and why.
    """
    if len(num_blocks) != 5 or len(channels) != 5 or len(block_types) != 4:
        raise UserError(
            f"{len(num_blocks)} num_blocks, {len(channels)} channels, {len(block_types)} block_types: "
            "there are 5 of the first two (stem and four stages) and 4 block_types"
        )
    if num_blocks[0] != 2:
        raise UserError(f"num_blocks[0]={num_blocks[0]}: the stem of the paper has two layers, so it is 2")
    if unknown := set(block_types) - KINDS.keys():
        raise UserError(f"block_types {sorted(unknown)}: a type is 'C' (MBConv) or 'T' (Transformer)")
    stages = zip(block_types, num_blocks[1:], channels[1:], strict=True)
    row = Variant("from-port", channels[0], tuple(Stage(KINDS[t], depth, width) for t, depth, width in stages))
    return create_model(row, num_classes=num_classes, in_channels=in_channels, resolution=max(image_size))
