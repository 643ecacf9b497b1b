"""What pretraining gives: five classes of Fashion-MNIST from few images, from scratch and from the other five.

    python benchmarks/transfer.py --out runs/transfer          # some twenty minutes on two cores

Pretraining sees every other class (30,000 images). The rest are then learned from 10, 50 and 250 images a class
with the default recipes, `scratch` and `finetune`, and by a linear probe on frozen features, all on the same images;
each figure is the mean over several draws of images, measured on the 5,000 test images.
Everything goes through image folders, as a user's own images would. Runs that are finished are not repeated.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

import coatnet
from coatnet.data.datasets import Dataset
from coatnet.evaluation.probe import probe
from coatnet.system.files import atomic_folder
from coatnet.training.recipes import named_recipe

KNOWN, NEW = range(0, 10, 2), range(1, 10, 2)
IMAGES = (10, 50, 250)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="or fashion-mnist-small, for a quick look")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--pretraining-minutes", type=float, default=4.0)
    parser.add_argument("--draws", type=int, nargs=len(IMAGES), default=[3, 1, 1], help="for 10, 50 and 250 images")
    parser.add_argument("--epochs", type=float, help="of every run on the new classes; the recipes' own by default")
    arguments = parser.parse_args()
    splits = coatnet.open_dataset(arguments.data)

    known = write_folder(splits, KNOWN, None, 0, arguments.out / "fashion-mnist-known")
    pretrained = arguments.out / "pretrained"
    run("scratch", known, pretrained, max_minutes=arguments.pretraining_minutes)
    bundle = pretrained / "bundle"

    table = Table("images a class", "draws", "from scratch", "fine-tuned", "linear probe")
    for number, draws in zip(IMAGES, arguments.draws, strict=True):
        figures: dict[str, list[float]] = {"scratch": [], "finetune": [], "probe": []}
        for draw in range(draws):
            folder = write_folder(splits, NEW, number, draw, arguments.out / f"fashion-mnist-new-{number}-{draw}")
            name, more = f"{number}-{draw}", {"epochs": arguments.epochs} if arguments.epochs else {}
            figures["scratch"].append(run("scratch", folder, arguments.out / f"scratch-{name}", **more))
            start = {"init": str(bundle), **more}
            figures["finetune"].append(run("finetune", folder, arguments.out / f"finetune-{name}", **start))
            figures["probe"].append(probe(coatnet.load(bundle), folder, k=5).linear)
        table.add_row(str(number), str(draws), *(mean_and_range(values) for values in figures.values()))
    Console(width=110).print(table)


def run(recipe: str, data: Path, out: Path, **changes: object) -> float:
    """Top-1 of one training, a fraction."""
    changes = {"data": str(data), "num_workers": 0, "evaluate_every": 1e9, **changes}
    changes["augmentation"] = {"flip_rate": 0.5}  # as in the recipe fashion-mnist: a mirrored garment is one
    return coatnet.train(named_recipe(recipe, changes), out).figures["top1"]


def write_folder(splits: object, classes: range, number: int | None, draw: int, folder: Path) -> Path:
    """An image folder of these classes: `number` images of each to learn from (all if None), and all test ones."""
    for split, most in (("train", number), ("val", None)):
        dataset: Dataset = splits.training if split == "train" else splits.validation
        for label in classes:
            target = folder / split / dataset.classes[label].replace("/", "-")
            if target.is_dir():
                continue
            found = np.flatnonzero(dataset.labels == label)
            with atomic_folder(target) as staged:
                for index in np.random.default_rng(draw).permutation(found)[:most].tolist():
                    Image.fromarray(dataset.read(index)[0]).save(staged / f"{index:05d}.png")
    return folder


def mean_and_range(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f} %"
    return f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
