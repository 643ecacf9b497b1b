"""How much of an error is that of one training run, and how much that of the images: several runs beside their mean.

    python benchmarks/ensemble.py runs/first runs/second runs/third --data fashion-mnist

Top-1 of each on its held-out images, top-1 of the mean of their probabilities, and how many images all of them get
wrong. What an ensemble (Lakshminarayanan et al., 2017, arXiv:1612.01474) of all does not reach, no seed is likely to.
"""

import argparse

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

import coatnet
from coatnet.bundle import Bundle
from coatnet.data.loader import BadImages
from coatnet.data.splits import Splits
from coatnet.evaluation.evaluate import open_recorded
from coatnet.evaluation.metrics import wilson_interval
from coatnet.inference import infer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="runs on the same images")
    parser.add_argument("--data", required=True)
    arguments = parser.parse_args()
    computed = [
        held_out_probabilities(coatnet.load(place), arguments.data) for place in track(arguments.bundles, "computing")
    ]
    found, labels, images = zip(*computed, strict=True)  # (N, K), (N,) and N names of each model
    if any(each != images[0] for each in images):
        raise SystemExit(f"{arguments.data}: the models hold out different images, on which no mean can be taken")
    labels = labels[0]
    predicted = np.stack([each.argmax(1) for each in found])  # (M, N)

    table = Table("model", "top-1", "95 % interval")
    names = [*arguments.bundles, f"mean of {len(found)}"]
    for name, answers in zip(names, [*predicted, np.mean(found, axis=0).argmax(1)], strict=True):
        right = int((answers == labels).sum())
        low, high = (100 * bound for bound in wilson_interval(right, len(labels)))
        table.add_row(name, f"{100 * right / len(labels):.2f} %", f"{low:.2f} to {high:.2f}")
    Console(width=100).print(table)
    wrong = (predicted != labels).all(axis=0)
    alike = wrong & (predicted == predicted[0]).all(axis=0)
    print(
        f"of {len(labels):,} images all models get {wrong.sum():,} wrong, {alike.sum():,} of them by the same class; "
        f"{(predicted != labels).any(axis=0).sum():,} are wrong by any of them"
    )


def held_out_probabilities(bundle: Bundle, data: str) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
    """Probabilities (N, K) of a model for its held-out images, their labels (N,) and names."""
    splits = open_recorded(data, bundle)
    if not isinstance(splits, Splits) or splits.multilabel or splits.classes != bundle.classes:
        raise SystemExit(
            f"{data}: give images of one label each, of the classes of the models, with a validation split"
        )
    images = splits.validation
    batches = infer(
        bundle.model,
        images,
        preprocessing=bundle.preprocessing,
        batch_size=128,
        bad_images=BadImages(len(images)),
    )
    parts = [(batch.outputs.softmax(1), batch.labels, batch.indices) for batch in batches]
    probabilities, labels, indices = (
        np.concatenate([each.numpy() for each in column]) for column in zip(*parts, strict=True)
    )
    return probabilities, labels, [images.describe(index) for index in indices.tolist()]


if __name__ == "__main__":
    main()
