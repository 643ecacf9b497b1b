"""Named recipes: `scratch` and `finetune` for data of one's own, and the paper's."""

from collections.abc import Mapping
from typing import Any

from coatnet.errors import UserError, nearest
from coatnet.training.config import PARTS, Recipe
from coatnet.training.recipes.named_recipe import NamedRecipe
from coatnet.training.recipes.paper import TABLE_10

_ROWS = (
    NamedRecipe(
        Recipe(name="scratch"),
        "from nothing on your own images; every choice follows from the data",
        measured_top1={"coatnet-pico-64 on fashion-mnist": 0.9445, "coatnet-femto-64 on fashion-mnist-small": 0.892},
    ),
    NamedRecipe(
        Recipe(name="finetune"),
        "from a bundle (init) to your own images, with its preprocessing",
        needs_init=True,
    ),
    *TABLE_10,
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
