"""The learning rate, batch size and epochs that `coatnet train` chooses, beside half and twice as much of each.

    python benchmarks/defaults.py --data fashion-mnist-small --model coatnet-femto-64 --epochs 4
    python benchmarks/defaults.py --data clip-art --resolution 96 --epochs 7
    python benchmarks/defaults.py --data stamps --resolution 96 --epochs 12 --seeds 0 1 2 3 4

One value is changed at a time; the rest is what the defaults make of it: with another batch size the learning rate
follows, with other epochs the warm-up and the averaging. From 25 epochs on photographs and drawings are varied more, so
twice the epochs must be fewer. All runs see the same held-out images. A run has one core, and there are as many at once
as cores. `clip-art` and `stamps` are those of time_to_accuracy.py.

OUT/results.json keeps every run, and the same command again trains what is missing. The table is of all in it: mean
accuracy over the seeds, and the difference from the defaults with its 95 % interval (paired by seed, t).
"""

import argparse
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from time_to_accuracy import FOLDERS, accuracies, difference, gather, read_results, train_ours, write_results

from coatnet.data import open_dataset
from coatnet.training.config import Recipe
from coatnet.training.defaults import resolve

DEFAULT = "as chosen"


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = (
        str(gather(arguments.data, 1.0, 1.0, arguments.out / "data")) if arguments.data in FOLDERS else arguments.data
    )
    asked = {name: getattr(arguments, name) for name in ("data", "model", "epochs", "resolution")}
    asked = {name: value for name, value in asked.items() if value is not None}
    changed = changes(asked | {"data": data})
    known = [same(each) for each in read_results(arguments.out)]
    runs = [{"asked": asked, "change": change, "seed": seed} for seed in arguments.seeds for change in changed]
    missing = [each for each in runs if same(each) not in known]
    cores = sorted(os.sched_getaffinity(0))[: arguments.jobs]
    free = iter(cores)
    # A thread and the processes that it starts have a core of their own.
    with ThreadPoolExecutor(len(cores), initializer=lambda: os.sched_setaffinity(0, {next(free)})) as pool:
        trainings = {
            pool.submit(
                train, changed[each["change"]] | {"seed": each["seed"]}, arguments.out / "runs" / folder_name(each)
            ): each
            for each in missing
        }
        try:
            for done in track(as_completed(trainings), "training", len(missing)):
                write_results(arguments.out, [*read_results(arguments.out), trainings[done] | done.result()])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print_table(read_results(arguments.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist-small", help="as of coatnet train, or clip-art or stamps")
    parser.add_argument("--model", help="the default by default")
    parser.add_argument("--epochs", type=float, help="of the runs that do not change them; the default by default")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at once")
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    return parser.parse_args()


def changes(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of the runs to compare, by what is changed in them."""
    recipe = Recipe.from_dict(given)
    chosen = resolve(recipe, open_dataset(recipe.data))
    rate, batch, epochs = chosen.optimizer.learning_rate, chosen.batch_size, chosen.epochs
    changed = {DEFAULT: {}}
    for factor in (0.5, 2):
        changed[f"learning rate x {factor:g}"] = {"optimizer.learning_rate": factor * rate}
        changed[f"batch size x {factor:g}"] = {"batch_size": round(factor * batch)}
        changed[f"epochs x {factor:g}"] = {"epochs": factor * epochs}
    return {change: given | options for change, options in changed.items()}


def same(run: dict[str, Any]) -> tuple[str, str, int]:
    """What identifies a run: what was asked, what is changed in it, and the seed."""
    return json.dumps(run["asked"], sort_keys=True), run["change"], run["seed"]


def setting(asked: dict[str, Any]) -> str:
    """What was asked, with the name of the data alone."""
    return " ".join([Path(asked["data"]).name, *(f"{name} {asked[name]}" for name in asked if name != "data")])


def folder_name(run: dict[str, Any]) -> str:
    return f"{setting(run['asked'])} {run['change']} seed{run['seed']}".replace(" ", "-")


def train(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train in a process of its own: correct answers of n, and the values that the defaults gave the run."""
    figures = train_ours([], options, folder, dict(os.environ))
    config = yaml.safe_load((folder / "recipe.yaml").read_text())
    chosen = {"batch_size": config["batch_size"], "learning_rate": config["optimizer"]["learning_rate"]}
    return {**figures, **chosen, "epochs": config["epochs"]}


def print_table(results: list[dict[str, Any]]) -> None:
    table = Table("asked", "n", "change", "batch", "rate", "epochs", "top-1 %", "seeds", "difference")
    for asked in dict.fromkeys(same(each)[0] for each in results):
        runs: dict[str, dict[int, dict[str, Any]]] = {}
        for each in results:
            if same(each)[0] == asked:
                runs.setdefault(each["change"], {})[each["seed"]] = each
        accuracy = {change: accuracies(seeds.values()) for change, seeds in runs.items()}
        for change, seeds in sorted(runs.items(), key=lambda item: (item[0] != DEFAULT, item[0])):
            one, found = next(iter(seeds.values())), accuracy[change]
            table.add_row(
                *(setting(one["asked"]), f"{one['n']:,}", change),
                *(f"{one['batch_size']}", f"{one['learning_rate']:.3g}", f"{one['epochs']:g}"),
                *(f"{statistics.mean(found.values()):.1f}", " ".join(f"{value:.1f}" for value in found.values())),
                "" if change == DEFAULT else difference(found, accuracy.get(DEFAULT, {})),
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
