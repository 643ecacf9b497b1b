"""Relative biases for another resolution."""

import torch
from torch import nn

from coatnet.model.network import CoAtNet
from coatnet.model.relative_bias import RelativeBias, resample


@torch.no_grad()
def change_resolution(model: CoAtNet, resolution: int) -> CoAtNet:
    """Make the relative biases those of another resolution, bilinearly (appendix A.1); in place.

    Evaluation at that resolution gives the same logits before and after; training then adapts every offset.

    Args:
        resolution: side of the square images, pixels.
    """
    grids = model.variant.grids(resolution)
    for blocks, side in zip(model.stages, grids, strict=True):
        for module in blocks.modules():
            if isinstance(module, RelativeBias):
                module.table = nn.Parameter(
                    resample(module.table, (side, side)).clone(), requires_grad=module.table.requires_grad
                )
    model.resolution = resolution
    return model
