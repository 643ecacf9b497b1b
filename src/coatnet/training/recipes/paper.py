"""The paper's recipes: Table 10, with the scores of its Tables 4, 5, 13 and 14.

Table 10 gives stochastic depth by model size, so these recipes leave it open; `defaults.resolve` fills it in.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from coatnet.training.config import Recipe


@dataclass(frozen=True)
class PaperData:
    """Images and classes of a data set that the paper trains on."""

    num_images: int
    num_classes: int


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe with a name: what it is for, what it depends on, and the score to expect.

    Attributes:
        recipe: What is the same for all models; it leaves to the data what it does not say.
        purpose: What it is for, a line.
        by_model: Values over the recipe's by size of the model, as in Table 10.
        published_top1: The paper's top-1 on ImageNet-1K by model, as a fraction.
        needs_init: Whether it starts from a bundle.
        data: What the paper trains on; None for images of one's own.
        measured_top1: Ours, by model and data.
        silent: What the recipe says that the paper does not.
        remarks: What else the paper's network has, by model.
    """

    recipe: Recipe
    purpose: str
    by_model: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published_top1: Mapping[str, float] = field(default_factory=dict)
    needs_init: bool = False
    data: PaperData | None = None
    measured_top1: Mapping[str, float] = field(default_factory=dict)
    silent: str = ""
    remarks: Mapping[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int | None:
        """Optimizer steps on the paper's data; None for data of one's own."""
        if self.data is None or self.recipe.epochs is None or self.recipe.batch_size is None:
            return None
        return math.ceil(self.recipe.epochs * self.data.num_images / self.recipe.batch_size)


def _by_size(first: int, *values: Any) -> dict[str, Any]:
    """Values for coatnet-`first` and the next larger ones."""
    return {f"coatnet-{first + i}": value for i, value in enumerate(values)}


def _depths(first: int, *rates: float) -> dict[str, dict[str, Any]]:
    return {name: {"stochastic_depth": rate} for name, rate in _by_size(first, *rates).items()}


# paper: section 4.1 for the images. chosen: the classes, which memory depends on, from the papers of the data sets.
_ON_1K = PaperData(num_images=1_281_167, num_classes=1000)
_ON_21K = PaperData(num_images=12_700_000, num_classes=21_841)
_ON_JFT = PaperData(num_images=300_000_000, num_classes=18_291)
_ON_JFT_3B = PaperData(num_images=3_000_000_000, num_classes=29_593)

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

# paper: 300 epochs of 1,281,167 images in batches of 4,096 are 93.8k steps. The paper center-crops while
# pre-training and shows the whole image when fine-tuned ("Center crop: True / False").
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
    # paper's code: the middle 224 / (224 + 32) of the image; pixels to [-1, 1].
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
# 12.7 M images in batches of 4,096 are 3,100 steps an epoch; the warm-up is 5 epochs.
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
_DEPTH_4 = _depths(4, 0.7)
# paper: Table 10 (dagger), PT-RA keeps its RandAugment when it is fine-tuned.
_PT_RA_TO_1K_384 = replace(
    _21K_TO_1K_384, name="imagenet-21k-randaugment-to-1k-384", model="coatnet-4", augmentation=_LIGHT
)
_JFT = replace(
    _IMAGENET_21K,
    name="jft",
    model="coatnet-3",
    epochs=14,
    schedule={"decay": "linear", "warmup_steps": 20_000, "minimum_learning_rate": 1e-5},
    augmentation=_LIGHT,
)
# chosen: the paper gives no hyper-parameters for JFT-3B. All is as for coatnet-5 on JFT-300M but the epochs: the
# core-days of Table 5, at the rate at which coatnet-5 used its cores, are 14.4e9 images for coatnet-7 and 8.2e9 for
# coatnet-6.
_JFT_3B = replace(
    _JFT,
    name="jft-3b",
    model="coatnet-7",
    epochs=5,
    optimizer={"learning_rate": 5e-4, "weight_decay": 0.01, "grad_clip_norm": 1.0},
)
_SILENT_3B = (
    "coatnet-6 and -7 come with sizes, core-days and scores only; the values are those of coatnet-5, and 5 epochs are "
    "what the core-days of coatnet-7 amount to (3 for coatnet-6)"
)
# paper: Table 5, of coatnet-3 only.
_STRIDED_DEPTHWISE = {
    "coatnet-3": "the paper's coatnet-3 on JFT strides in its depthwise convolutions: --variations.downsample depthwise"
}
_JFT_TO_1K_384 = replace(_21K_TO_1K_384, name="jft-to-1k-384", model="coatnet-3", batch_size=512, augmentation=_LIGHT)


def _both_resolutions(
    at_384: Recipe, start: str, by_model: Mapping[str, Mapping[str, Any]], *top1: tuple[Any, ...]
) -> tuple[NamedRecipe, NamedRecipe]:
    """Fine-tuning on ImageNet-1K at 384 and at 512 pixels, with the scores of each: `(first size, top-1, ...)`."""
    at_512 = replace(at_384, name=at_384.name.replace("384", "512"), resolution=512)
    at_384_row, at_512_row = (
        NamedRecipe(
            recipe,
            f"paper: {start} fine-tuned at {recipe.resolution}",
            by_model,
            _by_size(*scores),
            needs_init=True,
            data=_ON_1K,
        )
        for recipe, scores in zip((at_384, at_512), top1, strict=True)
    )
    return at_384_row, at_512_row


TABLE_10 = (
    NamedRecipe(
        _IMAGENET_1K, "paper: ImageNet-1K at 224", _DEPTH_1K, _by_size(0, 0.816, 0.833, 0.841, 0.845), data=_ON_1K
    ),
    NamedRecipe(
        _IMAGENET_1K_384,
        "paper: imagenet-1k fine-tuned at 384",
        _FINETUNE_1K,
        _by_size(0, 0.839, 0.851, 0.857, 0.858),
        needs_init=True,
        data=_ON_1K,
    ),
    NamedRecipe(
        replace(_IMAGENET_1K_384, name="imagenet-1k-512", model="coatnet-2", resolution=512),
        "paper: imagenet-1k fine-tuned at 512",
        _FINETUNE_1K,
        _by_size(2, 0.859, 0.860),
        needs_init=True,
        data=_ON_1K,
    ),
    NamedRecipe(_IMAGENET_21K, "paper: pre-training on ImageNet-21K at 224", _DEPTH_21K, data=_ON_21K),
    NamedRecipe(
        replace(_IMAGENET_21K, name="imagenet-21k-randaugment", model="coatnet-4", augmentation=_LIGHT),
        "paper: PT-RA, imagenet-21k with RandAugment",
        _DEPTH_4,
        data=_ON_21K,
    ),
    NamedRecipe(
        replace(_IMAGENET_21K, name="imagenet-21k-randaugment-150", model="coatnet-4", augmentation=_LIGHT, epochs=150),
        "paper: PT-RA-E150, the same for 150 epochs",
        _DEPTH_4,
        data=_ON_21K,
    ),
    *_both_resolutions(_21K_TO_1K_384, "imagenet-21k", _DEPTH_21K, (2, 0.871, 0.876, 0.879), (2, 0.873, 0.879, 0.881)),
    *_both_resolutions(_PT_RA_TO_1K_384, "imagenet-21k-randaugment", _DEPTH_4, (4, 0.883), (4, 0.884)),
    *_both_resolutions(
        replace(_PT_RA_TO_1K_384, name="imagenet-21k-randaugment-150-to-1k-384"),
        "imagenet-21k-randaugment-150",
        _DEPTH_4,
        (4, 0.884),
        (4, 0.8856),
    ),
    NamedRecipe(_JFT, "paper: pre-training on JFT-300M at 224", _BY_SIZE_JFT, data=_ON_JFT, remarks=_STRIDED_DEPTHWISE),
    *(
        replace(row, remarks=_STRIDED_DEPTHWISE)
        for row in _both_resolutions(
            _JFT_TO_1K_384, "jft", _depths(3, 0.1, 0.3, 0.2), (3, 0.8852), (3, 0.8881, 0.8911, 0.8977)
        )
    ),
    NamedRecipe(
        _JFT_3B,
        "paper (sizes and scores only): JFT-3B at 224",
        _depths(6, 0.0, 0.0),
        silent=_SILENT_3B,
        data=_ON_JFT_3B,
    ),
    NamedRecipe(
        replace(_JFT_TO_1K_384, name="jft-3b-to-1k-512", model="coatnet-7", resolution=512),
        "paper (sizes and scores only): jft-3b fine-tuned at 512",
        _depths(6, 0.2, 0.2),
        _by_size(6, 0.9045, 0.9088),
        needs_init=True,
        silent="all values are those of coatnet-5; the scores are the paper's",
        data=_ON_1K,
    ),
)
