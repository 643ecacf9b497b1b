"""Two garments that arrive later, with ten images each: `coatnet extend` beside training everything again.

A network learns eight of the ten classes of Fashion-MNIST. The two others, of which it never saw an image, are added
from ten images each, drawn several times. Beside it the same network is trained again from nothing, on the old
images and the ten, each class drawn equally often. Held-out images: 1,000 of each class with `--data fashion-mnist`.

    python benchmarks/extend.py --epochs 5 --resolution 32 --seeds 0 1 --runs runs
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
    parser.add_argument("--data", default="fashion-mnist-small", choices=("fashion-mnist-small", "fashion-mnist"))
    parser.add_argument("--model", default="coatnet-femto-64")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="networks; each has its own two garments"
    )
    parser.add_argument("--draws", type=int, default=3, help="of the ten images, for each network")
    parser.add_argument("--retrain", type=int, default=1, help="draws for which everything is trained again as well")
    parser.add_argument("--max-drop", type=float, default=0.01, help="as of `coatnet extend`")
    parser.add_argument("--runs", type=Path, help="where the networks of eight classes are kept, and found again")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            measure(given, seed, given.runs or Path(folder), Path(folder))


def measure(given: argparse.Namespace, seed: int, runs: Path, folder: Path) -> None:
    """Train the network of a seed, as far as it is not there, and extend it with each draw."""
    whole, quiet, arriving = coatnet.open_dataset(given.data), Console(quiet=True), ARRIVING[seed % len(ARRIVING)]
    old = tuple(name for name in whole.classes if name not in arriving)
    known = Splits("old", part(whole.training, old, None, 0), part(whole.validation, old, None, 0))
    options = {"model": given.model, "resolution": given.resolution, "epochs": given.epochs, "seed": seed}
    run = runs / "-".join(str(each) for each in (given.data, *options.values()))
    coatnet.train(coatnet.Recipe(data="old", **options), run, splits=known, console=quiet)
    for draw in range(given.draws):
        new = Splits("new", part(whole.training, arriving, FEW, draw), part(whole.validation, arriving, None, 0))
        started = time.perf_counter()
        found = coatnet.extend(run, new, old=known, max_drop=given.max_drop)
        seconds = time.perf_counter() - started
        assert found.report is not None
        print(f"{given.data}, seed {seed}, draw {draw}: {' and '.join(arriving)} arrive with {FEW} images each")
        print(f"  extend, {seconds:.0f} s: {found.method}, new logits lowered by {found.lowered:.2g}")
        print(f"    old classes {found.before} -> {found.after}, of all ten; new classes {found.new}")
        print(f"    all ten     {100 * found.report.figures['top1']:.2f} %", flush=True)
        if draw < given.retrain:
            everything = (*old, *arriving)
            joined = Splits(
                "all",
                JoinedDataset("all", everything, [known.training, new.training]),
                JoinedDataset("all", everything, [known.validation, new.validation]),
            )
            started = time.perf_counter()
            recipe = coatnet.Recipe(data="all", balance="sampler", **options)
            coatnet.train(recipe, folder / f"all-{seed}-{draw}", splits=joined, console=quiet)
            again, seconds = coatnet.load(folder / f"all-{seed}-{draw}"), time.perf_counter() - started
            print(f"  everything trained again, {seconds:.0f} s")
            print(f"    old classes {top1(again, known.validation)}; new classes {top1(again, new.validation)}")
            print(f"    all ten     {top1(again, joined.validation)}", flush=True)


if __name__ == "__main__":
    main()
