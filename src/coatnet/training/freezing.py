"""Which parts of a network learn: all but the frozen ones, and for the first steps the classifier alone."""

from collections.abc import Sequence

from torch import nn

from coatnet.errors import UserError
from coatnet.model.freeze import freeze
from coatnet.model.network import CoAtNet


def freeze_parts(model: CoAtNet, prefixes: Sequence[str], *, new_classifier: bool) -> CoAtNet:
    """Freeze parts for a whole run, in place.

    Raises:
        UserError: a prefix names no part, an untrained classifier would stay so, or nothing is left to learn.
    """
    freeze(model, prefixes)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze {','.join(prefixes)} is the whole network: leave a part of it to learn, such as head")
    if new_classifier and not any(parameter.requires_grad for parameter in model.get_classifier().parameters()):
        raise UserError(
            f"freeze {','.join(prefixes)} covers the classifier, which is new for these classes: leave it to learn"
        )
    return model


def frozen_modules(model: nn.Module) -> set[str]:
    """Names of the modules with parameters of their own that are all frozen; their buffers stand still too."""
    own = {name: list(module.parameters(recurse=False)) for name, module in model.named_modules()}
    return {name for name, parameters in own.items() if parameters and not any(p.requires_grad for p in parameters)}


class HeadFirst:
    """For the first `steps` steps the classifier learns alone: the rest is as frozen, BatchNorm statistics too.

    What learns is a function of the step, so a resumed run goes on as it would have. What is frozen when this is
    made stays frozen.
    """

    def __init__(self, model: CoAtNet, steps: int) -> None:
        """Raises UserError if there are such steps, but the classifier is frozen."""
        classifier = {id(parameter) for parameter in model.get_classifier().parameters() if parameter.requires_grad}
        if steps and not classifier:
            raise UserError("head_first_epochs is for a classifier that learns, but freeze covers it: give one of them")
        self.model, self.steps = model, steps
        self._body = [p for p in model.parameters() if p.requires_grad and id(p) not in classifier]
        self._body_learns = True

    def enter(self, step: int) -> None:
        """Make the network ready for optimizer step `step` (0 is the first)."""
        body_learns = step >= self.steps
        if body_learns == self._body_learns:
            return
        for parameter in self._body:
            parameter.requires_grad_(body_learns)
        self.model.train(self.model.training)  # BatchNorm follows its weights
        self._body_learns = body_learns
