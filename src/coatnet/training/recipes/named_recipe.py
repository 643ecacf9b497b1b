"""A recipe with a name: what it is for, what it depends on, and the score to expect."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coatnet.training.config import Recipe


@dataclass(frozen=True)
class PaperData:
    """Images and classes of a data set that the paper trains on."""

    num_images: int
    num_classes: int


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe, what Table 10 gives by model size on top, and the score to expect.

    `data` is what the paper trains on, None for images of one's own. `published_top1` is the paper's, on ImageNet-1K
    by model; `measured_top1` is ours, by model and data. `silent` says what the recipe holds that the paper does not,
    `remarks` what else the paper's network has, by model.
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
        if self.data is None:
            return None
        assert self.recipe.epochs is not None and self.recipe.batch_size is not None
        return math.ceil(self.recipe.epochs * self.data.num_images / self.recipe.batch_size)
