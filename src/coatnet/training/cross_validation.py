"""Cross-validation: as many trainings as folds, each measured on the images that the others have learned from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from coatnet.bundle import load
from coatnet.bundle.config import readable_json
from coatnet.bundle.timm.selection import is_auto
from coatnet.data.near_duplicates import MAX_SEARCHED
from coatnet.errors import UserError, counted
from coatnet.evaluation.evaluate import combine_figures
from coatnet.evaluation.metrics import FIGURES, ClassFigures, Metrics
from coatnet.evaluation.report import Report
from coatnet.system.files import atomic_write, translate_write_errors
from coatnet.system.json_reader import read_json_object
from coatnet.system.launcher import is_main_process
from coatnet.system.terminal import escape_markdown
from coatnet.training.config import Recipe, merge
from coatnet.training.defaults import open_splits
from coatnet.training.distributed.processes import distributed_processes
from coatnet.training.progress import TrainingProgress
from coatnet.training.run import learned_from, train
from coatnet.training.run_folder import FOLDS, RunFolder

MAX_FOLDS = 100  # chosen: each is a whole training
SEARCHED = "A search (tuning.md) chose values of the recipe by some of these images: the figures are too favorable."


def cross_validate(recipe: Recipe, out: str | Path, num_folds: int, *, console: Console | None = None) -> Recipe:
    """Train on all folds but one, for each of them, in `out/folds`, and write `report.md` and `report.json` there.

    Every image is measured once, by the one model that has not learned from it; the figures are those of all images
    together. The same call resumes what was interrupted. The images of a test split are in no fold.

    Args:
        recipe: what is asked of each training.
        out: the run folder of the training that comes after it.
        num_folds: number of folds.
        console: as in `train`.

    Returns:
        The recipe for the training in `out`, with the copies that the folds kept together, or those of the run that
        `out` holds already.

    Raises:
        UserError: the images have a split of their own, there are fewer than folds, or as `train`.
    """
    if not 2 <= num_folds <= MAX_FOLDS:
        raise UserError(f"folds is {num_folds}; it must be 2 to {MAX_FOLDS}")
    folder, progress = RunFolder(out, recipe), TrainingProgress(console if is_main_process() else Console(quiet=True))
    place, reports = folder.path / FOLDS, list[Report]()
    begun = RunFolder(place / f"1-of-{num_folds}", recipe)
    if begun.resumed is not None:  # of a run before the folds, only those copies are known that its split would part
        recipe = replace(recipe, kept_together=begun.given.kept_together)
    with distributed_processes() as processes:
        recipe, splits = open_splits(replace(recipe, fold=f"1/{num_folds}"), progress.say, processes)
    num_images = len(splits.training) + len(splits.validation)
    if not len(splits.validation) or num_images < 2 * num_folds:
        raise UserError(f"{splits.name}: {counted(num_images, 'image')} are too few for {num_folds} folds")
    for name, source in (("init", recipe.init), ("teacher", recipe.teacher)):
        if source and not is_auto(source) and learned_from(load(source), recipe.data, splits):
            raise UserError(
                f"{name} {source} was trained on images of this name, {splits.name}, which the folds measure on: give "
                "a model that was not, or leave folds out"
            )
    for number in range(1, num_folds + 1):
        run = place / f"{number}-of-{num_folds}"
        fold = replace(recipe, fold=f"{number}/{num_folds}")
        fold, splits = open_splits(fold, progress.say)
        # The test is for the model that comes after the folds.
        reports.append(train(fold, run, splits=replace(splits, test=None), console=console))
    if is_main_process():
        with translate_write_errors(place):
            searched = not splits.training.in_memory and num_images <= MAX_SEARCHED
            _write(place, reports, searched=searched, tuned=_has_values_of_search(recipe, folder))
    recipe = replace(recipe, fold="")
    return recipe if folder.resumed is None else replace(recipe, kept_together=folder.given.kept_together)


def _has_values_of_search(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether the values that a search in the folder found are those of the recipe."""
    if not folder.tuning.exists():
        return False
    values = read_json_object(folder.tuning).get("values")
    return isinstance(values, Mapping) and merge(recipe.to_dict(), values) == recipe.to_dict()


def pool(metrics: Sequence[Metrics]) -> Metrics:
    """The metrics of all images of several."""
    found = Metrics(metrics[0].num_classes, metrics[0].multilabel)
    found.batches = [batch for each in metrics for batch in each.batches]
    return found


def _write(place: Path, reports: Sequence[Report], *, searched: bool, tuned: bool) -> None:
    """Put the numbers of all images together, and write the report.

    Args:
        searched: whether copies were looked for.
        tuned: whether a search on some of the images chose values of the recipe.
    """
    found = [each.metrics for each in reports if each.metrics is not None]
    ranks, probabilities = (pool(each) for each in zip(*found, strict=True))
    figures, intervals = combine_figures(ranks, probabilities if reports[0].multilabel else ranks)
    per_class = ranks.per_class()
    pooled = replace(reports[0], figures=figures, intervals=intervals)  # for its way of writing figures
    headline = f"{len(reports)}-fold cross-validation: {pooled.headline()}"
    classes = reports[0].classes
    rows = [
        f"| {FIGURES[name].title} | {pooled.format_figure(name)} | {pooled.format_interval(name)} |"
        for name in figures
        if name in FIGURES and name != "n"
    ]
    lines = [
        f"# {escape_markdown(reports[0].model)} on {escape_markdown(reports[0].data)}, {len(reports)} folds",
        f"**{headline}**",
        f"Each image was measured once, by a model that has not learned from it{' or from a copy of it' * searched}. "
        "The interval takes the images as independent; it says nothing about other trainings.",
        *([SEARCHED] if tuned else []),
        "\n".join(["| figure | all folds | 95 % interval |", "|---|---:|---:|", *rows]),
        "\n".join(f"- fold {number}: {report.headline()}" for number, report in enumerate(reports, start=1)),
        _table_of_classes(classes, per_class),
    ]
    atomic_write(place / "report.md", "\n\n".join(lines) + "\n")
    plain = {
        "headline": headline,
        "figures": figures,
        "intervals": {name: value and list(value) for name, value in intervals.items()},
        "folds": [{"headline": report.headline(), "figures": dict(report.figures)} for report in reports],
        "per_class": [{"class": name} | asdict(row) for name, row in zip(classes, per_class, strict=True)],
    }
    atomic_write(place / "report.json", readable_json(json.loads(json.dumps(plain, allow_nan=False))))


def _table_of_classes(classes: Sequence[str], per_class: Sequence[ClassFigures]) -> str:
    names = list(asdict(per_class[0]))
    rows = [
        f"| {escape_markdown(label)} | {' | '.join(_cell(getattr(row, name)) for name in names)} |"
        for label, row in zip(classes, per_class, strict=True)
    ]
    titles = " | ".join(name.replace("_", " ") for name in names)
    return "\n".join([f"| class | {titles} |", f"|---|{'---:|' * len(names)}", *rows])


def _cell(value: object) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, float) else "" if value is None else str(value)
