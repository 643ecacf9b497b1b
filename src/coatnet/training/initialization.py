"""What a run starts from: an untrained network, or that of a bundle under a classifier for the data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.errors import UserError
from coatnet.model.freeze import freeze
from coatnet.model.network import CoAtNet, create_model
from coatnet.model.resize import change_resolution
from coatnet.training.config import TrainingConfig


def build_model(recipe: TrainingConfig, dataset: Dataset, init: Bundle | None) -> CoAtNet:
    """The network of the recipe, untrained, or with the weights of the bundle to start from.

    The bundle's classifier is kept if its classes are the data's, in the same order; else it is a new one.

    Raises:
        UserError: the recipe asks for another network than the bundle's, or freezes what can not be frozen.
    """
    preprocessing = recipe.preprocessing
    num_classes, depth = len(dataset.classes), recipe.stochastic_depth
    if init is None:
        return create_model(
            recipe.model,
            num_classes=num_classes,
            in_channels=preprocessing.channels,
            resolution=preprocessing.resolution,
            stochastic_depth=depth,
            **recipe.variations,
        )
    if recipe.variations:
        raise UserError("variations can not be given together with init: the bundle's network is what it is")
    config: dict[str, Any] = init.model.config()
    if config["in_channels"] != preprocessing.channels:
        raise UserError(f"the bundle takes {config['in_channels']} channels, got channels {preprocessing.channels}")
    model = create_model(config.pop("variant"), stochastic_depth=depth, **config)
    model.load_state_dict(init.model.state_dict())
    if not keeps_classifier(dataset, init):
        model.reset_classifier(num_classes)
    if preprocessing.resolution != model.resolution:
        change_resolution(model, preprocessing.resolution)
    return freeze_parts(model, recipe.freeze, new_classifier=not keeps_classifier(dataset, init))


def keeps_classifier(dataset: Dataset, init: Bundle) -> bool:
    """Whether the bundle's classifier says what the data asks: the same classes in the same order."""
    return init.classes == dataset.classes


def describe_start(recipe: TrainingConfig, dataset: Dataset, init: Bundle | None) -> str:
    """Where the weights come from, in a few words; nothing to say of an untrained network."""
    if init is None:
        return ""
    if keeps_classifier(dataset, init):
        return f" from {recipe.init}, its classifier kept"
    same = set(init.classes) == set(dataset.classes)
    classes = f"the same {len(dataset.classes)} classes in another order" if same else f"{len(dataset.classes)} classes"
    return f" from {recipe.init}, a new classifier for {classes}"


@torch.no_grad()
def start_statistics(model: nn.Module, images: Tensor) -> None:
    """Take BatchNorm's running statistics from a first batch.

    Variances in an untrained network are far below the customary 1, which needs 150 steps to be forgotten:
    until then (a run of 51 steps on digits) evaluation is mere chance where the batch's own statistics give 0.58.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


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
