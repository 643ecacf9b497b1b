"""Prediction in Ray Data: a class for `Dataset.map_batches`, of which each actor holds one model.

import ray
from coatnet.integrations.ray import BatchPredictor

images = ray.data.read_binary_files("images/", include_paths=True)
predictions = images.map_batches(
    BatchPredictor, fn_constructor_kwargs={"source": "model"}, batch_size=64, concurrency=2
)
predictions.drop_columns(["bytes"]).write_parquet("predictions/")
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from coatnet.errors import UserError
from coatnet.inference.predictor import Predictor
from coatnet.integrations.tables import predict_columns

__all__ = ["BatchPredictor"]


class BatchPredictor:
    """Adds the columns of `coatnet predict --out` to batches: top1, probability, classes, probabilities, error, ...

    Args:
        source: a bundle's folder, which every node sees, or its id on the hub.
        column: the images: encoded files (`bytes`, as `ray.data.read_binary_files` gives them), paths, or uint8 arrays
            (`image`, as `ray.data.read_images` gives them).
        top_k: number of classes per image.
        options: of `coatnet.Predictor`: engine, precision, views, reject, coverage, set_method, raw, device.

    Raises:
        UserError: as `coatnet.Predictor`.
    """

    def __init__(self, source: str, *, column: str = "bytes", top_k: int = 5, **options: Any) -> None:
        self.predictor = Predictor(source, **options)
        self.column, self.top_k = column, top_k

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Classify a batch, given by columns. Unreadable images are rows with an `error`.

        Raises:
            UserError: the batch has no such column, or it holds no images.
        """
        if self.column not in batch:
            raise UserError(f"there is no column {self.column!r}; the columns are {', '.join(batch)}")
        found = predict_columns(self.predictor, list(batch[self.column]), top_k=self.top_k)
        return {**batch, **{name: _as_array(values) for name, values in found.items()}}


def _as_array(values: list[Any]) -> np.ndarray:
    """One object per image, so that lists of different length, and missing values, stay what they are."""
    array = np.empty(len(values), dtype=object)
    array[:] = [list(value) if isinstance(value, tuple) else value for value in values]
    return array
