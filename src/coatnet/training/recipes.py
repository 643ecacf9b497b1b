"""Named recipes: the paper's Table 10, and `scratch` and `finetune` for data of one's own.

Table 10 gives stochastic depth by model size, so these recipes leave it open; `fitting.fit_to` fills it in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from coatnet.errors import UserError
from coatnet.suggestions import nearest
from coatnet.training.recipe import PARTS, Recipe


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe, what Table 10 gives by model size on top, and the ImageNet-1K top-1 of the paper."""

    recipe: Recipe
    purpose: str
    by_model: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published_top1: Mapping[str, float] = field(default_factory=dict)
    needs_init: bool = False


def _by_size(first: int, *values: Any) -> dict[str, Any]:
    """Values for coatnet-`first` and the next larger ones."""
    return {f"coatnet-{first + i}": value for i, value in enumerate(values)}


def _depths(first: int, *rates: float) -> dict[str, dict[str, Any]]:
    return {name: {"stochastic_depth": rate} for name, rate in _by_size(first, *rates).items()}


_DEPTH_1K = _depths(0, 0.2, 0.3, 0.5, 0.7)
# paper: Table 10 (diamond), the larger coatnet-3 is fine-tuned with RandAugment of magnitude 20.
_FINETUNE_1K = {
    **_DEPTH_1K,
    "coatnet-3": {"stochastic_depth": 0.7, "augmentation": {"rand_augment_magnitude": 20}},
}
_DEPTH_21K = _depths(2, 0.3, 0.5, 0.7)
_BY_SIZE_JFT = {
    name: {"stochastic_depth": depth, "optimizer": {"learning_rate": rate}}
    for name, (depth, rate) in _by_size(3, (0.0, 1e-3), (0.1, 5e-4), (0.0, 5e-4)).items()
}

