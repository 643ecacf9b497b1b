"""Fills in what a recipe leaves open, from the images it is to learn and the bundle it starts from.

Every figure here is `chosen`: the paper trains on ImageNet and larger only.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.decode import BadImage, decode
from coatnet.data.mixing import Mixing
from coatnet.data.open import NAMES
from coatnet.data.splits import Splits
from coatnet.data.transforms import Augmentation, Preprocessing
from coatnet.errors import UserError
from coatnet.model.registry import default_variant
from coatnet.training.config import Recipe, complete
from coatnet.training.optimizer import Optimization, Schedule
from coatnet.training.recipes.registry import find_recipe

SMALL = 64  # pixels: up to here an image keeps its own size, if it may, and is shifted, not cropped
MANY = 20_000  # images, that a network for small ones does not soon know by heart
SAMPLE = 256  # images looked at


def is_small(splits: Splits) -> bool:
    """Whether the images are of 64 pixels or less."""
    return max(splits.summary.largest) <= SMALL


def brightness(dataset: Dataset) -> tuple[float, float]:
    """Mean and standard deviation of the pixels, in 0 to 1, of up to 256 images, evenly spread."""
    images = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).astype(np.int64)).tolist():
        try:
            content, _ = dataset.read(index)
            images.append(np.asarray(decode(content, "") if isinstance(content, bytes) else content).ravel())
        except BadImage:
            continue
    pixels = np.concatenate(images) / 255
    return round(float(pixels.mean()), 4), round(float(max(pixels.std(), 0.05)), 4)


def resolve(recipe: Recipe, splits: Splits, init: Bundle | None = None) -> Recipe:
    """The recipe with nothing left open: running it again, or its YAML, is the same run.

    What the recipe gives is kept. Raises UserError if it contradicts the data or the bundle it starts from.
    """
    check_start(recipe, splits, init)
    check_labels(recipe, splits)
    row, number = find_recipe(recipe.name), len(splits.training)
    preprocessing = fit_preprocessing(recipe, splits, init)
    model = recipe.model if recipe.model != "auto" else default_variant(preprocessing.resolution)
    model = init.model.variant.name if init else model
    table = row.by_model.get(model, {})

    batch_size = recipe.batch_size or fit_batch_size(number)
    epochs = recipe.epochs or fit_epochs(number, batch_size, finetune=init is not None)
    total_steps = steps_of(epochs, number, batch_size)
    if recipe.head_first_epochs and steps_of(recipe.head_first_epochs, number, batch_size) >= total_steps:
        raise UserError(
            f"head_first_epochs {recipe.head_first_epochs:g} leaves nothing of {epochs:g} epochs for the rest of the "
            "network: give less, or freeze the rest"
        )
    published = recipe.name not in ("scratch", "finetune")
    regular = {} if published else regularisation(splits, preprocessing.resolution, finetune=init is not None)
    width = init.model.variant.stages[-1].width if init else None
    rate = {} if published else {"learning_rate": fit_learning_rate(batch_size, width)}
    if init is not None and not published:
        rate["layer_decay"] = 0.8
    warmup = {} if published else {"warmup_steps": max(1, total_steps // 20), "minimum_learning_rate": 1e-5}
    average = recipe.ema_decay if recipe.ema_decay is not None else fit_ema_decay(total_steps)
    depth = recipe.stochastic_depth
    if depth is None:
        # The few blocks of the rows for small images learn too little rather than too much.
        depth = table.get("stochastic_depth", 0.0 if preprocessing.resolution <= SMALL else 0.1)
    return replace(
        recipe,
        data=recipe.data if recipe.data in NAMES else lasting(recipe.data),
        model=model,
        init=lasting(recipe.init) if recipe.init else None,
        resolution=preprocessing.resolution,
        channels=preprocessing.channels,
        epochs=epochs,
        batch_size=batch_size,
        stochastic_depth=depth,
        ema_decay=average,
        loss=recipe.loss or ("sigmoid" if splits.training.multilabel else "softmax"),
        optimizer=complete(Optimization, recipe.optimizer, **{**rate, **table.get("optimizer", {})}),
        schedule=complete(Schedule, recipe.schedule, **warmup),
        augmentation=complete(
            Augmentation,
            recipe.augmentation,
            **{**regular.get("augmentation", {}), **table.get("augmentation", {})},
        ),
        mixing=complete(Mixing, recipe.mixing, **regular.get("mixing", {})),
        preprocessing=preprocessing,
        # at most a dozen evaluations: on small images one costs as much as a sixth of an epoch
        evaluate_every=recipe.evaluate_every or (1.0 if recipe.max_minutes else max(1.0, round(epochs / 12))),
    )


def check_start(recipe: Recipe, splits: Splits, init: Bundle | None) -> None:
    """Raises UserError if recipe, data and the bundle to start from contradict each other."""
    row = find_recipe(recipe.name)
    if init is None:
        if row.needs_init:
            raise UserError(
                f"recipe {recipe.name!r} starts from a bundle: give init, "
                "a folder such as RUN/bundle or an id of the hub"
            )
        for name in ("freeze", "head_first_epochs"):
            if getattr(recipe, name):
                raise UserError(f"{name} is for a network that has learned already: give init as well, or leave it out")
        return
    if recipe.model not in ("auto", row.recipe.model, init.model.variant.name):
        raise UserError(f"model is {recipe.model!r}, but init holds a {init.model.variant.name}: leave model out")
    if init.classes == splits.classes and init.multilabel != splits.multilabel:
        # More often a stray separator in a table than a wish.
        kinds = {True: "several labels an image", False: "one label an image"}
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
                f"{name} {given} is for one label an image, but {splits.name} has several: give {name} {instead}"
            )


def lasting(source: str) -> str:
    """A folder or file by its full path; anything else, such as a URL or an id of the hub, as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def fit_preprocessing(recipe: Recipe, splits: Splits, init: Bundle | None) -> Preprocessing:
    """As the bundle it starts from; else the images' own size if they are small; else 128 or 224 pixels."""
    given = recipe.preprocessing
    channels = recipe.channels or (1 if splits.grey else 3)
    if init is not None and not isinstance(given, Preprocessing):
        whole = complete(Preprocessing, {**asdict(init.preprocessing), **given})
    elif is_small(splits):
        mean, std = brightness(splits.training)
        level = {"mean": [mean] * channels, "std": [std] * channels}
        side = max(splits.summary.median)
        whole = complete(Preprocessing, given, resolution=side, crop_fraction=1.0, **level)
    else:
        # Below 20,000 images, 224 pixels cost three times the time and teach an untrained network little.
        side = 128 if len(splits.training) < 20_000 or splits.native_resolution < 224 else 224
        whole = complete(Preprocessing, given, resolution=side, mean=[0.5] * channels, std=[0.5] * channels)
    if recipe.resolution is not None:
        whole = replace(whole, resolution=recipe.resolution)
    if recipe.channels is not None and whole.channels != recipe.channels:
        raise UserError(f"channels is {recipe.channels}, but preprocessing has {whole.channels}: make them agree")
    return whole


