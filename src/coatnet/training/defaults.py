"""From a recipe and its data to a configuration: what was asked is kept, and everything else is chosen here, once.

Every figure here is `chosen`: the paper trains on ImageNet and larger only.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from coatnet.bundle import Bundle
from coatnet.data.channels import ChannelStatistics, measure_if_deep
from coatnet.data.datasets import Dataset, evenly_spaced
from coatnet.data.decode import BadImage
from coatnet.data.loader import read_image
from coatnet.data.near_duplicates import find_copies
from coatnet.data.open import data_path, open_dataset
from coatnet.data.pixel_cache import Reduction, memory_room
from coatnet.data.splits import SMALL_IMAGE_PIXELS, SplitRule, Splits, divide
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError
from coatnet.model.registry import default_variant
from coatnet.system.files import absolute_path_or_name
from coatnet.training.config import Recipe, TrainingConfig, merge
from coatnet.training.distillation import Distillation
from coatnet.training.distributed.processes import SINGLE_PROCESS, Processes
from coatnet.training.recipes import find_recipe

SHORT_RUN_EPOCHS = 25  # below, an untrained network learns less from photographs that vary much
MUON_RATE = 4  # times the learning rate of AdamW, for untrained weights
# Pixels of images of which fewer than so many epochs fit at 128: where five fitted, top-1 rose by 3 to 5 points on two
# of three sets of drawings, and fell nowhere.
FEW_EPOCHS, FEW_EPOCHS_RESOLUTION = 7, 96
MANY_IMAGES = 20_000  # from here on, random erasing helps small images
BRIGHTNESS_SAMPLE = 256  # images
# What `create_model` takes beside the variations of an architecture.
NOT_VARIATIONS = ("variant", "num_classes", "in_channels", "resolution", "stochastic_depth")


@dataclass(frozen=True)
class DataFacts:
    """What the defaults depend on.

    Attributes:
        num_images: Number of training images.
        side: Longer side of the median image, pixels.
        shorter_side: Shorter side of the median image, pixels.
        largest_side: Longest side of all images, pixels.
        gray: Whether all images are without color.
        multilabel: Whether an image may have several labels.
        mean, std: Mean and standard deviation of the pixels of small images, from 0 to 1; 0.5 for larger ones.
        num_held_out: Number of images to evaluate on.
        cache_room: Bytes that decoded images may take in memory; 0 for images that are in memory as they are.
        measured: Scale, and mean and deviation of each channel, where images are read as more than 8-bit RGB.
    """

    num_images: int
    side: int
    shorter_side: int
    largest_side: int
    gray: bool = False
    multilabel: bool = False
    mean: float = 0.5
    std: float = 0.5
    num_held_out: int = 0
    cache_room: int = 0
    measured: ChannelStatistics | None = None

    @classmethod
    def of(cls, splits: Splits, channels: int | None = None, runs_at_once: int = 1) -> "DataFacts":
        """Measured on a sample of the training images, which have or are to have so many channels; so many runs share
        the memory."""
        measured = measure_if_deep(splits.training, channels)
        if measured is not None:
            splits = splits.with_scale(measured.scale)
        summary, largest_side = splits.summary, max(splits.summary.largest)
        small = largest_side <= SMALL_IMAGE_PIXELS and measured is None
        mean, std = brightness(splits.training) if small else (0.5, 0.5)
        return cls(
            num_images=len(splits.training),
            side=max(summary.median),
            shorter_side=min(summary.median),
            largest_side=largest_side,
            gray=summary.gray,
            multilabel=splits.training.multilabel,
            mean=mean,
            std=std,
            num_held_out=len(splits.validation),
            cache_room=0 if splits.training.in_memory else memory_room()[1] // runs_at_once,
            measured=measured,
        )

    @property
    def small(self) -> bool:
        """Whether the images are of 64 pixels or less."""
        return self.largest_side <= SMALL_IMAGE_PIXELS


def brightness(dataset: Dataset) -> tuple[float, float]:
    """Mean and standard deviation of the pixels, in 0 to 1, of up to 256 images, evenly spread."""
    images = []
    for index in evenly_spaced(len(dataset), BRIGHTNESS_SAMPLE):
        try:
            images.append(np.asarray(read_image(dataset, index)[0]).ravel())
        except BadImage:
            continue
    if not images:  # those of the summary were others
        return 0.5, 0.5
    pixels = np.concatenate(images) / 255
    return round(float(pixels.mean()), 4), round(float(max(pixels.std(), 0.05)), 4)


def resolve(
    recipe: Recipe,
    splits: Splits,
    init: Bundle | None = None,
    *,
    epochs_that_fit: float = math.inf,
    runs_at_once: int = 1,
) -> TrainingConfig:
    """The configuration of a run; asked for again by its own values, it is the same.

    Args:
        recipe: what was asked.
        splits: the images.
        init: the model to start from.
        epochs_that_fit: the epochs that a limit in minutes leaves room for. The values that depend on the length of
            the run are chosen for these.
        runs_at_once: how many runs on these images this machine makes at once, each of which keeps its own decoded.

    Raises:
        UserError: the recipe contradicts the data, or the bundle to start from.
    """
    check_start(recipe, splits, init)
    check_labels(recipe, splits)
    check_teacher(recipe)
    scale = None if init is None else init.preprocessing.scale
    channels = scale.channels if scale is not None else recipe.channels
    return resolve_for(recipe, DataFacts.of(splits, channels, runs_at_once), init, epochs_that_fit)


def resolve_for(
    recipe: Recipe, facts: DataFacts, init: Bundle | None = None, epochs_that_fit: float = math.inf
) -> TrainingConfig:
    """Choose everything that a recipe leaves open.

    Values asked for go over those that the named recipe has for the model's size, and these over the general choice.
    """
    named, num_images, asked = find_recipe(recipe.name), facts.num_images, recipe.to_dict()
    preprocessing = choose_preprocessing(recipe, facts, init)
    if epochs_that_fit < FEW_EPOCHS and preprocessing.side > FEW_EPOCHS_RESOLUTION:
        smaller = choose_preprocessing(recipe, facts, init, few_epochs=True)
        epochs_that_fit *= (preprocessing.side / smaller.side) ** 2
        preprocessing = smaller
    if init is not None:
        model = init.model.variant.name
    else:
        model = default_variant(preprocessing.side) if recipe.model in (None, "auto") else recipe.model

    batch_size = asked.get("batch_size", default_batch_size(num_images))
    epochs = asked.get("epochs", default_epochs(num_images, batch_size, finetune=init is not None))
    epochs_to_come = min(epochs, epochs_that_fit)
    steps_to_come = num_steps(epochs_to_come, num_images, batch_size)
    if recipe.head_first_epochs and num_steps(recipe.head_first_epochs, num_images, batch_size) >= steps_to_come:
        fitting = "" if epochs_to_come == epochs else " that fit into max_minutes"
        raise UserError(
            f"head_first_epochs {recipe.head_first_epochs:g} leaves nothing of {epochs_to_come:.3g} epochs{fitting} "
            "for the rest of the network: give less, or freeze the rest"
        )
    short = epochs_to_come < SHORT_RUN_EPOCHS and init is None
    chosen: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "micro_batch_size": batch_size,
        # The few blocks of the variants for small images underfit rather than overfit.
        "stochastic_depth": 0.0 if preprocessing.side <= SMALL_IMAGE_PIXELS or short else 0.1,
        "ema_decay": default_ema_decay(steps_to_come),
        "loss": "sigmoid" if facts.multilabel else "softmax",
        "evaluate_every": "auto",
        "optimizer": {},
        "schedule": {},
        "augmentation": {},
        "mixing": {},
    }
    if named.data is None:  # the paper's recipes leave nothing of this open
        algorithm = asked.get("optimizer", {}).get("algorithm")
        chosen |= choose_optimization(batch_size, steps_to_come, init, algorithm)
        chosen |= choose_regularization(facts, preprocessing.side, short=short, finetune=init is not None)
        if asked.get("augmentation", {}).get("trivial_augment"):
            chosen["augmentation"]["rand_augment_layers"] = 0
    settled: dict[str, Any] = {
        "data": data_path(recipe.data),
        "model": model,
        "init": absolute_path_or_name(recipe.init) if recipe.init else "",
        "teacher": absolute_path_or_name(recipe.teacher) if recipe.teacher else "",
        "resolution": preprocessing.resolution,
        "channels": preprocessing.channels,
        "preprocessing": preprocessing,
    }
    config = TrainingConfig(**merge(merge(chosen, named.by_model.get(model, {})), asked) | settled)
    return config if recipe.cache not in (None, "auto") else replace(config, cache=choose_cache(config, facts))


def choose_cache(config: TrainingConfig, facts: DataFacts) -> Literal["memory", "none"]:
    """Memory where all images have room, by the size of the median one."""
    reductions = (
        Reduction.for_training(config.preprocessing, config.augmentation),
        Reduction(config.preprocessing),
    )
    training, held_out = (reduction.bytes_of(facts.shorter_side, facts.side) for reduction in reductions)
    return "memory" if facts.num_images * training + facts.num_held_out * held_out <= facts.cache_room else "none"


def check_start(recipe: Recipe, splits: Splits, init: Bundle | None) -> None:
    """Raises UserError if recipe, data and the bundle to start from contradict each other."""
    named = find_recipe(recipe.name)
    if taken := [name for name in NOT_VARIATIONS if name in (recipe.variations or {})]:
        raise UserError(
            f"variations cannot have {taken[0]}, which is not of the architecture: the data, or the options model, "
            "resolution, channels and stochastic_depth, decide it"
        )
    if init is None:
        if named.needs_init:
            raise UserError(
                f"recipe {recipe.name!r} starts from a bundle: give init, "
                "auto, a folder such as RUN/bundle, or an id of the hub"
            )
        for name in ("freeze", "head_first_epochs"):
            if getattr(recipe, name):
                raise UserError(f"{name} is for a network that has learned already: give init as well, or leave it out")
        return
    if recipe.model not in (None, "auto", named.recipe.model, init.model.variant.name):
        raise UserError(f"model is {recipe.model!r}, but init holds a {init.model.variant.name}: leave model out")
    if set(init.classes) == set(splits.classes) and init.multilabel != splits.multilabel:
        # More often a stray separator in a table than intended.
        kinds = {True: "several labels per image", False: "one label per image"}
        raise UserError(
            f"{splits.name} has {kinds[splits.multilabel]}, but init learned the same classes with "
            f"{kinds[init.multilabel]}: give data of the same kind"
        )


def check_labels(recipe: Recipe, splits: Splits) -> None:
    """Raises UserError if images have several labels, and the recipe needs them to have one."""
    if not splits.multilabel:
        return
    for name, given, instead in (("balance", "sampler", "weights"), ("loss", "softmax", "sigmoid")):
        if getattr(recipe, name) == given:
            raise UserError(
                f"{name} {given} is for one label per image, but {splits.name} has several: give {name} {instead}"
            )


def check_teacher(recipe: Recipe) -> None:
    """Raises UserError if a recipe has options of distillation, but no teacher."""
    if (
        not recipe.teacher
        and recipe.distillation
        and Distillation(**recipe.to_dict()["distillation"]) != Distillation()
    ):
        raise UserError("distillation needs a teacher: give teacher as well, or leave distillation out")


def choose_preprocessing(
    recipe: Recipe, facts: DataFacts, init: Bundle | None, *, few_epochs: bool = False
) -> Preprocessing:
    """That of the bundle to start from; else the images' own size if they are small; else 128 or 224 pixels, or 96
    where `few_epochs` of 128 would fit."""
    channels = recipe.channels or (1 if facts.gray else 3)
    measured: dict[str, Any] = {}
    if facts.measured is not None:
        scale, mean, std = facts.measured
        channels = scale.channels
        measured = {"mean": mean, "std": std, "value_range": (scale.low, scale.high)}
    if init is not None:
        chosen: dict[str, Any] = asdict(init.preprocessing)
        if init.preprocessing.scale is None:
            chosen |= measured or _of_channels(init.preprocessing, recipe.channels)
    elif facts.small:
        level = {"mean": [facts.mean] * channels, "std": [facts.std] * channels}
        chosen = {"resolution": facts.side, "crop_fraction": 1.0, **level}
    else:
        # Below 20,000 images, 224 pixels cost three times the time and teach an untrained network little.
        side = 128 if facts.num_images < 20_000 or facts.shorter_side < 224 else 224
        side = FEW_EPOCHS_RESOLUTION if few_epochs and side == 128 else side
        chosen = {"resolution": side, "mean": [0.5] * channels, "std": [0.5] * channels}
    if init is None:
        chosen |= measured
    asked: dict[str, Any] = recipe.to_dict().get("preprocessing", {})
    if recipe.resolution is not None:
        asked["resolution"] = recipe.resolution
    try:
        whole = Preprocessing(**{**chosen, **asked})
    except UserError as error:
        raise UserError(f"preprocessing.{error}") from None
    if recipe.channels is not None and whole.channels != recipe.channels:
        raise UserError(f"channels is {recipe.channels}, but preprocessing has {whole.channels}: make them agree")
    return whole


def _of_channels(seen: Preprocessing, channels: int | None) -> dict[str, Any]:
    """Mean and deviation of 8-bit images for another number of channels, 1 or 3: the average of each."""
    if channels not in (1, 3) or channels == seen.channels:
        return {}
    return {name: [sum(values) / len(values)] * channels for name, values in (("mean", seen.mean), ("std", seen.std))}


def choose_optimization(
    batch_size: int, total_steps: int, init: Bundle | None, algorithm: str | None
) -> dict[str, dict[str, Any]]:
    """Algorithm, learning rate and schedule: Muon for untrained weights; AdamW for a network that has learned, with
    lower rates for the blocks far from its head."""
    if init is None:
        algorithm = algorithm or "muon"
        rate = default_learning_rate(batch_size) * (MUON_RATE if algorithm == "muon" else 1)
        optimizer: dict[str, Any] = {"algorithm": algorithm, "learning_rate": round(rate, 6)}
    else:
        width = init.model.variant.stages[-1].width
        optimizer = {"learning_rate": default_learning_rate(batch_size, width), "layer_decay": 0.8}
    return {
        "optimizer": optimizer,
        "schedule": {"warmup_steps": max(1, total_steps // 20), "minimum_learning_rate": 1e-5},
    }


def choose_regularization(
    facts: DataFacts, resolution: int, *, short: bool, finetune: bool
) -> dict[str, dict[str, Any]]:
    """Augmentation and mixing: shifts for small images, enlarged or not, crops and RandAugment for photographs.

    A `short` run of an untrained network has large crops and nothing else: it underfits.
    """
    # Most small gray images are signs, and a mirrored letter is none; the recipe fashion-mnist has it otherwise.
    flip_rate = 0.0 if facts.small and facts.gray else 0.5
    smoothing = 0.0 if facts.multilabel else 0.1
    if facts.small or resolution <= SMALL_IMAGE_PIXELS:
        return {
            "augmentation": {
                "placement": "shift",
                # One pixel of 28: with two, 10,000 garments stay half a point lower.
                "shift": max(1, resolution // 28),
                "flip_rate": flip_rate,
                # 60,000 garments: in 10 epochs 93.95 % top-1 with it and 94.36 without; 93.9 in 28 and 93.7 in 21.
                "erasing_rate": 0.5 if facts.num_images >= MANY_IMAGES and not short else 0.0,
            },
            "mixing": {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": smoothing},
        }
    return {
        "augmentation": {
            "placement": "crop",
            "crop_scale": [0.6 if short else 0.35, 1.0],
            "flip_rate": flip_rate,
            "rand_augment_layers": 0 if short else 2,
            "rand_augment_magnitude": 9,
        },
        "mixing": {
            "mixup_alpha": 0.0 if finetune or short else 0.2,
            "cutmix_alpha": 0.0,
            "label_smoothing": smoothing,
        },
    }


def default_batch_size(num_images: int) -> int:
    """About 30 steps an epoch, but at least 16 images for BatchNorm, and at most 64: on a CPU more are no faster.

    So it is 16 up to 724 images, 32 up to 1,448, and 64 for more.
    """
    return int(min(max(16, 2 ** round(math.log2(max(1, num_images) / 32))), 64, max(1, num_images)))


def default_epochs(num_images: int, batch_size: int, *, finetune: bool) -> float:
    """Fewer images are seen more often: 32 epochs of 60,000, 100 of 6,000.

    To fine-tune, a third of that, but at least 8 and 300 steps; never more than from scratch.
    """
    epochs = min(100, max(20, round(32 * math.sqrt(60_000 / num_images))))
    return float(min(epochs, max(8, epochs // 3, 300 * batch_size // num_images)) if finetune else epochs)


def default_learning_rate(batch_size: int, learned_width: int | None = None) -> float:
    """Of AdamW: 2e-3 for 128 images a step, times the square root of the batch size over 128.

    For fine-tuning it is divided by the width of the last stage over 128, the rule for Adam in Yang et al. 2022,
    "Tensor Programs V": 2.5e-4 for coatnet-2. With 2e-4 for every width, coatnet-pico-64 had 56 % top-1 on 50
    garments, where 2e-3 gave 77 %, as did untrained weights.
    """
    narrowness = min(1.0, 128 / learned_width) if learned_width else 1.0
    return round(2e-3 * narrowness * math.sqrt(batch_size / 128), 6)


def default_ema_decay(total_steps: int) -> float:
    """An average over about 3 % of the run."""
    return round(min(0.9998, max(0.9, 1 - 30 / total_steps)), 5)


def num_steps(epochs: float, num_images: int, batch_size: int) -> int:
    """Optimizer steps that show each of `num_images` images `epochs` times."""
    return max(1, math.ceil(epochs * num_images / batch_size))


def head_first_steps(config: TrainingConfig, num_images: int) -> int:
    """Optimizer steps in which the classifier learns alone."""
    return num_steps(config.head_first_epochs, num_images, config.batch_size) if config.head_first_epochs else 0


def open_splits(
    recipe: Recipe, say: Callable[[str], None], processes: Processes = SINGLE_PROCESS
) -> tuple[Recipe, Splits]:
    """The images of a recipe, and the recipe with the copies that stay on one side of the split.

    Copies are looked for once, by the first process, where images have no split of their own; the recipe of the run
    names them.

    Raises:
        UserError: as `open_dataset`.
    """
    rule, is_divided = SplitRule.of(recipe.to_dict()), recipe.kept_together is not None
    whole = rule if is_divided else replace(rule, test_fraction=0.0, fold="", training_images=0)
    with processes.collective():
        rule.check()
        splits = open_dataset(recipe.data, rule=whole)
    if is_divided:
        return recipe, splits
    if recipe.validation_fraction is not None and not splits.by_name:
        say(f"note: validation_fraction is not used, since {splits.name} is divided already")

    def copies() -> tuple[tuple[str, ...], ...] | UserError:
        try:
            return find_copies(splits, rule, say)
        except UserError as error:
            return UserError(str(error))

    groups = processes.run_on_main(copies)
    if isinstance(groups, UserError):
        raise processes.error_on_main(groups)
    with processes.collective():
        return replace(recipe, kept_together=groups), divide(splits, replace(rule, kept_together=groups))
