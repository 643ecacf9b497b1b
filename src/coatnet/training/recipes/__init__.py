"""Named recipes: for data of one's own, for Fashion-MNIST, and the paper's (Table 10)."""

from collections.abc import Mapping
from typing import Any

from coatnet.errors import UserError, nearest
from coatnet.training.config import Recipe
from coatnet.training.recipes.paper import TABLE_10, NamedRecipe

_OWN_DATA = (
    NamedRecipe(
        Recipe(name="scratch"), "from untrained weights on your own images; every choice follows from the data"
    ),
    NamedRecipe(
        Recipe(name="finetune"),
        "from a bundle (init) to your own images, with its preprocessing",
        needs_init=True,
    ),
    NamedRecipe(
        # A mirrored garment is a garment; `scratch` takes small gray images for signs and does not mirror them.
        Recipe(name="fashion-mnist", augmentation={"flip_rate": 0.5}),
        "scratch for the garments of Fashion-MNIST, which may be mirrored",
        measured_top1={"coatnet-pico-64 on fashion-mnist": 0.9445, "coatnet-femto-64 on fashion-mnist-small": 0.915},
    ),
)
RECIPES = {row.recipe.name: row for row in (*_OWN_DATA, *TABLE_10)}


def find_recipe(name: str) -> NamedRecipe:
    """The recipe of that name. Raises UserError with the nearest names if there is none."""
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is unknown{nearest(name, RECIPES)}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def named_recipe(name: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of that name with changes over it.

    Args:
        name: a key of `RECIPES`, such as "finetune" or "imagenet-1k".
        changes: values by name; sections as dicts of some of their values.

    Raises:
        UserError: there is no such recipe, or a value is wrong.
    """
    return find_recipe(name).recipe.changed(changes or {})
