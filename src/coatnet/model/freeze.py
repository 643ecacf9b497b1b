"""Frozen parts of a network, and its parameters in groups from stem to head."""

from collections.abc import Iterable

from coatnet.errors import UserError, nearest
from coatnet.model.network import CoAtNet


def freeze(model: CoAtNet, prefixes: Iterable[str]) -> CoAtNet:
    """Stop the training of parts of the network, their BatchNorm statistics as well; in place.

    Args:
        prefixes: names of modules as in `named_modules`, such as "stem" or "stages.0".

    Raises:
        UserError: if a prefix names no part of the network; nothing is frozen then.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    prefixes = list(prefixes)
    for prefix in prefixes:
        if prefix not in modules:
            parts = ", ".join(name for name, _ in model.named_children())
            raise UserError(
                f"cannot freeze {prefix!r}{nearest(prefix, modules)}: "
                f"the network has {parts}, and inside stages 'stages.0' and so on"
            )
    for prefix in prefixes:
        modules[prefix].requires_grad_(False)
    model.train(model.training)
    return model


def layer_groups(model: CoAtNet) -> list[list[str]]:
    """Names of all parameters: the stem, each block, the head. For layer-wise learning rates."""
    prefixes = ["stem."]
    for index, blocks in enumerate(model.stages):
        prefixes += [f"stages.{index}.{name}." for name, _ in blocks.named_children()]
    prefixes.append("head.")
    names = [name for name, _ in model.named_parameters()]
    return [[name for name in names if name.startswith(prefix)] for prefix in prefixes]
