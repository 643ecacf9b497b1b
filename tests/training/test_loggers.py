"""Loggers get what a run logs, and nothing that one of them does can stop or delay the run."""

import json
import subprocess
import sys
import threading
import time

import pytest

from coatnet.errors import UserError
from coatnet.training import loggers
from coatnet.training.config import Recipe
from coatnet.training.loggers import Loggers, check_loggers, open_loggers
from coatnet.training.run import train

CONFIG = {"name": "scratch", "optimizer": {"learning_rate": 0.002, "betas": [0.9, 0.999]}}


class Notebook:
    """A logger that remembers; `raises` names the call that fails."""

    def __init__(self, raises=""):
        self.entries, self._raises = [], raises
        self._note("open")

    def _note(self, call, *values):
        if call == self._raises:
            raise ConnectionError(f"no route\nfor {call}")
        self.entries.append((call, *values))

    def log_config(self, config):
        self._note("config", config)

    def log_metrics(self, step, metrics):
        self._note("metrics", step, metrics)

    def close(self):
        self._note("close")


def logged(opener):
    """Logs a config and two records into what `opener` gives; the warnings that were said."""
    said = []
    together = Loggers({"notebook": opener}, said.append)
    together.log_config(CONFIG)
    together.log_metrics(1, {"loss": 2.0})
    together.log_metrics(2, {"loss": 1.5})
    together.close()
    return said


def test_a_logger_receives_the_configuration_and_every_record_in_order():
    notebook = Notebook()
    assert logged(lambda: notebook) == []
    assert notebook.entries == [
        ("open",),
        ("config", CONFIG),
        ("metrics", 1, {"loss": 2.0}),
        ("metrics", 2, {"loss": 1.5}),
        ("close",),
    ]


@pytest.mark.parametrize("call", ["open", "config", "metrics", "close"])
def test_a_failing_logger_gives_one_warning_and_the_others_continue(call):
    said, notebook = [], Notebook()
    together = Loggers({"broken": lambda: Notebook(raises=call), "whole": lambda: notebook}, said.append)
    together.log_config(CONFIG)
    for step in range(20):
        together.log_metrics(step, {"loss": 1.0})
    together.close()
    assert said == [
        f"warning: logger broken failed (ConnectionError: no route for {call}); training goes on without it"
    ]
    assert len(notebook.entries) == 23


def test_a_hanging_logger_delays_nothing_and_holds_a_bounded_number_of_records(monkeypatch):
    monkeypatch.setattr(loggers, "CLOSE_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(loggers, "MAX_WAITING_RECORDS", 10)
    said, release = [], threading.Event()
    together = Loggers({"hung": lambda: (release.wait(), Notebook())[1]}, said.append)
    began = time.monotonic()
    for step in range(5_000):
        together.log_metrics(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    together.close()
    assert time.monotonic() - began < 3.0
    assert said == ["warning: logger hung does not finish; metrics.jsonl has all records"]
    release.set()


def test_a_hanging_logger_does_not_keep_the_process_alive():
    program = (
        "import threading\nfrom coatnet.training import loggers\nloggers.CLOSE_TIMEOUT_SECONDS = 0.1\n"
        "together = loggers.Loggers({'hung': threading.Event().wait}, print)\ntogether.close()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "does not finish" in run.stdout, run.stderr


def test_records_dropped_by_a_slow_logger_are_counted(monkeypatch):
    monkeypatch.setattr(loggers, "MAX_WAITING_RECORDS", 5)
    said, release = [], threading.Event()
    together = Loggers({"slow": lambda: (release.wait(), Notebook())[1]}, said.append)
    for step in range(12):
        together.log_metrics(step, {"loss": 1.0})
    release.set()
    together.close()
    assert said == ["warning: logger slow was too slow for 7 records; metrics.jsonl has them"]


def test_an_unknown_logger_is_reported_before_a_run_begins(monkeypatch):
    with pytest.raises(UserError, match=r"'tensorbord' is unknown \(did you mean 'tensorboard'\?\)"):
        check_loggers(["tensorbord"])
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'coatnet\[wandb\]'"):
        check_loggers(["wandb"])


def write(name, folder, first_step, records):
    said = []
    together = open_loggers([name], folder, first_step, said.append)
    together.log_config(CONFIG)
    for step, loss in records:
        together.log_metrics(step, {"loss": loss})
    together.close()
    assert said == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_the_records_and_a_resumed_run_replaces_those_it_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write("tensorboard", tmp_path, 0, [(1, 2.0), (2, 1.5), (3, 9.0)])
    write("tensorboard", tmp_path, 2, [(3, 1.25)])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 1.5), (3, 1.25)]
    (text,) = events.Tensors("recipe/text_summary")[:1]
    assert b"| optimizer.learning_rate | 0.002 |" in text.tensor_proto.string_val[0]


@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_one_run_over_a_resumption(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(loggers, "CLOSE_TIMEOUT_SECONDS", 60.0)
    write("wandb", tmp_path, 0, [(1, 2.0)])
    time.sleep(1.1)  # it names its folders by the second
    write("wandb", tmp_path, 2, [(3, 2.0)])
    number = (tmp_path / "wandb-run-id").read_text()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))) == 2


@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_one_run_over_a_resumption(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(loggers, "CLOSE_TIMEOUT_SECONDS", 120.0)
    write("mlflow", tmp_path, 0, [(1, 2.0), (2, 1.5)])
    write("mlflow", tmp_path, 2, [(3, 1.25)])
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    number = (tmp_path / "mlflow-run-id").read_text()
    assert [(m.step, m.value) for m in client.get_metric_history(number, "loss")] == [(1, 2.0), (2, 1.5), (3, 1.25)]
    assert client.get_run(number).info.status == "FINISHED"


def test_loggers_receive_what_a_run_writes_into_its_log(tmp_path, monkeypatch):
    opened = []

    def opener(folder, first_step):
        opened.append((folder, first_step, Notebook()))
        return opened[-1][2]

    monkeypatch.setitem(loggers.KINDS, "json", opener)  # some package that is installed
    recipe = Recipe(data="digits", epochs=0.1, loggers="json")
    train(recipe, tmp_path / "run")
    ((folder, first_step, notebook),) = opened
    assert (folder, first_step) == (tmp_path / "run", 0)
    config, *received = notebook.entries[1:-1]
    assert config[1]["data"] == "digits" and notebook.entries[-1] == ("close",)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert received == [("metrics", record.pop("step"), record) for record in written]
    with pytest.raises(UserError, match=r"logger 'tensorbord' is unknown.*did you mean 'tensorboard'"):
        train(Recipe(data="digits", loggers=("tensorbord",)), tmp_path / "other")
    assert not (tmp_path / "other").exists()
