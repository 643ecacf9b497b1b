"""The verb that trains."""

import os
from collections.abc import Sequence

from coatnet.cli.arguments.train import train_arguments


def train(arguments: Sequence[str]) -> int:
    """Train, measure, and leave a finished model."""
    recipe, given = train_arguments(arguments)
    if given.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    from coatnet.training.trainer import train as train_recipe

    report = train_recipe(recipe, given.out)
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first speaks
        print(report.headline())
        print(f"The whole report is {given.out}/report.md, the finished model {given.out}/bundle.")
    return 0
