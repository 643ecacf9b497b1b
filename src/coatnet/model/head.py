"""What makes logits of the last map.

Shapes: B batch, C width, H W feature map, K classes.
"""

import torch
from torch import Tensor, nn

from coatnet.model.layers import LAYER_NORM_EPSILON, mean_over_cells


class Head(nn.Module):
    """W tanh(V Norm(mean(x))): `(B, C, H, W) -> (B, K)`.

    chosen: LayerNorm and a hidden tanh layer; without them the published sizes of CoAtNet-0, -5 and -7 are missed.
    """

    def __init__(self, width: int, num_classes: int, epsilon: float = LAYER_NORM_EPSILON) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.hidden = nn.Linear(width, width)
        self.classifier = build_classifier(width, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = torch.tanh(self.hidden(self.norm(mean_over_cells(x))))
        return features if pre_logits else self.classifier(features)


def build_classifier(width: int, num_classes: int) -> nn.Module:
    """Features to logits; nothing at all for 0 classes."""
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()
