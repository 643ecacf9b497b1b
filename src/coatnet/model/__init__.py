"""The networks: variants by name, the modules that the paper's equations describe, and operations on a network.

`config` and `registry` hold the variants, `network` builds them with `create_model`, `complexity` counts their costs,
`resize` and `freeze` change a network in place. `timm` holds what timm's CoAtNets have and the paper's do not.
"""

from typing import TYPE_CHECKING

from coatnet.public_names import lazy_exports

if TYPE_CHECKING:
    from coatnet.model.attention import RelativeAttention as RelativeAttention
    from coatnet.model.complexity import Complexity as Complexity
    from coatnet.model.config import Stage as Stage
    from coatnet.model.config import Variant as Variant
    from coatnet.model.freeze import layer_groups as layer_groups
    from coatnet.model.network import CoAtNet as CoAtNet
    from coatnet.model.relative_bias import RelativeBias as RelativeBias
    from coatnet.model.resize import change_resolution as change_resolution

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CoAtNet": "coatnet.model.network",
        "Complexity": "coatnet.model.complexity",
        "RelativeAttention": "coatnet.model.attention",
        "RelativeBias": "coatnet.model.relative_bias",
        "Stage": "coatnet.model.config",
        "Variant": "coatnet.model.config",
        "change_resolution": "coatnet.model.resize",
        "layer_groups": "coatnet.model.freeze",
    },
)
