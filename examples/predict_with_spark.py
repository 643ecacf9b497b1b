"""Classify images in Spark: a pandas UDF from encoded files to predictions."""

import os
import sys
import tempfile
from pathlib import Path

from pyspark.sql import SparkSession

import coatnet
from coatnet.integrations.spark import predict_udf

recipe = coatnet.Recipe(data="digits", model="coatnet-femto-16", epochs=1)
with tempfile.TemporaryDirectory() as folder:
    coatnet.train(recipe, f"{folder}/run")
    os.environ["PYSPARK_PYTHON"] = sys.executable  # the workers use the packages of this environment
    spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", False).getOrCreate()
    images = spark.read.format("binaryFile").load(str(Path(__file__).parent / "images"))
    predict = predict_udf(f"{folder}/run/bundle")
    for row in images.select("path", predict("content").alias("found")).collect():
        print(f"{Path(row.path).name}: {row.found.error or row.found.top1}")
    spark.stop()
