"""Where the weights of a run begin and which of them learn: untrained or from a bundle, frozen or not."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coatnet.bundle import Bundle, load
from coatnet.bundle.bundle import place_name
from coatnet.bundle.config import require_memory
from coatnet.bundle.timm.selection import AUTO, is_auto, is_small, load_pretrained, suggest_pretrained
from coatnet.data.datasets import Dataset
from coatnet.data.splits import Splits
from coatnet.errors import UserError
from coatnet.model.freeze import freeze
from coatnet.model.network import CoAtNet, create_model
from coatnet.model.resize import change_channels, change_resolution, first_convolution
from coatnet.training.config import Recipe, TrainingConfig
from coatnet.training.recipes import find_recipe

FEW_IMAGES = 100_000  # chosen: up to here `train` without init says what `init: auto` would take


def load_init(recipe: Recipe, splits: Splits, say: Callable[[str], None]) -> tuple[Recipe, Bundle | None]:
    """The bundle that a recipe starts from, or None, and the recipe, with an id in place of `init: auto`.

    Args:
        recipe: what is asked of a run.
        splits: its images.
        say: gets a line about what `auto` takes.

    Raises:
        UserError: there is no such bundle, or the recipe asks for another network beside `auto`.
    """
    if not is_auto(recipe.init):
        return recipe, load(recipe.init).uncalibrated() if recipe.init else None
    if given := _given_network(recipe):
        raise UserError(f"init auto chooses the network, and {given[0]} is given as well: leave one of them out")
    instead = "give init a bundle or folder of this machine, or leave init out"
    init, bundle = load_pretrained(splits, recipe.device or "auto", say, instead=instead)
    return replace(recipe, init=init), bundle


def suggest_init(recipe: Recipe, splits: Splits) -> str:
    """A line about what `init: auto` would take; empty where it is no better start, or the recipe is the paper's."""
    is_few = len(splits.training) <= FEW_IMAGES
    if recipe.init or find_recipe(recipe.name).data is not None or not is_few or is_small(splits):
        return ""
    given = _given_network(recipe)
    without = f" (without {' and '.join(given)})" if given else ""
    return f"{suggest_pretrained(splits, recipe.device or 'auto')}{without}"


def _given_network(recipe: Recipe) -> list[str]:
    """The fields by which a recipe asks for a network, beside which `init: auto` is refused."""
    model = recipe.model not in (None, AUTO, find_recipe(recipe.name).recipe.model)
    return ["model"] * model + ["variations"] * bool(recipe.variations)


def build_model(config: TrainingConfig, dataset: Dataset, init: Bundle | None) -> CoAtNet:
    """The network of the configuration, untrained, or with the weights of the bundle to start from.

    The bundle's classifier is kept if its classes are those of the data, in any order; else it is a new one.

    Raises:
        UserError: the configuration asks for another network than the bundle's, or freezes what cannot be frozen.
    """
    num_classes, resolution = len(dataset.classes), config.preprocessing.side
    if init is None:
        model = create_model(
            config.model,
            num_classes=num_classes,
            in_channels=config.preprocessing.channels,
            resolution=resolution,
            stochastic_depth=config.stochastic_depth,
            **config.variations,
        )
        require_memory(model, config.preprocessing, "model")
        return model
    if config.variations:
        raise UserError("variations cannot be given together with init: the network is that of the bundle")
    architecture: dict[str, Any] = init.model.config() | {"in_channels": config.preprocessing.channels}
    model = create_model(architecture.pop("variant"), stochastic_depth=config.stochastic_depth, **architecture)
    weights = init.in_order(dataset.classes).model.state_dict()
    if init.model.in_channels != model.in_channels:
        first = first_convolution(model)
        weights[first] = change_channels(weights[first], model.in_channels, config.preprocessing.rgb)
    model.load_state_dict(weights)
    if not keeps_classifier(dataset, init):
        model.reset_classifier(num_classes)
    require_memory(model, config.preprocessing, "model")
    if resolution != model.resolution:
        change_resolution(model, resolution)
    return freeze_parts(model, config.freeze, new_classifier=not keeps_classifier(dataset, init))


def keeps_classifier(dataset: Dataset, init: Bundle) -> bool:
    """Whether the classes of the bundle are those of the data, in any order: its rows are sorted as theirs."""
    return set(init.classes) == set(dataset.classes)


def describe_init(config: TrainingConfig, dataset: Dataset, init: Bundle | None) -> str:
    """The origin of the weights in a few words; empty for an untrained network."""
    if init is None:
        return ""
    given, taken = init.model.in_channels, config.preprocessing.channels
    kept = "red, green and blue kept" if config.preprocessing.rgb and given == 3 else "their mean spread"
    adapted = "" if given == taken else f", its {given} channels made {taken}, {kept}"
    if keeps_classifier(dataset, init):
        return f" from {place_name(config.init)}{adapted}, its classifier kept"
    return f" from {place_name(config.init)}{adapted}, a new classifier for {len(dataset.classes)} classes"


@torch.no_grad()
def init_batch_norm_statistics(model: nn.Module, images: Tensor) -> None:
    """Take BatchNorm's running statistics from a first batch, (B, C, R, R).

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
    """For the first `steps` steps only the classifier learns: the rest is frozen, BatchNorm statistics too.

    What learns is a function of the step, so that a resumed run continues alike. Parameters that are frozen when this
    object is made stay frozen.
    """

    def __init__(self, model: CoAtNet, steps: int) -> None:
        """Raises UserError if there are such steps, but the classifier is frozen."""
        classifier = {id(parameter) for parameter in model.get_classifier().parameters() if parameter.requires_grad}
        if steps and not classifier:
            raise UserError("head_first_epochs is for a classifier that learns, but freeze covers it: give one of them")
        self.model, self.steps = model, steps
        self._body = [p for p in model.parameters() if p.requires_grad and id(p) not in classifier]
        self._body_learns = True

    def prepare(self, step: int) -> None:
        """Freeze or unfreeze the network for optimizer step `step` (0 is the first)."""
        body_learns = step >= self.steps
        if body_learns == self._body_learns:
            return
        for parameter in self._body:
            parameter.requires_grad_(body_learns)
        self.model.train(self.model.training)  # BatchNorm follows its weights
        self._body_learns = body_learns
