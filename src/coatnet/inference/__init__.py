"""Finished models at work: the inference loop, engines that compute logits, the predictor, batch prediction."""

from coatnet.inference.predictor import Prediction as Prediction
from coatnet.inference.predictor import Predictor as Predictor

__all__ = ["Prediction", "Predictor"]
