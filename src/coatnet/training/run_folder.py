"""A run folder: recipe, log and checkpoints of one run and, at its end, the report and the bundle."""

import errno
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from coatnet.bundle.timm.selection import AUTO, is_choice
from coatnet.errors import UserError, shorten
from coatnet.system.files import (
    MAX_LOG_BYTES,
    atomic_write,
    is_leftover,
    only_process,
    open_regular,
    output_path,
    read_regular,
    remove_leftovers,
    require_outside,
)
from coatnet.system.json_reader import read_json
from coatnet.training.checkpoint import RUN_STATE, latest_checkpoint, published
from coatnet.training.config import FROM_FILE, MAY_CHANGE, REQUIRED, Recipe, TrainingConfig, merge
from coatnet.training.recipes import find_recipe

LENGTH = ("epochs", "max_minutes", "patience")  # what decides how long a run is
FOLDS = "folds"  # folder of the runs of a cross-validation
LOCK = ".lock"  # in the folder while a process trains in it


class RunFolder:
    """The folder of a run; made by `start`, so that a run that cannot begin leaves nothing.

    Attributes:
        stored: The recipe in the folder; None without one.
        resumed: The same where a run has saved something, which is to be resumed; else None.
        given: The recipe that was given; for a run to be resumed, what it leaves open as in that run.
        warn: Takes a line about what cannot be written, for the user.
        notes: What `check_config` found different and took, in a line each.
        report_notes: What a reader of the report should know of the start, in a sentence each.
    """

    def __init__(self, path: str | Path, given: Recipe) -> None:
        """Raises UserError if the folder holds anything but a run, or is not a folder."""
        self.path = output_path(path)
        self.checkpoints = self.path / "checkpoints"
        self.bundle = self.path / "bundle"
        self.metrics = self.path / "metrics.jsonl"
        self.tuning = self.path / "tuning.json"
        self._recipe_file, self._classes_file = self.path / "recipe.yaml", self.path / "classes.json"
        self._images_file, self._images = self.path / "images.json", {}
        self.notes: list[str] = []
        self.report_notes: list[str] = []
        self._held: ExitStack | None = None
        self._log_failed = False
        self.warn: Callable[[str], None] = warnings.warn
        self.stored = Recipe.from_yaml(self._recipe_file) if self._recipe_file.exists() else None
        if self.stored is None and self.path.exists() and not (self.path.is_dir() and self._is_empty()):
            raise UserError(f"{self.path} exists and is not the folder of a run: choose a new folder for out")
        # A run that has saved nothing has nothing to lose: it begins anew, such as with smaller batches.
        self.resumed = self.stored if self.bundle.exists() or published(self.checkpoints) else None
        self.given = given if self.resumed is None else fill_from(self.resumed, given)
        if self.resumed is not None and given.init == AUTO and not is_choice(self.resumed.init or ""):
            raise UserError(
                f"{self.path} holds a run with {difference('init', self.resumed.init or '', AUTO)}: "
                "give the same to resume it, or another folder for a new run"
            )

    def _is_empty(self) -> bool:
        """Whether nothing is in the folder but what a process left that was killed before it wrote the recipe."""
        return all(
            entry.name == LOCK
            or entry.name.startswith(("tuning.", "teacher-"))  # a search comes before its run
            or entry.name == FOLDS  # so does cross-validation
            or (entry.name.startswith(".") and is_leftover(entry.name))
            for entry in self.path.iterdir()
        )

    def hold(self) -> None:
        """Take the folder, which is there, for this process until `release`.

        Raises:
            UserError: another process is training in it.
            OSError: the disk refuses.
        """
        if self._held is None:
            held = ExitStack()
            held.enter_context(only_process(self.path / LOCK, f"training in {self.path}"))
            self._held = held

    def release(self) -> None:
        """Let other processes train in the folder."""
        if self._held is not None:
            self._held.close()
            self._held = None

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end, and the configuration that `check_config` took makes it no longer."""
        as_long = all(getattr(self._before, name, None) == getattr(self.config, name) for name in LENGTH)
        return as_long and (self.path / "report.json").exists() and self.bundle.exists()

    @property
    def tuned(self) -> bool:
        """Whether the values that a search in this folder found are those of its run."""
        try:
            values = read_json(self.tuning)["values"]
            ours = self.config.to_dict()
            return self.tuning.exists() and merge(ours, values) == ours
        except (UserError, LookupError, TypeError, ValueError):
            return False

    def check_config(
        self, config: TrainingConfig, classes: Sequence[str], images: Mapping[str, Any] | None = None
    ) -> TrainingConfig:
        """Take the configuration, the classes and the images, as `Splits.content` describes them.

        Raises UserError if the folder's run has saved something and was started with others, or if the folder lies
        among its images.
        """
        self.config, self._classes, self._images = config, list(classes), dict(images or {})
        self._before = None if self.resumed is None else configuration_before(self.resumed, config)
        require_outside(self.path, config.data)
        if self._before is None:
            return config
        self._before = before = self._compare_images(self._before)
        ours, theirs = config.to_dict(), before.to_dict()
        for name in ours:
            same = ours[name] == theirs[name] or (name == "cache" and "none" not in (ours[name], theirs[name]))
            if not same and name not in MAY_CHANGE:
                raise UserError(
                    f"{self.path} holds a run with {difference(name, theirs[name], ours[name])}: "
                    "give the same to resume it, or another folder for a new run"
                )
        if config.epochs < before.epochs:
            raise UserError(f"{self.path} holds a run of {before.epochs} epochs, which can only be extended")
        if self._classes_file.exists():
            self._compare_classes(read_json(self._classes_file))
        return config

    def _compare_images(self, before: TrainingConfig) -> TrainingConfig:
        """What the run was started with, with the data's new place if the same images lie there. Raises UserError."""
        data, then = self.config.data, read_json(self._images_file) if self._images_file.exists() else None
        if data == before.data:
            if then not in (None, self._images):
                self.notes.append(
                    f"the images of {data} are others than when the run began: {_numbers(self._images)} now, "
                    f"{_numbers(then)} then; the run goes on with those of now, unlike one that never stopped"
                )
            return before
        if then is not None and then == self._images:
            self.notes.append(f"the images of {before.data} are now those of {data}, with the same names")
            return replace(before, data=data)
        found = f" with other images, {_numbers(self._images)} where it had {_numbers(then)}" if then else ""
        raise UserError(
            f"{self.path} holds a run with data {before.data}, not {data}{found}: give the same to resume it, or "
            "another folder for a new run"
        )

    def _compare_classes(self, before: Any) -> None:
        """Raises UserError unless they are the same: the rows of the classifier belong to them by their order."""
        if before == self._classes:
            return
        if not isinstance(before, list) or not all(isinstance(name, str) for name in before):
            raise UserError(f"{self._classes_file} is damaged: it is not a list of names; give another folder")
        now, then = set(self._classes), set(before)
        gone, new = [name for name in before if name not in now], [name for name in self._classes if name not in then]
        found = [f"without {shorten(gone)}"] * bool(gone) + [f"with the new {shorten(new)}"] * bool(new)
        raise UserError(
            f"{self.path} holds a run on {len(before)} classes, but {self.config.data} is now "
            f"{' and '.join(found) or 'in another order'}: undo that to resume it, or give another folder for a new run"
        )

    def start(self) -> None:
        """Make the folder, take it for this process, and write recipe and classes into it.

        Raises UserError if it cannot be written, or holds a trained model without a checkpoint to go on from.
        """
        if self.bundle.exists() and latest_checkpoint(self.checkpoints, lambda text: None, state_has=RUN_STATE) is None:
            raise UserError(
                f"{self.path} holds a trained model, and no checkpoint to go on from: give another folder for a new "
                f"run, which init {self.bundle} would start from this model"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.hold()
            if self.stored is None and self._recipe_file.exists():
                raise UserError(
                    f"another process has begun a run in {self.path} meanwhile: give another folder for out"
                )
            remove_leftovers(self.path, only_hidden=True)
            (self.path / "report.json").unlink(missing_ok=True)  # it marks an end, and an extended run has another
            atomic_write(self._recipe_file, relative_to(self.config, self.path).to_yaml())
            atomic_write(self._classes_file, json.dumps(self._classes, ensure_ascii=False))
            if self._images:
                atomic_write(self._images_file, json.dumps(self._images))
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): choose another folder for out"
            ) from None

    def log(self, record: Mapping[str, Any]) -> None:
        """One JSON line in metrics.jsonl; a log that cannot be written costs its line, and `warn` gets the reason once.

        Of a line that is written in part nothing stays.
        """
        line = (json.dumps(dict(record)) + "\n").encode()
        try:
            with open(self.metrics, "ab", buffering=0, opener=open_regular) as file:
                end = file.seek(0, os.SEEK_END)
                try:
                    written = file.write(line)
                    if written != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            if not self._log_failed:
                self.warn(f"{self.metrics} cannot be written ({error.strerror}); the run goes on without its lines")
            self._log_failed = True
            with suppress(OSError):
                self.path.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`, where a resumed run goes on, and what interrupted saves have left.

        A run that was killed after its last step saves no more, and nothing else would remove them.
        """
        with suppress(OSError):
            remove_leftovers(self.checkpoints)
        try:
            lines = read_regular(self.metrics, MAX_LOG_BYTES).decode(errors="replace").splitlines()
            atomic_write(self.metrics, "".join(line + "\n" for line in lines if _step_of(line) <= step))
        except FileNotFoundError:
            pass
        except OSError as error:  # `log` says so
            self.warn(f"{self.metrics} cannot be read ({error.strerror or error})")


def cross_validated(folder: RunFolder) -> list[str]:
    """What a cross-validation in the folder of a run has found, in a line, if there was one."""
    report = folder.path / FOLDS / "report.json"
    return [f"{read_json(report)['headline']}; {FOLDS}/report.md has the rest."] if report.exists() else []


def _step_of(line: str) -> float:
    """The step of a line of the log; infinite for one that the process was writing when it died, or that is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def relative_to(config: TrainingConfig, folder: Path) -> TrainingConfig:
    """A configuration for a file in `folder`, which may be passed on.

    It names data, init and teacher from there, or from the user's home folder, unless they lie on another branch of the
    file system. `read_yaml` gives back the whole paths.
    """
    start, home = os.path.realpath(folder), os.path.realpath(os.path.expanduser("~"))

    def named(place: str) -> str:
        if not os.path.isabs(place):
            return place
        beside, in_home = os.path.commonpath([start, place]), os.path.commonpath([home, place]) == home != "/"
        if len(Path(beside).parts) > 2 and not (in_home and home.startswith(beside + "/")):  # chosen: deeper than /home
            return FROM_FILE + os.path.relpath(place, start)
        return f"~/{os.path.relpath(place, home)}" if in_home else place

    return replace(config, data=named(config.data), init=named(config.init), teacher=named(config.teacher))


def _numbers(images: Any) -> str:
    """`90 for training and 10 for validation`."""
    try:
        return " and ".join(f"{int(part['images']):,} for {split}" for split, part in images.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        return "unknown"


def fill_from(stored: Recipe, given: Recipe) -> Recipe:
    """What a recipe leaves open, from that of a run, so that resuming does not choose a second time.

    What may change on resumption and has a default goes back to it unless it is given again.
    """
    reset = [name for name in MAY_CHANGE if name not in REQUIRED]
    kept = {name: value for name, value in stored.to_dict().items() if name not in reset}
    kept.setdefault("cache", "none")  # as in earlier releases
    kept.setdefault("kept_together", [])  # likewise: the split stays what it was
    asked = given.to_dict()
    if given.name == Recipe.name:
        del asked["name"]  # a command without a name means this one, too
    if asked.get("init") == AUTO:
        del asked["init"]  # it has been chosen
    filled = Recipe.from_dict(kept).changed(asked)
    if given.cache == "auto":
        filled = replace(filled, cache=kept["cache"])
    open_models = (None, "auto", *([find_recipe(given.name).recipe.model] if stored.init else []))
    return replace(filled, model=stored.model) if given.model in open_models else filled


def configuration_before(stored: Recipe, config: TrainingConfig) -> TrainingConfig:
    """The configuration of a run by its file; what that leaves out is the default, or as in `config` if none exists."""
    chosen = {name: value for name, value in config.to_dict().items() if name in REQUIRED}
    del chosen["micro_batch_size"]  # earlier releases left it out where it is the whole batch
    return TrainingConfig.from_dict(chosen | stored.to_dict())


def difference(name: str, theirs: Any, ours: Any) -> str:
    """`optimizer.learning_rate 0.001, not 0.01`: the first key that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**theirs, **ours}:
            if theirs.get(key) != ours.get(key):
                return difference(f"{name}.{key}", theirs.get(key), ours.get(key))
    return f"{name} {'none' if theirs == '' else f'{theirs!s:.80}'}, not {'none' if ours == '' else f'{ours!s:.80}'}"
