"""CoAtNets, from a folder of images to a measured, finished classifier.

The public names are imported when they are first used: `import coatnet` itself does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from coatnet.version import __version__ as __version__

if TYPE_CHECKING:
    from coatnet.bundle import load as load
    from coatnet.data.open import open_dataset as open_dataset
    from coatnet.evaluation.evaluate import evaluate as evaluate
    from coatnet.inference.predictor import Predictor as Predictor
    from coatnet.model.network import create_model as create_model
    from coatnet.model.registry import list_variants as list_variants
    from coatnet.training.config import Recipe as Recipe
    from coatnet.training.trainer import train as train

_HOMES = {
    "Predictor": "coatnet.inference.predictor",
    "Recipe": "coatnet.training.config",
    "create_model": "coatnet.model.network",
    "evaluate": "coatnet.evaluation.evaluate",
    "list_variants": "coatnet.model.registry",
    "load": "coatnet.bundle",
    "open_dataset": "coatnet.data.open",
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
