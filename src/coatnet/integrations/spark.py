"""Prediction in Spark: a pandas UDF, for which each Python worker loads the model once.

from coatnet.integrations.spark import predict_udf

images = spark.read.format("binaryFile").option("recursiveFileLookup", True).load("images/")
predictions = images.select("path", predict_udf("model")("content").alias("prediction"))
predictions.select("path", "prediction.*").write.parquet("predictions/")
"""

import functools
from collections.abc import Iterator
from typing import Any

from coatnet.errors import import_extra
from coatnet.inference.predictor import Predictor
from coatnet.integrations.tables import COLUMNS, predict_columns

__all__ = ["predict_udf"]

_TYPES = {
    "top1": "string",
    "probability": "float",
    "classes": "array<string>",
    "probabilities": "array<float>",
    "error": "string",
    "novelty": "float",
    "unknown": "boolean",
    "class_set": "array<string>",
}


def predict_udf(source: str, *, top_k: int = 5, **options: Any) -> Any:
    """A pandas UDF from images to a struct with the columns of `coatnet predict --out`: top1, probability, classes, ...

    Its argument is a column of encoded files (`content` of Spark's `binaryFile`) or of paths that every worker sees. A
    missing or unreadable image has an `error`.

    Args:
        source: a bundle's folder, which every worker sees, or its id on the hub.
        top_k: number of classes per image.
        options: of `coatnet.Predictor`: engine, precision, views, reject, coverage, set_method, raw, device.

    Raises:
        UserError: pyspark or pandas is not installed; when it runs, as `coatnet.Predictor`.
    """
    functions = import_extra("pyspark.sql.functions", "spark", "predictions in Spark")
    pandas = import_extra("pandas", "spark", "predictions in Spark")

    def predict(batches: Iterator[pandas.Series]) -> Iterator[pandas.DataFrame]:
        predictor = _predictor(source, **options)
        for images in batches:
            found = predict_columns(predictor, [_present(image) for image in images], top_k=top_k)
            yield pandas.DataFrame({name: pandas.Series(values, dtype=object) for name, values in found.items()})

    predict.__annotations__ = {"batches": Iterator[pandas.Series], "return": Iterator[pandas.DataFrame]}
    return functions.pandas_udf(predict, ", ".join(f"{name} {_TYPES[name]}" for name in COLUMNS))


@functools.cache
def _predictor(source: str, **options: Any) -> Predictor:
    """The model of this worker, which Spark uses for one partition after the other."""
    return Predictor(source, **options)


def _present(image: Any) -> Any:
    """The image, or None where the table has none: pandas stores that as None or NaN."""
    return image if isinstance(image, bytes | bytearray | str) else None
