"""Frozen modules, and the parameters of a network grouped from stem to head."""

from collections.abc import Iterable

from coatnet.errors import UserError, nearest
from coatnet.model.network import CoAtNet


def freeze(model: CoAtNet, prefixes: Iterable[str]) -> CoAtNet:
    """Exclude modules from training, including the statistics of their BatchNorms; in place.

    Args:
        model: the network.
        prefixes: module names as in `named_modules`, such as "stem" or "stages.0".

    Returns:
        The same network.

    Raises:
        UserError: a prefix names no module; nothing is frozen then.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    prefixes = list(prefixes)
    for prefix in prefixes:
        if prefix not in modules:
            children = ", ".join(name for name, _ in model.named_children())
            raise UserError(
                f"cannot freeze {prefix!r}{nearest(prefix, modules)}: "
                f"the network has {children}, and stages contains 'stages.0' and so on"
            )
    for prefix in prefixes:
        modules[prefix].requires_grad_(False)
    model.train(model.training)  # puts BatchNorms with frozen weights into evaluation mode
    return model


def layer_groups(model: CoAtNet) -> list[list[str]]:
    """Names of all parameters in groups: the stem, each block, the head; for layer-wise learning rates."""
    prefixes = ["stem."]
    for index, blocks in enumerate(model.stages):
        prefixes += [f"stages.{index}.{name}." for name, _ in blocks.named_children()]
    prefixes.append("head.")
    names = [name for name, _ in model.named_parameters()]
    return [[name for name in names if name.startswith(prefix)] for prefix in prefixes]
