"""Spark, started for real on this machine, gives the answers of `coatnet predict --out`."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.integrations.predictions import expected_rows, image_folder, same_answers

pytest.importorskip("pyspark", reason="Spark is not installed: pip install 'coatnet[spark]'")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java: apt-get install default-jre-headless"),
]


@pytest.fixture(scope="module")
def spark() -> Any:
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable  # of the workers
    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", False)
    session = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.memory", "1g").getOrCreate()
    yield session
    session.stop()


@pytest.mark.parametrize("options", [{}, {"reject": 0.05, "coverage": 0.9}])
def test_spark_gives_the_answers_of_predict(
    options: dict[str, float], spark: Any, tmp_path: Path, clothes_bundle: Path
) -> None:
    from coatnet.integrations.spark import predict_udf

    folder = image_folder(tmp_path / "images")
    images = spark.read.format("binaryFile").option("recursiveFileLookup", True).load(str(folder))
    predict = predict_udf(str(clothes_bundle), engine="torch", precision="fp32", **options)
    predictions = images.repartition(3).select("path", predict("content").alias("prediction"))
    predictions.select("path", "prediction.*").write.parquet(str(tmp_path / "found"))
    expected = expected_rows(clothes_bundle, folder, tmp_path / "expected.parquet", options)
    del expected["empty.png"]  # Spark's reader leaves files without bytes out
    same_answers(tmp_path / "found", expected)


def test_a_missing_image_has_an_error(spark: Any, tmp_path: Path, clothes_bundle: Path) -> None:
    from coatnet.integrations.spark import predict_udf

    table = spark.createDataFrame([(None,), (str(tmp_path / "none.png"),)], "image string")
    predict = predict_udf(str(clothes_bundle), engine="torch")
    found = [row.prediction for row in table.select(predict("image").alias("prediction")).collect()]
    assert {row.error for row in found} == {"missing", "unreadable: No such file or directory"}
    assert all(row.top1 is None and list(row.classes) == [] for row in found)
