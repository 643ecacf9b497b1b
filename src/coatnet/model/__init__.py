"""What is computed: the networks of the paper and timm's, from a configuration of the registry to logits."""

from typing import TYPE_CHECKING

from coatnet.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from coatnet.model.freeze import layer_groups as layer_groups
    from coatnet.model.network import CoAtNet as CoAtNet
    from coatnet.model.resize import change_resolution as change_resolution

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CoAtNet": "coatnet.model.network",
        "change_resolution": "coatnet.model.resize",
        "layer_groups": "coatnet.model.freeze",
    },
)
