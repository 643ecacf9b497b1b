"""Two garments that arrive later, with ten images each: `coatnet extend` beside training everything again.

A network learns eight of the ten classes of Fashion-MNIST. The two others, of which it never saw an image, are added
from ten images each, drawn anew for every seed. Beside it the same network is trained again from nothing, on the old
images and the ten, each class drawn equally often. Held-out images: 1,000 of each class with `--data fashion-mnist`.

    python benchmarks/extend.py --epochs 6 --seeds 3
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

import coatnet
from coatnet.data.datasets import ArrayDataset, JoinedDataset
from coatnet.data.splits import Splits
from coatnet.evaluation.metrics import wilson_interval

ARRIVING = (("Sneaker", "Bag"), ("Shirt", "Trouser"), ("Coat", "Sandal"))  # by seed, one hard and one easy
FEW = 10


def part(dataset, classes: tuple[str, ...], few: int | None, seed: int) -> ArrayDataset:
    """The images of some classes; `few` of each, drawn by the seed."""
    numbers, generator = [dataset.classes.index(name) for name in classes], np.random.default_rng(seed)
    found = [np.flatnonzero(dataset.labels == number) for number in numbers]
    rows = np.concatenate([each if few is None else generator.choice(each, few, replace=False) for each in found])
    labels = np.concatenate([np.full(len(each) if few is None else few, k) for k, each in enumerate(found)])
    return ArrayDataset(dataset.name, classes, np.asarray(dataset.images)[rows], labels, rows)


def top1(bundle, dataset) -> str:
    figures = coatnet.evaluate(bundle, dataset).figures
    n = figures["n"]
    low, high = wilson_interval(round(figures["top1"] * n), int(n))
    return f"{100 * figures['top1']:5.2f} % ({100 * low:.1f} to {100 * high:.1f}, n = {n:,})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist-small")
    parser.add_argument("--model", default="coatnet-femto-64")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    whole, quiet = coatnet.open_dataset(given.data), Console(quiet=True)
    for seed in range(given.seeds):
        arriving = ARRIVING[seed % len(ARRIVING)]
        old = tuple(name for name in whole.classes if name not in arriving)
        known = Splits("old", part(whole.training, old, None, 0), part(whole.validation, old, None, 0))
        new = Splits("new", part(whole.training, arriving, FEW, seed), part(whole.validation, arriving, None, 0))
        options = {"model": given.model, "epochs": given.epochs, "seed": seed}
        with tempfile.TemporaryDirectory() as folder:
            coatnet.train(coatnet.Recipe(data="old", **options), Path(folder) / "old", splits=known, console=quiet)
            started = time.perf_counter()
            found = coatnet.extend(Path(folder) / "old", new, old=known)
            seconds = time.perf_counter() - started
            everything = (*old, *arriving)
            joined = Splits(
                "all",
                JoinedDataset("all", everything, [known.training, new.training]),
                JoinedDataset("all", everything, [known.validation, new.validation]),
            )
            started = time.perf_counter()
            recipe = coatnet.Recipe(data="all", balance="sampler", **options)
            coatnet.train(recipe, Path(folder) / "all", splits=joined, console=quiet)
            retrained, again = coatnet.load(Path(folder) / "all"), time.perf_counter() - started
            print(f"seed {seed}, {' and '.join(arriving)} arrive with {FEW} images each", flush=True)
            print(f"  extend, {seconds:.0f} s: {found.method}")
            print(f"    old classes {found.before} -> {found.after}, of all ten; new classes {found.new}")
            print(f"    all ten     {top1(found.bundle, joined.validation)}")
            print(f"  everything trained again, {again:.0f} s")
            print(f"    old classes {top1(retrained, known.validation)}; new classes {top1(retrained, new.validation)}")
            print(f"    all ten     {top1(retrained, joined.validation)}", flush=True)


if __name__ == "__main__":
    main()
