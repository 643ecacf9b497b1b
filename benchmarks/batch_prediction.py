"""How busy `coatnet predict --out` keeps the engine, on JPEGs of 500 x 375: images a second, and peak memory.

    python benchmarks/batch_prediction.py                                  # coatnet-0 at 224, the fastest engine
    python benchmarks/batch_prediction.py --engine torch --images 512

Measured in turn, in one process: the engine alone, on images that are prepared; reading and preparing alone, by the
same threads; and the whole, to the finished file. On a CPU the engine and decoding share the cores: what could be
reached at best then takes, an image, the time of the engine and that of decoding together.
"""

import argparse
import itertools
import os
import resource
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from images import write_photographs
from rich.console import Console
from rich.table import Table
from rounds import alternate, spread, timed

import coatnet
from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.inference.batch.run import predict_to_file
from coatnet.inference.batch.samples import SampleSource, open_samples, prepare_ahead
from coatnet.inference.predictor import Predictor
from coatnet.system.hardware import num_cores


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    model = coatnet.create_model(arguments.model, num_classes=1000, resolution=arguments.resolution).eval()
    classes = tuple(f"class {number}" for number in range(1000))
    bundle = Bundle(model, classes, Preprocessing(resolution=arguments.resolution))
    predictor = Predictor(bundle, arguments.engine, arguments.precision)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs((folder / "images" / f"{number}.jpg" for number in range(arguments.images)), 500, 375)
        images = open_samples([str(folder / "images")])
        first = prepare_ahead(predictor, images, range(min(64, len(images))), 128)
        prepared = [each.views for each in first if each.views is not None]
        batch = np.stack(prepared)[np.arange(arguments.batch_size) % len(prepared)]
        outs = (folder / f"{number}.parquet" for number in itertools.count())
        works = {
            "engine": partial(engine_alone, predictor, batch, arguments.images),
            "decoding": partial(decoding_alone, predictor, images, arguments.batch_size),
            "whole": lambda: predict_to_file(predictor, images, next(outs), batch_size=arguments.batch_size),
        }
        seconds = alternate({name: timed(work) for name, work in works.items()}, arguments.rounds, warming=1)
    show(predictor, {name: [arguments.images / each for each in taken] for name, taken in seconds.items()}, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coatnet-0")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds; the medians are printed")
    return parser.parse_args()


def engine_alone(predictor: Predictor, batch: np.ndarray, number: int) -> None:
    for first in range(0, number, len(batch)):
        predictor.probabilities(batch[: number - first])


def decoding_alone(predictor: Predictor, images: SampleSource, batch_size: int) -> None:
    for _ in prepare_ahead(predictor, images, range(len(images)), 2 * batch_size):
        pass


def show(predictor: Predictor, works: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    rates = {work: statistics.median(values) for work, values in works.items()}
    ratios = [all_of_it / engine for all_of_it, engine in zip(works["whole"], works["engine"], strict=True)]
    possible = 1 / (1 / rates["engine"] + 1 / rates["decoding"])
    name = f"{arguments.model} at {arguments.resolution}, {predictor.engine.name} {predictor.engine.precision}"
    table = Table(name, "images/s", "of the engine's")
    table.add_row("the engine alone", f"{rates['engine']:.1f}", "")
    table.add_row("reading and decoding alone", f"{rates['decoding']:.0f}", "")
    table.add_row("the whole", f"{rates['whole']:.1f}", spread(ratios, ".1%", between="-"))
    table.add_row("at best, with shared cores", f"{possible:.1f}", f"{possible / rates['engine']:.1%}")
    console = Console(width=120)
    console.print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(
        f"{arguments.images:,} JPEGs of 500 x 375, batches of {arguments.batch_size}; {num_cores()} cores, "
        f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}; peak memory {peak:,.0f} MB"
    )


if __name__ == "__main__":
    main()
