"""Compatibility with `chinhsuanwu/coatnet-pytorch`: its arguments, the network of the paper."""

from collections.abc import Sequence

from coatnet.errors import UserError
from coatnet.model.config import Stage, Variant
from coatnet.model.network import CoAtNet, create_model

STAGE_KINDS = {"C": "mbconv", "T": "transformer"}


def from_coatnet_pytorch(
    image_size: tuple[int, int],
    in_channels: int,
    num_blocks: Sequence[int],
    channels: Sequence[int],
    num_classes: int = 1000,
    block_types: Sequence[str] = ("C", "C", "T", "T"),
) -> CoAtNet:
    """Create a network from the arguments of `CoAtNet(...)` in `chinhsuanwu/coatnet-pytorch`.

    The network follows the paper where that implementation does not, so its weights do not fit; the guide
    "Coming from coatnet-pytorch" lists the differences.

    Args:
        image_size: height and width in pixels; the relative biases belong to the larger of them. Images of any other
            size go through as well.
        in_channels: channels of the images.
        num_blocks: number of layers of the stem (always 2) and of blocks of the four stages.
        channels: widths of the stem and of the four stages.
        num_classes: number of outputs.
        block_types: "C" (MBConv) or "T" (Transformer) for each of the four stages.

    Raises:
        UserError: the numbers do not describe a CoAtNet.
    """
    if len(num_blocks) != 5 or len(channels) != 5 or len(block_types) != 4:
        raise UserError(
            f"{len(num_blocks)} num_blocks, {len(channels)} channels, {len(block_types)} block_types: "
            "there are 5 of the first two (stem and four stages) and 4 block_types"
        )
    if num_blocks[0] != 2:
        raise UserError(f"num_blocks[0]={num_blocks[0]}: the stem of the paper has two layers, so it must be 2")
    if unknown := set(block_types) - STAGE_KINDS.keys():
        raise UserError(f"block_types {sorted(unknown)}: a type is 'C' (MBConv) or 'T' (Transformer)")
    stages = tuple(
        Stage(STAGE_KINDS[kind], depth, width)
        for kind, depth, width in zip(block_types, num_blocks[1:], channels[1:], strict=True)
    )
    variant = Variant("from-coatnet-pytorch", channels[0], stages)
    return create_model(variant, num_classes=num_classes, in_channels=in_channels, resolution=max(image_size))
