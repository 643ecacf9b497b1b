"""Finished models at work: the inference loop, engines that compute logits, the predictor, batch prediction."""

from typing import TYPE_CHECKING

from coatnet.public_names import lazy_exports

if TYPE_CHECKING:
    from coatnet.inference.explanation import Explanation as Explanation
    from coatnet.inference.explanation import relative_biases as relative_biases
    from coatnet.inference.logits import infer as infer
    from coatnet.inference.predictor import Prediction as Prediction
    from coatnet.inference.predictor import Predictor as Predictor

# Imported when used: training needs the inference loop without the engines.
__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Explanation": "coatnet.inference.explanation",
        "Prediction": "coatnet.inference.predictor",
        "Predictor": "coatnet.inference.predictor",
        "infer": "coatnet.inference.logits",
        "relative_biases": "coatnet.inference.explanation",
    },
)
