"""Change a trained network to other images: their resolution (paper, appendix A.1) or their channels."""

import torch
from torch import Tensor, nn

from coatnet.model.network import CoAtNet
from coatnet.model.relative_bias import RelativeBias, resample


@torch.no_grad()
def change_resolution(model: CoAtNet, resolution: int) -> CoAtNet:
    """Resample the relative bias tables bilinearly for another resolution (appendix A.1), in place.

    The logits at that resolution are the same before and after; training then updates every offset of the new grid.

    Args:
        resolution: side of the square images in pixels.

    Returns:
        The same network.
    """
    grids = model.variant.grids(resolution)
    for blocks, side in zip(model.stages, grids, strict=True):
        for module in blocks.modules():
            if isinstance(module, RelativeBias):
                table = resample(module.table, (side, side)).clone()
                module.table = nn.Parameter(table, requires_grad=module.table.requires_grad)
    model.resolution = resolution
    return model


def change_channels(weight: Tensor, channels: int, rgb: tuple[int, int, int] | None = None) -> Tensor:
    """The weights of a first convolution for images of other channels.

    Where it is known which channels are red, green and blue, these keep the weights of an RGB network, and all others
    begin at 0. Else every channel gets the mean of the weights, times old channels over new ones: an image whose
    channels are all equal has the same features before and after.

    Args:
        weight: (out, in, height, width).
        channels: of the images.
        rgb: which of these are red, green and blue.
    """
    given = weight.shape[1]
    if rgb is None or given != 3:
        return weight.mean(1, keepdim=True).repeat(1, channels, 1, 1) * (given / channels)
    changed = weight.new_zeros(len(weight), channels, *weight.shape[2:])
    changed[:, list(rgb)] = weight
    return changed


def first_convolution(model: CoAtNet) -> str:
    """The name of the weights that look at the image."""
    return next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d)) + ".weight"
