"""What a run starts from: an untrained network, or that of a bundle under a classifier for the data."""

from typing import Any

import torch
from torch import Tensor, nn

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.errors import UserError
from coatnet.model.network import CoAtNet, create_model
from coatnet.model.resize import change_resolution
from coatnet.training.config import Recipe, parts
from coatnet.training.freezing import freeze_parts


def build_model(recipe: Recipe, dataset: Dataset, init: Bundle | None) -> CoAtNet:
    """The network of the recipe, untrained, or with the weights of the bundle to start from.

    The bundle's classifier is kept if its classes are the data's, in the same order; else it is a new one.

    Raises:
        UserError: the recipe asks for another network than the bundle's, or freezes what can not be frozen.
    """
    preprocessing = parts(recipe).preprocessing
    num_classes, depth = len(dataset.classes), recipe.stochastic_depth or 0.0
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
    return freeze_parts(model, tuple(recipe.freeze), new_classifier=not keeps_classifier(dataset, init))


def keeps_classifier(dataset: Dataset, init: Bundle) -> bool:
    """Whether the bundle's classifier says what the data asks: the same classes in the same order."""
    return init.classes == dataset.classes


def describe_start(recipe: Recipe, dataset: Dataset, init: Bundle | None) -> str:
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
