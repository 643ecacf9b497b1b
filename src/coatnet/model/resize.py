"""Resize the relative biases of a network to another resolution (paper, appendix A.1)."""

import torch
from torch import nn

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
