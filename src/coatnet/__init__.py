"""CoAtNets: from a folder of images to a trained and measured classifier.

The names below are what programs may rely on. They are imported when they are first used: `import coatnet` itself does
not import torch.
"""

from coatnet.system import interrupt  # noqa: F401  isort: skip  (before the imports that it is about)

from typing import TYPE_CHECKING

from coatnet.public_names import lazy_exports
from coatnet.system.telemetry import switch_off_telemetry
from coatnet.version import __version__ as __version__

if TYPE_CHECKING:
    from coatnet.bundle.bundle import Bundle as Bundle
    from coatnet.bundle.bundle import load as load
    from coatnet.data.inspection import inspect as inspect
    from coatnet.data.open import open_dataset as open_dataset
    from coatnet.errors import UserError as UserError
    from coatnet.evaluation.calibrate import calibrate as calibrate
    from coatnet.evaluation.evaluate import evaluate as evaluate
    from coatnet.evaluation.extend import extend as extend
    from coatnet.evaluation.features import extract_features as extract_features
    from coatnet.evaluation.probe import probe as probe
    from coatnet.evaluation.report import Report as Report
    from coatnet.evaluation.report_markdown import write_report as write_report
    from coatnet.evaluation.soup import soup as soup
    from coatnet.inference.explanation import Explanation as Explanation
    from coatnet.inference.predictor import Prediction as Prediction
    from coatnet.inference.predictor import Predictor as Predictor
    from coatnet.model.compat import from_coatnet_pytorch as from_coatnet_pytorch
    from coatnet.model.complexity import complexity as complexity
    from coatnet.model.freeze import freeze as freeze
    from coatnet.model.network import create_model as create_model
    from coatnet.model.registry import find_variant as find_variant
    from coatnet.model.registry import list_variants as list_variants
    from coatnet.training.config import Recipe as Recipe
    from coatnet.training.config import TrainingConfig as TrainingConfig
    from coatnet.training.interruption import Interrupted as Interrupted
    from coatnet.training.recipes import named_recipe as named_recipe
    from coatnet.training.run import train as train

switch_off_telemetry()

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Bundle": "coatnet.bundle.bundle",
        "Explanation": "coatnet.inference.explanation",
        "Interrupted": "coatnet.training.interruption",
        "Prediction": "coatnet.inference.predictor",
        "Predictor": "coatnet.inference.predictor",
        "Recipe": "coatnet.training.config",
        "Report": "coatnet.evaluation.report",
        "TrainingConfig": "coatnet.training.config",
        "UserError": "coatnet.errors",
        "calibrate": "coatnet.evaluation.calibrate",
        "complexity": "coatnet.model.complexity",
        "create_model": "coatnet.model.network",
        "evaluate": "coatnet.evaluation.evaluate",
        "extend": "coatnet.evaluation.extend",
        "extract_features": "coatnet.evaluation.features",
        "find_variant": "coatnet.model.registry",
        "freeze": "coatnet.model.freeze",
        "from_coatnet_pytorch": "coatnet.model.compat",
        "inspect": "coatnet.data.inspection",
        "list_variants": "coatnet.model.registry",
        "load": "coatnet.bundle.bundle",
        "named_recipe": "coatnet.training.recipes",
        "open_dataset": "coatnet.data.open",
        "probe": "coatnet.evaluation.probe",
        "soup": "coatnet.evaluation.soup",
        "train": "coatnet.training.run",
        "write_report": "coatnet.evaluation.report_markdown",
    },
)
