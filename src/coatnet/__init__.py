"""CoAtNets, from a folder of pictures to a measured, finished classifier.

The public names are imported when they are first used: `import coatnet` itself does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coatnet.bundle import load as load
    from coatnet.data.sources import open_dataset as open_dataset
    from coatnet.deploy.predictor import Predictor as Predictor
    from coatnet.evaluation.evaluate import evaluate as evaluate
    from coatnet.model.coatnet import create_model as create_model
    from coatnet.model.variants import list_variants as list_variants
    from coatnet.training.recipe import Recipe as Recipe
    from coatnet.training.trainer import train as train

__version__ = "0.1.0"

_HOMES = {
    "Predictor": "coatnet.deploy.predictor",
    "Recipe": "coatnet.training.recipe",
    "create_model": "coatnet.model.coatnet",
    "evaluate": "coatnet.evaluation.evaluate",
    "list_variants": "coatnet.model.variants",
    "load": "coatnet.bundle",
    "open_dataset": "coatnet.data.sources",
    "train": "coatnet.training.trainer",
}

__all__ = ["Predictor", "Recipe", "create_model", "evaluate", "list_variants", "load", "open_dataset", "train"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'coatnet' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
