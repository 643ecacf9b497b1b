"""What test-time augmentation gains on held-out images, and what it costs.

    python benchmarks/views.py runs/mine --data path/to/folder
    python benchmarks/views.py runs/fashion-mnist --data fashion-mnist --views flip ten-shift

Top-1 of `Predictor` for each kind of views, the difference from one view on the same images, and the time of an image,
resizing and its views included.
"""

import argparse
import time
from contextlib import suppress

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import coatnet
from coatnet.data.datasets import Dataset
from coatnet.data.decode import BadImage
from coatnet.data.loader import read_image
from coatnet.data.splits import Splits
from coatnet.data.test_time_augmentation import NUM_VIEWS
from coatnet.data.transforms import as_images
from coatnet.evaluation.evaluate import open_recorded
from coatnet.evaluation.metrics import paired_difference, wilson_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--data", required=True)
    parser.add_argument("--views", nargs="+", choices=[name for name in NUM_VIEWS if name != "one"])
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    bundle = coatnet.load(arguments.bundle)
    splits = open_recorded(arguments.data, bundle)
    if not isinstance(splits, Splits) or splits.multilabel or splits.classes != bundle.classes:
        raise SystemExit(
            f"{arguments.data}: give images of one label each, of the classes of the model, with a validation split"
        )
    images = splits.validation
    kinds = ["one", *(arguments.views or [name for name in NUM_VIEWS if name != "one"])]
    predictors = {views: coatnet.Predictor(bundle, "torch", views=views) for views in kinds}
    found: dict[str, list[np.ndarray]] = {views: [] for views in kinds}
    seconds = dict.fromkeys(kinds, 0.0)
    warm, _ = read(images, range(min(arguments.batch_size, len(images))))
    for predictor in predictors.values() if warm else ():
        predictor.probabilities(np.stack([predictor.prepare_pixels(each) for each in warm]))
    for first in track(range(0, len(images), arguments.batch_size), "computing"):
        pixels, labels = read(images, range(first, min(first + arguments.batch_size, len(images))))
        for views, predictor in predictors.items() if pixels else ():
            started = time.perf_counter()
            prepared = np.stack([predictor.prepare_pixels(each) for each in pixels])
            found[views].append(predictor.probabilities(prepared).argmax(1) == labels)
            seconds[views] += time.perf_counter() - started

    correct = {views: np.concatenate(parts) for views, parts in found.items()}  # (N,) of each
    table = Table("views", "top-1", "95 % interval", "against one, points", "time of an image")
    for views, right in correct.items():
        low, high = (100 * bound for bound in wilson_interval(int(right.sum()), len(right)))
        least, most = (100 * bound for bound in paired_difference(right, correct["one"]))
        table.add_row(
            views,
            f"{100 * right.mean():.2f} %",
            f"{low:.2f} to {high:.2f}",
            ""
            if views == "one"
            else f"{100 * (right.mean() - correct['one'].mean()):+.2f} ({least:+.2f} to {most:+.2f})",
            f"{1000 * seconds[views] / len(right):.2f} ms ({seconds[views] / seconds['one']:.1f} times)",
        )
    Console(width=120).print(table)


def read(images: Dataset, indices: range) -> tuple[list[Tensor], np.ndarray]:
    """Decoded pixels (C, H, W) of those images that can be read, and their labels."""
    pixels, labels = [], []
    for index in indices:
        with suppress(BadImage):
            image, label = read_image(images, index)
            pixels.append(as_images(image))
            labels.append(int(label))
    return pixels, np.array(labels)


if __name__ == "__main__":
    main()
