"""Images a second of `coatnet predict --out`, Ray Data and Spark on the same files, one after the other.

    OMP_NUM_THREADS=1 python benchmarks/integrations.py                    # coatnet-femto-64, 2,000 JPEGs of 500 x 375
    OMP_NUM_THREADS=2 python benchmarks/integrations.py --images 4000 --rounds 5

Each has one process that computes, with OMP_NUM_THREADS threads, and ends with a Parquet file; Ray and Spark, local,
have other processes that read. What is measured goes from the finished start of Ray or Spark to the file, and includes
loading the model, except in Spark, whose worker keeps it from round to round. All three decode in threads, but only
`predict --out` decodes the next batches while the engine computes. On a busy machine the ratios, each of two neighbors
in time, say more than the rates.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from images import write_photographs
from pyspark.sql import SparkSession
from rich.console import Console
from rich.table import Table
from rounds import alternate, spread, timed

import coatnet
from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.inference.batch import open_samples, predict_to_file
from coatnet.integrations.ray import BatchPredictor
from coatnet.integrations.spark import predict_udf

BATCH = 64


def main() -> None:
    given = parse()
    torch.manual_seed(0)
    model = coatnet.create_model(given.model, num_classes=100, resolution=given.resolution).eval()
    threads = os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(threads))
    os.environ["PYSPARK_PYTHON"] = sys.executable
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = tuple(f"class {number}" for number in range(100))
        bundle = Bundle(model, names, Preprocessing(resolution=given.resolution)).save(folder / "model")
        write_photographs((folder / "images" / f"{number}.jpg" for number in range(given.images)), 500, 375)
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", False)
        builder = builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", BATCH)
        spark = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
        ways = {"predict --out": with_predict, "Ray Data": with_ray, "Spark": partial(with_spark, spark)}
        outs = (folder / f"out{number}" for number in itertools.count())

        def run(way: str) -> None:
            ways[way](str(bundle), str(folder / "images"), next(outs))

        seconds = alternate({way: timed(partial(run, way)) for way in ways}, given.rounds, warming=1)
        rates = {way: [given.images / each for each in taken] for way, taken in seconds.items()}
        spark.stop()
        ray.shutdown()
    show(rates, given, threads)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coatnet-femto-64")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds; the medians are printed")
    return parser.parse_args()


def with_predict(bundle: str, images: str, out: Path) -> None:
    predictor = coatnet.Predictor(bundle, "torch", "fp32")
    predict_to_file(predictor, open_samples([images]), out.with_suffix(".parquet"), batch_size=BATCH)


def with_ray(bundle: str, images: str, out: Path) -> None:
    files = ray.data.read_binary_files(images, include_paths=True)
    options = {"source": bundle, "engine": "torch", "precision": "fp32"}
    predictions = files.map_batches(BatchPredictor, fn_constructor_kwargs=options, batch_size=BATCH, concurrency=1)
    predictions.drop_columns(["bytes"]).write_parquet(str(out))


def with_spark(spark: Any, bundle: str, images: str, out: Path) -> None:
    files = spark.read.format("binaryFile").load(images)
    predict = predict_udf(bundle, engine="torch", precision="fp32")
    predictions = files.select("path", predict("content").alias("prediction"))
    predictions.select("path", "prediction.*").write.parquet(str(out))


def show(rates: dict[str, list[float]], given: argparse.Namespace, threads: str) -> None:
    table = Table(f"{given.model} at {given.resolution}", "images/s", "of predict --out (range)")
    for way, values in rates.items():
        ratios = [each / other for each, other in zip(values, rates["predict --out"], strict=True)]
        table.add_row(way, f"{statistics.median(values):.0f}", spread(ratios))
    console = Console(width=120)
    console.print(table)
    console.print(f"{given.images:,} JPEGs of 500 x 375, {given.rounds} rounds, OMP_NUM_THREADS {threads}")


if __name__ == "__main__":
    main()
