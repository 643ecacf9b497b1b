"""The folder of a study: held by those who make it, opened with its plan, and extended by what is asked anew."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from coatnet.data.open import data_path
from coatnet.data.splits import Splits
from coatnet.errors import UserError, counted
from coatnet.study.plan import Options, content_of, own_question, parse_sizes, plan_study, run_of
from coatnet.study.questions import Question
from coatnet.study.record import PAGES, RECORD, Study
from coatnet.study.run import Part
from coatnet.system.files import file_lock, only_process, output_path, translate_write_errors
from coatnet.training.config import Recipe
from coatnet.training.defaults import default_learning_rate, open_splits


@contextmanager
def hold_study(folder: Path, part: Part) -> Iterator[None]:
    """Hold a part of a study, whose study.json only holders of parts write; folders that stay empty are removed.

    Raises:
        UserError: another process makes the same part or divides the runs into another number of parts, or the folder
            is that of something else.
    """
    _require_study(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with translate_write_errors(folder, "choose another folder for out"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with only_process(folder / part.lock, doing := f"making the study in {folder}"):
            for other in folder.glob(".lock*"):
                if other.name != part.lock and not other.name.endswith(f"-of-{part.count}"):
                    with only_process(other, doing):  # what a killed process has left is removed
                        pass
            yield
    finally:
        for each in made:
            with suppress(OSError):  # it holds the study, or what another part has made
                each.rmdir()


def _require_study(folder: Path) -> None:
    """Raises UserError for what is neither the folder of a study, nor new, nor holds the runs of a lost study.json."""
    if (folder / RECORD).exists() or not folder.exists():
        return
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")] if folder.is_dir() else [""]
    others = [name for name in names if name not in ("runs", *PAGES) and not name.startswith(RECORD)]
    if others or (names and "runs" not in names):
        raise UserError(f"{folder} exists and is not the folder of a study: choose a new folder for out")


def open_study(options: Options, folder: Path, say: Callable[[str], None], *, dry_run: bool = False) -> Study:
    """The study in a folder, with the plan of its first start, extended by new sizes, seeds and learning rates.

    It writes study.json, unless it is a dry run: the caller then has a part of the study by `hold_study`.

    Raises:
        UserError: the folder holds another study, or something else.
    """
    folder = output_path(folder)
    if dry_run:
        _require_study(folder)
        if (folder / RECORD).exists():
            return _extended(Study.read(folder), options, folder)
        return plan_study(options, folder, say)
    options.check()
    lock = folder / ".study.lock"
    with file_lock(lock):  # other parts of the study wait for its plan
        try:
            before = Study.read(folder) if (folder / RECORD).exists() else None
            study = plan_study(options, folder, say) if before is None else _extended(before, options, folder)
            if study != before:
                study.write(folder)
        except UserError:
            if not (folder / RECORD).exists():
                lock.unlink(missing_ok=True)
            raise
    return study


def _extended(study: Study, options: Options, folder: Path) -> Study:
    """A study with the runs of new sizes, seeds and learning rates. Raises UserError if it is another one."""
    options.check()
    study.require_plan(folder)
    steps = study.asked["planned_steps"]
    if options.steps == steps:  # as the command of an extended study has them, whatever they were planned by
        durations: dict[str, Any] = {name: study.asked.get(name) for name in ("steps", "epochs", "minutes")}
        options = replace(options, **durations)
    asked, data = dict(study.asked), data_path(options.data)
    # Earlier releases kept the path as it was typed; and images and study may have moved together.
    if options.data == study.data or data == data_path(str(asked.get("data"))):
        asked["data"] = data
        if Path(data).is_absolute():  # else a name, or the images are gone
            study = replace(study, asked=asked, recipe={**study.recipe, "data": data})
    for name, value in options.asked().items():
        if asked.get(name) != value:
            raise UserError(
                f"{folder} holds a study with {name} {asked.get(name, 'not given')}, not {value}: give the same "
                "to go on, or another folder for a new study"
            )
    for name in ("steps", "epochs", "minutes", "model", "resolution"):
        if name in study.asked and name not in options.asked():
            raise UserError(f"{folder} holds a study with {name} {study.asked[name]}: give the same to go on")
    if (own := own_question(options)) is not None:
        if differences := _differences(study, own):
            raise UserError(
                f"{folder} holds the study of another {options.question}: {differences}; give the file as it was to "
                "go on, or another folder for a new study"
            )
        study = replace(study, title=own.title)
    sizes, splits = (), None
    if options.sizes:
        splits = _open(study)
        sizes = parse_sizes(options.sizes, splits)
    # A rate that is shown the same is the same, such as the default rate copied from the plan.
    rates = {f"{rate:g}": rate for rate in (*options.learning_rates, *study.learning_rates)}
    wider = replace(
        study,
        sizes=tuple(sorted({*study.sizes, *sizes})),
        seeds=tuple(range(max(len(study.seeds), options.seeds or 0))),
        learning_rates=tuple(sorted(rates.values())),
    )
    if wider != study:
        wider = replace(wider, command=_command(wider, folder))
    before = {run.folder: run for run in study.runs}
    planned: dict[str, list[float]] = {}
    for run in study.runs:
        planned.setdefault(run.member, []).append(run.seconds)
    runs = []
    for seed, size, rate, member in product(wider.seeds, wider.sizes, wider.learning_rates, wider.members):
        seconds = sum(planned[member.name]) / len(planned[member.name])
        run = run_of(wider, member.name, size, seed, rate, steps, seconds)
        runs.append(before.get(run.folder, run))
    if any(run.status != "finished" for run in runs):  # of a finished study the images may be gone
        splits = splits or _open(study)
        _require_same_images(study, splits, folder)
        wider = replace(wider, content=content_of(splits))
    return replace(wider, runs=tuple(runs))


def _open(study: Study) -> Splits:
    """The images of a study. Raises UserError as `open_dataset`."""
    return open_splits(Recipe.from_dict(study.recipe), lambda text: None)[1]


def _require_same_images(study: Study, splits: Splits, folder: Path) -> None:
    """Raise UserError if the images are others than when the study began: its runs could not be compared."""
    found = []
    for split, now in content_of(splits).items():
        before, what = study.content.get(split, now), "held-out" if split == "validation" else split
        if before.images != now.images:
            found.append(f"{now.images:,} {what} images where it had {before.images:,}")
        elif before != now:
            found.append(f"other names or labels of its {what} images")
    if found:
        raise UserError(
            f"{folder} holds a study of other images: {study.data} now has {' and '.join(found)}; undo that to go on, "
            "or give another folder for a new study"
        )


def _differences(study: Study, question: Question) -> str:
    """In what a YAML file is not the one that a study was planned by; empty if in nothing."""
    now = question.asked()
    before = study.asked.get("file")
    if before is None:  # earlier releases kept what became of the members
        kept = {member.name: {**member.changes, "variations": None} for member in study.members}
        before = {"members": kept}
        now["members"] = {name: {**values, "variations": None} for name, values in now["members"].items()}
    old, new = before["members"], now["members"]
    found = [f"member {name} is gone" for name in old if name not in new]
    found += [f"member {name} is new" for name in new if name not in old]
    found += [f"member {name} has other values" for name in new if name in old and new[name] != old[name]]
    if not found and list(new) != list(old):
        found.append("its members are in another order")
    found += [f"{name} differs" for name in ("recipe", "match") if name in before and now[name] != before[name]]
    return ", ".join(found[:4]) + (f" and {counted(len(found) - 4, 'more difference')}" if len(found) > 4 else "")


def _command(study: Study, folder: Path) -> str:
    """The command that makes a whole study with the steps of its plan, also on a machine of another speed."""
    names = {each.name for each in fields(Options)}.difference(("steps", "epochs", "minutes"))
    asked = {name: value for name, value in study.asked.items() if name in names}
    options = Options(**asked | {"data": study.data})
    default = (default_learning_rate(options.batch_size),)
    options = replace(
        options,
        sizes=tuple(map(str, study.sizes)),
        seeds=len(study.seeds),
        steps=study.asked["planned_steps"],
        learning_rates=() if study.learning_rates == default else study.learning_rates,
    )
    return options.command(folder)
