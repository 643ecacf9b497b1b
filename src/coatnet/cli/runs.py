"""`coatnet runs`: the runs in a folder with their figures."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from coatnet.cli.parser import Parser
from coatnet.errors import UserError, counted, first_line
from coatnet.system.terminal import echo

MAX_DEPTH = 3  # chosen: runs/project/run
PROBE_FILES = ("report.json", "bundle/config.json")  # of `probe --out`, which writes no recipe.yaml


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "runs",
        "List the runs of `train` and the models of `probe --out` in a folder, the best first: model, data, accuracy\n"
        "on the held-out images with its 95 % interval, number of these images, epochs, minutes, and whether a run is\n"
        "finished or can be resumed.",
        "examples:\n  coatnet runs runs\n  coatnet runs runs --json",
    )
    parser.add_argument("folder", metavar="FOLDER", help="where the folders of runs lie, up to three levels deep")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, for a program")
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Print the runs in a folder."""
    given = parse_arguments(arguments)
    from coatnet.system.document import Document, Section, Table, show
    from coatnet.system.files import user_path

    folder = user_path(given.folder)
    if not folder.is_dir():
        raise UserError(f"{given.folder} is not a folder: give the one in which the folders of runs lie, such as runs")
    found = sorted(
        map(describe_run, find_runs(folder)), key=lambda each: (each["value"] is None, -(each["value"] or 0))
    )
    if not found:
        raise UserError(
            f"{given.folder} holds no run up to {MAX_DEPTH} levels deep: a run has a recipe.yaml, a probe "
            f"{' and '.join(PROBE_FILES)}"
        )
    for each in found:
        each["run"] = os.path.relpath(each["run"], folder)
    if given.json:
        echo(json.dumps(found, indent=1), is_json=True)
        return 0
    header = ("run", "model", "data", "figure", "95 % interval", "images", "epochs", "minutes", "state")
    table = Table(header, [_row(each) for each in found], (3, 4, 5, 6, 7))
    show(Document(f"Runs in {given.folder}", counted(len(found), "run"), [Section("", [table])]))
    return 0


def find_runs(folder: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """Yield the folders of runs and probes, in the order of their names; nothing is searched below them, nor in
    folders below the first that may not be read."""
    if (folder / "recipe.yaml").is_file() or all((folder / name).is_file() for name in PROBE_FILES):
        yield folder
    elif depth:
        with os.scandir(folder) as entries:
            below = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
        for path in below:
            with suppress(PermissionError):
                yield from find_runs(Path(path), depth - 1)


def describe_run(folder: Path) -> dict[str, Any]:
    """What the files of a run or probe say of it; None for what they do not say.

    `figure` names the figure that is `value`, `interval` is its 95 % interval, `state` is finished, "can be resumed",
    or what is wrong with a file.
    """
    from coatnet.bundle.bundle import place_name
    from coatnet.evaluation.plots import read_series
    from coatnet.study.record import FIGURES
    from coatnet.system.json_reader import read_json, read_json_object
    from coatnet.training.config import read_yaml

    keys = ("model", "data", "figure", "value", "interval", "n", "epochs", "minutes")
    found: dict[str, Any] = {"run": str(folder), **dict.fromkeys(keys), "state": "can be resumed"}
    try:
        if (folder / "recipe.yaml").is_file():
            recipe = read_yaml(folder / "recipe.yaml")
        else:
            recipe = read_json_object(folder / "bundle" / "config.json")["record"].get("probe") or {}
        found |= {"model": recipe.get("model"), "data": recipe.get("data") and place_name(str(recipe["data"]))}
        if (folder / "metrics.jsonl").is_file():
            seconds = read_series(folder / "metrics.jsonl", "seconds")
            if len(seconds):
                found |= {"epochs": round(float(seconds[-1, 0]), 2), "minutes": round(float(seconds[-1, 1]) / 60, 2)}
        if (folder / "report.json").is_file() and (folder / "bundle").is_dir():
            found |= {"state": "finished", **_figures(read_json(folder / "report.json"))}
        elif (folder / FIGURES).is_file():  # of a study, which keeps no more of its runs
            found |= {"state": "finished", **_study_figures(read_json(folder / FIGURES))}
    except (UserError, OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        found["state"] = f"damaged: {first_line(error)}"
    return found


def data_of(folder: Path) -> str | None:
    """The data of a run, by its folder or one inside it, such as its bundle; None if there is no recipe."""
    from coatnet.training.config import read_yaml

    for file in (folder / "recipe.yaml", folder.resolve().parent / "recipe.yaml"):
        if file.is_file():
            return str(read_yaml(file).get("data", "")) or None
    return None


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    figures = report["figures"]
    name = "top1" if "top1" in figures else "mean_average_precision"
    interval = report["intervals"].get(name)
    return {
        "figure": name,
        "value": float(figures[name]),
        "interval": interval and [float(bound) for bound in interval],
        "n": int(figures["n"]),
    }


def _study_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    from coatnet.evaluation.metrics import wilson_interval
    from coatnet.study.record import Figures

    figures = Figures(**result["figures"])
    interval = wilson_interval(round(figures.top1 * figures.n), figures.n)
    return {"figure": "top1", "value": figures.top1, "interval": list(interval), "n": figures.n}


def _row(each: Mapping[str, Any]) -> list[str]:
    low_high = " to ".join(f"{100 * bound:.1f}" for bound in each["interval"] or ())
    value = "" if each["value"] is None else f"{100 * each['value']:.1f} %" + " mAP" * (each["figure"] != "top1")
    numbers = (
        "" if each[name] is None else f"{each[name]:,.{digits}f}"
        for name, digits in (("n", 0), ("epochs", 1), ("minutes", 1))
    )
    return [each["run"], each["model"] or "", each["data"] or "", value, low_high, *numbers, each["state"]]
