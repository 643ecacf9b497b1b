"""Where a run's figures go beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow. None can stop a run."""

import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from coatnet.errors import UserError, nearest

WAITING = 1_000  # records that may wait for a logger; those beyond are left out, so that a hung one costs no memory
CLOSING_SECONDS = 10.0  # that the end of a run waits for a logger to write what it has


class Logger(Protocol):
    """What a logger is; its methods may raise whatever they like, and may take as long as they like."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Take in the recipe, once, before any figures."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in figures after optimizer step `step`."""

    def close(self) -> None:
        """Write out what is left."""


class TensorBoardLogger:
    """Event files in RUN/tensorboard; on resumption, what was logged after the step it resumes at is hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def log_config(self, config: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in _flat(config).items())
        self._writer.add_text("recipe", f"| value | |\n|---|---|\n{rows}", 0)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases, named as the folder; project and entity come from its own WANDB_ variables."""

    def __init__(self, folder: Path, first_step: int) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "coatnet")
        number = _kept(folder / "wandb-run-id", lambda: secrets.token_hex(4))
        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project=project, id=number, name=folder.resolve().name, dir=folder, resume="allow", settings=settings
        )
        # Steps as a figure like any other: its own counter refuses to go back where a run resumes.
        self._run.define_metric("*", step_metric="step")

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class MLflowLogger:
    """A run of MLflow, named as the folder; in RUN/mlflow(.db) unless MLFLOW_TRACKING_URI names a server."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells that it makes its tables
        folder, server = folder.resolve(), os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=server or f"sqlite:///{folder}/mlflow.db")
        # Without a server MLflow would put files into a folder of the current one.
        place = None if server else (folder / "mlflow").as_uri()
        self._number = _kept(folder / "mlflow-run-id", lambda: self._create(folder.name, place))
        self._client.update_run(self._number, status="RUNNING")

    def _create(self, name: str, place: str | None) -> str:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "coatnet")
        found = self._client.get_experiment_by_name(title)
        experiment = self._client.create_experiment(title, place) if found is None else found.experiment_id
        return self._client.create_run(experiment, run_name=name).info.run_id

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._client.log_dict(self._number, dict(config), "recipe.yaml")

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        # One message: one for each figure took a tenth of a second each, and the end of a short run waited in vain.
        now = int(1000 * time.time())
        self._client.log_batch(self._number, [Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self._number)


KINDS: dict[str, Callable[[Path, int], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MLflowLogger,
}


class Loggers:
    """The loggers of a run, each in a thread of its own: one that fails or hangs loses its records, never the run."""

    def __init__(self, openers: Mapping[str, Callable[[], Logger]], say: Callable[[str], None]) -> None:
        """`openers` give the loggers by name, `say` tells the person at the keyboard what went wrong."""
        self._workers = [_Worker(name, opener, say) for name, opener in openers.items()]

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Hand the recipe to every logger; returns at once."""
        self._put(lambda logger: logger.log_config(config))

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand figures to every logger; returns at once."""
        values = dict(metrics)
        self._put(lambda logger: logger.log_metrics(step, values))

    def close(self) -> None:
        """Wait for what is not written yet, ten seconds for each at most."""
        for worker in self._workers:
            worker.close()

    def _put(self, task: Callable[[Logger], None]) -> None:
        for worker in self._workers:
            worker.put(task)


class _Worker:
    """One logger, opened and used in one thread only; what it raises is said once and ends it."""

    def __init__(self, name: str, opener: Callable[[], Logger], say: Callable[[str], None]) -> None:
        self._name, self._opener, self._say = name, opener, say
        self._tasks: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(WAITING)
        self._missed = 0
        # A daemon: a logger that hangs for ever does not hold the process either.
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def put(self, task: Callable[[Logger], None]) -> None:
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._missed += self._thread.is_alive()  # of one that has ended, that is known already

    def close(self) -> None:
        with suppress(queue.Full):
            if self._thread.is_alive():
                self._tasks.put(None, timeout=CLOSING_SECONDS / 2)
        self._thread.join(CLOSING_SECONDS / 2)
        if self._thread.is_alive():
            self._say(f"warning: logger {self._name} does not come to an end; metrics.jsonl has everything")
        elif self._missed:
            self._say(f"warning: logger {self._name} was too slow for {self._missed} records; metrics.jsonl has them")

    def _work(self) -> None:
        try:
            logger = self._opener()
            while (task := self._tasks.get()) is not None:
                task(logger)
            logger.close()
        except BaseException as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"warning: logger {self._name} failed ({reason[:200]}); training goes on without it")


def open_loggers(names: Iterable[str], folder: Path, first_step: int, say: Callable[[str], None]) -> Loggers:
    """The loggers of a run that goes on after `first_step` steps; `say` gets a line when one fails.

    Raises UserError if a name is unknown, or the package behind it is not installed.
    """
    names = tuple(names)
    check_loggers(names)
    return Loggers({name: partial(KINDS[name], folder, first_step) for name in names}, say)


def check_loggers(names: Iterable[str]) -> None:
    """Raises UserError if a name is unknown, or the package behind it is not installed."""
    for name in names:
        if name not in KINDS:
            raise UserError(f"logger {name!r} is unknown{nearest(name, KINDS)}; there are {', '.join(KINDS)}")
        if find_spec(name) is None:
            raise UserError(f"logger {name} needs the package {name}: pip install 'coatnet[{name}]', or leave it out")


def _kept(path: Path, make: Callable[[], str]) -> str:
    """The text of a file, made the first time: a resumed run goes on under its old id."""
    if not path.exists():
        path.write_text(make(), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optimizer": {"learning_rate": 1}}` as `{"optimizer.learning_rate": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