def regularisation(splits: Splits, resolution: int, *, finetune: bool) -> dict[str, dict[str, Any]]:
    """Augmentation and mixing: shifts for small images, enlarged or not, crops and RandAugment for photographs."""
    # A letter in a mirror is no letter, and most small grey images are signs; garments are not.
    signs = is_small(splits) and splits.grey and not splits.name.startswith("fashion-mnist")
    flip_rate = 0.0 if signs else 0.5
    smoothing = 0.0 if splits.training.multilabel else 0.1
    if is_small(splits) or resolution <= SMALL:
        return {
            "augmentation": {
                "placement": "shift",
                # One pixel of 28: with two, 10,000 garments stay half a point lower.
                "shift": max(1, resolution // 28),
                "flip_rate": flip_rate,
                # 60,000 garments, shifted by two pixels: 93.9 % top-1 in 28 epochs, without it 93.7 in 21.
                "erasing_rate": 0.5 if len(splits.training) >= MANY else 0.0,
            },
            "mixing": {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": smoothing},
        }
    return {
        "augmentation": {
            "placement": "crop",
            "crop_scale": [0.35, 1.0],
            "flip_rate": flip_rate,
            "rand_augment_layers": 2,
            "rand_augment_magnitude": 9,
        },
        "mixing": {
            "mixup_alpha": 0.0 if finetune else 0.2,
            "cutmix_alpha": 0.0,
            "label_smoothing": smoothing,
        },
    }


def fit_batch_size(number: int) -> int:
    """Some thirty steps an epoch, but 16 images at least for BatchNorm, and 64 at most: more are no faster."""
    return int(min(max(16, 2 ** round(math.log2(max(1, number) / 32))), 64, max(1, number)))


def fit_epochs(number: int, batch_size: int, *, finetune: bool) -> float:
    """Fewer images are seen more often: 32 epochs of 60,000, 100 of 6,000; to fine-tune a third, but 300 steps."""
    epochs = min(100, max(20, round(32 * math.sqrt(60_000 / number))))
    return float(min(epochs, max(8, epochs // 3, 300 * batch_size // number)) if finetune else epochs)


def fit_learning_rate(batch_size: int, learned_width: int | None) -> float:
    """2e-3 at 128 images a step, with the square root of the batch size.

    To fine-tune a network whose last stage is of some width it falls as 1 / width from 128 channels on, the law of
    Adam's rate in networks that have learned (Yang et al. 2022, "Tensor Programs V"): 2.5e-4 for coatnet-2. With 2e-4
    for all, coatnet-pico-64 had 56 % top-1 on 50 garments, where 2e-3 brought 77 and untrained weights 77.
    """
    narrowness = min(1.0, 128 / learned_width) if learned_width else 1.0
    return round(2e-3 * narrowness * math.sqrt(batch_size / 128), 6)


def fit_ema_decay(total_steps: int) -> float:
    """An average over some 3 % of the run."""
    return round(min(0.9998, max(0.9, 1 - 30 / total_steps)), 5)


def steps_of(epochs: float, number: int, batch_size: int) -> int:
    """Optimizer steps that show each of `number` images `epochs` times."""
    return max(1, math.ceil(epochs * number / batch_size))


def head_first_steps(recipe: Recipe, number: int) -> int:
    """Optimizer steps in which the classifier learns alone."""
    assert recipe.batch_size is not None
    return steps_of(recipe.head_first_epochs, number, recipe.batch_size) if recipe.head_first_epochs else 0
