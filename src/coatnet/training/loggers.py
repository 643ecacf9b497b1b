"""Loggers beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow. A logger that fails never stops a run."""

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
from coatnet.system.json_reader import flatten

MAX_WAITING_RECORDS = 1_000  # for a logger; those beyond are dropped, so that a hung logger takes no memory
CLOSE_TIMEOUT_SECONDS = 10.0  # for a logger to write its waiting records at the end of a run


class Logger(Protocol):
    """Interface of a logger; its methods may raise anything and take any time."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Record the configuration of the run, once, before any metrics."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics after optimizer step `step`."""

    def close(self) -> None:
        """Write the remaining records."""


class TensorBoardLogger:
    """Event files in RUN/tensorboard; on resumption, records after the step of the checkpoint are hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log_config(self, config: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in flatten(config).items())
        self._writer.add_text("recipe", f"| value | |\n|---|---|\n{rows}", 0)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases with the name of the folder; project and entity come from WANDB_ variables."""

    def __init__(self, folder: Path, first_step: int) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "coatnet")
        run_id = _stored_id(folder / "wandb-run-id", lambda: secrets.token_hex(4))
        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project=project, id=run_id, name=folder.resolve().name, dir=folder, resume="allow", settings=settings
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
    """A run of MLflow with the name of the folder; in RUN/mlflow(.db) unless MLFLOW_TRACKING_URI names a server."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports the creation of its tables
        folder, server = folder.resolve(), os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=server or f"sqlite:///{folder}/mlflow.db")
        # Without a server MLflow would put files into a folder of the current one.
        artifacts = None if server else (folder / "mlflow").as_uri()
        self._run_id = _stored_id(folder / "mlflow-run-id", lambda: self._create(folder.name, artifacts))
        self._client.update_run(self._run_id, status="RUNNING")

    def _create(self, name: str, artifacts: str | None) -> str:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "coatnet")
        found = self._client.get_experiment_by_name(title)
        experiment = self._client.create_experiment(title, artifacts) if found is None else found.experiment_id
        return self._client.create_run(experiment, run_name=name).info.run_id

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._client.log_dict(self._run_id, dict(config), "recipe.yaml")

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        # One message: one for each metric takes a tenth of a second each, too long at the end of a short run.
        now = int(1000 * time.time())
        self._client.log_batch(self._run_id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


KINDS: dict[str, Callable[[Path, int], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MLflowLogger,
}


class Loggers:
    """The loggers of a run, each in its own thread: one that fails or hangs loses its records only."""

    def __init__(self, openers: Mapping[str, Callable[[], Logger]], say: Callable[[str], None]) -> None:
        """`openers` create the loggers by name; `say` prints a warning."""
        self._workers = [_Worker(name, opener, say) for name, opener in openers.items()]

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Pass the configuration to every logger, without waiting for them."""
        self._put(lambda logger: logger.log_config(config))

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass metrics to every logger, without waiting for them."""
        values = dict(metrics)
        self._put(lambda logger: logger.log_metrics(step, values))

    def close(self) -> None:
        """Wait for the remaining records, at most ten seconds for each logger."""
        for worker in self._workers:
            worker.close()

    def _put(self, task: Callable[[Logger], None]) -> None:
        for worker in self._workers:
            worker.put(task)


class _Worker:
    """One logger, created and used in one thread; an error is reported once and ends it."""

    def __init__(self, name: str, opener: Callable[[], Logger], say: Callable[[str], None]) -> None:
        self._name, self._opener, self._say = name, opener, say
        self._tasks: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(MAX_WAITING_RECORDS)
        self._dropped = 0
        # A daemon: a logger that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def put(self, task: Callable[[Logger], None]) -> None:
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._dropped += self._thread.is_alive()  # that of an ended thread is reported already

    def close(self) -> None:
        with suppress(queue.Full):
            if self._thread.is_alive():
                self._tasks.put(None, timeout=CLOSE_TIMEOUT_SECONDS / 2)
        self._thread.join(CLOSE_TIMEOUT_SECONDS / 2)
        if self._thread.is_alive():
            self._say(f"warning: logger {self._name} does not finish; metrics.jsonl has all records")
        elif self._dropped:
            self._say(f"warning: logger {self._name} was too slow for {self._dropped} records; metrics.jsonl has them")

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
    """The loggers of a run that starts after `first_step` steps; `say` prints a warning when one fails.

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


def _stored_id(path: Path, make: Callable[[], str]) -> str:
    """The text of a file, made the first time: a resumed run keeps its id."""
    if not path.exists():
        path.write_text(make(), encoding="utf-8")
    return path.read_text(encoding="utf-8")