# paper: 300 epochs of 1,281,167 pictures in batches of 4,096 are 93.8k steps. The paper centre-crops while
# pre-training and shows the whole picture when fine-tuned ("Center crop: True / False").
_IMAGENET_1K = Recipe(
    name="imagenet-1k",
    model="coatnet-0",
    resolution=224,
    epochs=300,
    batch_size=4096,
    ema_decay=0.0,
    loss="softmax",
    optimizer={"learning_rate": 1e-3, "weight_decay": 0.05, "grad_clip_norm": 1.0},
    schedule={"decay": "cosine", "warmup_steps": 10_000, "minimum_learning_rate": 1e-5},
    augmentation={
        "placement": "crop",
        "flip_rate": 0.5,
        "rand_augment_layers": 2,
        "rand_augment_magnitude": 15,
    },
    mixing={"mixup_alpha": 0.8, "cutmix_alpha": 0.0, "label_smoothing": 0.1},
    # paper's code: the middle 224 / (224 + 32) of the picture; pixels to [-1, 1].
    preprocessing={"crop": "center", "crop_fraction": 0.875, "mean": [0.5] * 3, "std": [0.5] * 3},
)
_IMAGENET_1K_384 = replace(
    _IMAGENET_1K,
    name="imagenet-1k-384",
    resolution=384,
    epochs=30,
    batch_size=512,
    ema_decay=0.9999,
    optimizer={"learning_rate": 5e-5, "weight_decay": 1e-8, "grad_clip_norm": 1.0},
    schedule={"decay": "constant", "warmup_steps": 0, "minimum_learning_rate": 5e-5},
    preprocessing={"crop": "squash", "crop_fraction": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3},
)
_PLAIN = {"placement": "crop", "flip_rate": 0.5, "rand_augment_layers": 0}
_LIGHT = {**_PLAIN, "rand_augment_layers": 2, "rand_augment_magnitude": 5}
# 12.7 M pictures in batches of 4,096 are 3,100 steps an epoch; the warm-up is 5 epochs.
_IMAGENET_21K = replace(
    _IMAGENET_1K,
    name="imagenet-21k",
    model="coatnet-2",
    epochs=90,
    loss="sigmoid",
    optimizer={"weight_decay": 0.01, "grad_clip_norm": 1.0},
    schedule={"decay": "linear", "warmup_steps": 15_500, "minimum_learning_rate": 1e-5},
    augmentation=_PLAIN,
    mixing={"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0001},
)
_21K_TO_1K_384 = replace(
    _IMAGENET_1K_384,
    name="imagenet-21k-to-1k-384",
    model="coatnet-2",
    batch_size=1024,
    augmentation=_PLAIN,
    mixing={"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.1},
)
_JFT = replace(
    _IMAGENET_21K,
    name="jft",
    model="coatnet-3",
    epochs=14,
    schedule={"decay": "linear", "warmup_steps": 20_000, "minimum_learning_rate": 1e-5},
    augmentation=_LIGHT,
)
_JFT_TO_1K_512 = replace(
    _21K_TO_1K_384,
    name="jft-to-1k-512",
    model="coatnet-3",
    resolution=512,
    batch_size=512,
    augmentation=_LIGHT,
)

_ROWS = (
    NamedRecipe(Recipe(name="scratch"), "from nothing on your own pictures; every choice follows from the data"),
    NamedRecipe(
        Recipe(name="finetune"),
        "from a bundle (init) to your own pictures, with its preprocessing",
        needs_init=True,
    ),
    NamedRecipe(_IMAGENET_1K, "paper: ImageNet-1K at 224", _DEPTH_1K, _by_size(0, 0.816, 0.833, 0.841, 0.845)),
    NamedRecipe(
        _IMAGENET_1K_384,
        "paper: imagenet-1k fine-tuned at 384",
        _FINETUNE_1K,
        _by_size(0, 0.839, 0.851, 0.857, 0.858),
        needs_init=True,
    ),
    NamedRecipe(
        replace(_IMAGENET_1K_384, name="imagenet-1k-512", model="coatnet-2", resolution=512),
        "paper: imagenet-1k fine-tuned at 512",
        _FINETUNE_1K,
        _by_size(2, 0.859, 0.860),
        needs_init=True,
    ),
    NamedRecipe(_IMAGENET_21K, "paper: pre-training on ImageNet-21K at 224", _DEPTH_21K),
    NamedRecipe(
        replace(_IMAGENET_21K, name="imagenet-21k-randaugment", model="coatnet-4", augmentation=_LIGHT),
        "paper: PT-RA, imagenet-21k with RandAugment",
        _DEPTH_21K,
    ),
    NamedRecipe(
        _21K_TO_1K_384,
        "paper: imagenet-21k fine-tuned at 384",
        _DEPTH_21K,
        _by_size(2, 0.871, 0.876, 0.879),
        needs_init=True,
    ),
    NamedRecipe(
        replace(_21K_TO_1K_384, name="imagenet-21k-to-1k-512", resolution=512),
        "paper: imagenet-21k fine-tuned at 512",
        _DEPTH_21K,
        _by_size(2, 0.873, 0.879, 0.881),
        needs_init=True,
    ),
    NamedRecipe(_JFT, "paper: pre-training on JFT-300M at 224", _BY_SIZE_JFT),
    NamedRecipe(
        _JFT_TO_1K_512,
        "paper: jft fine-tuned at 512",
        _depths(3, 0.1, 0.3, 0.2),
        _by_size(3, 0.8881, 0.8911, 0.8977),
        needs_init=True,
    ),
)
RECIPES = {row.recipe.name: row for row in _ROWS}


def find_recipe(name: str) -> NamedRecipe:
    """The recipe of that name. Raises UserError with the nearest names if there is none."""
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is unknown{nearest(name, RECIPES)}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def named(name: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of that name with changes: plain values by field, the parts as mappings of what differs."""
    return Recipe.from_dict(merge(find_recipe(name).recipe.to_dict(), changes or {}))


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with changes, one level deep into the parts of a recipe."""
    merged = {**values, **changes}
    for part in PARTS:
        if isinstance(values.get(part), Mapping) and isinstance(changes.get(part), Mapping):
            merged[part] = {**values[part], **changes[part]}
    return merged
