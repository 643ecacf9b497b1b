"""`kill -9` at any moment leaves a checkpoint to resume from, and the resumed run is the one never killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from threading import Thread

import pytest
import torch
from PIL import Image
from tests.faults.running import LAST_STEP, RECIPE, event, last_checkpoint, leftovers, log, run
from tests.training import launching

from coatnet.study.record import Study

KILLS = 60


@pytest.mark.fault("B6", f"kill -9 at {KILLS} random moments, in mid-save and mid-removal too", "resumes bit for bit")
@pytest.mark.timeout(1000)
def test_a_run_killed_at_random_moments_equals_the_uninterrupted_run(tmp_path):
    program = [sys.executable, str(Path(__file__).parent / "nursery.py"), str(tmp_path), str(KILLS)]
    ended = subprocess.run(program, env=launching.environment(), capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert len(found["met"]) >= KILLS and all(found["same"])
    assert {each["moment"] for each in found["met"]} >= {"any", "staged", "removing"}
    for each in found["met"]:
        assert not each["damaged"], each  # what has a name is whole
        assert each["logged"] - each["saved"] <= 10, each  # of 81; one checkpoint was on its way
    steps = [name for each in found["met"] for name in each.get("left", [])]
    assert steps and all(name.startswith("step-") and ".tmp" not in name for name in steps)


@pytest.mark.fault("B6", "{number.name} at three moments of a study of four runs", "ends with the same figures")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_study_that_is_ended_at_any_moment_ends_with_the_same_figures(number, tmp_path):
    command = [sys.executable, "-m", "coatnet", "study", "bias", "--data", "digits", "--sizes", "60", "--seeds", "2"]
    command += ["--steps", "30", "--jobs", "2", "--out"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*command, str(whole)], check=True, env=launching.environment(), capture_output=True)
    random = Random(0)
    for _ in range(3):
        process = subprocess.Popen([*command, str(broken)], env=launching.environment(), stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(broken.glob("runs/*/metrics.jsonl")):
            time.sleep(0.1)
        time.sleep(random.uniform(0.0, 6.0))
        process.send_signal(number)
        process.wait()
        time.sleep(1.0)  # for the runs, which end with the study
    subprocess.run([*command, str(broken)], check=True, env=launching.environment(), capture_output=True)
    found = [
        [(run.folder, run.status, run.figures, run.curves) for run in Study.read(folder).runs]  # without times
        for folder in (whole, broken)
    ]
    assert len(found[0]) == 4 and found[0] == found[1]


@pytest.mark.fault("B10", "one of two processes killed under --max-restarts=1", "restarts, resumes, completes")
@pytest.mark.timeout(240)
def test_a_killed_process_is_restarted_and_the_run_completes(tmp_path):
    options = ("--standalone", "--max-restarts", "1")
    whole = run(tmp_path, processes=2, out=tmp_path / "whole", seconds=80)
    assert whole.code == 0, whole.output
    ended = run(
        tmp_path, event("backward", 6, "send", rank=1, name="SIGKILL"), processes=2, options=options, seconds=120
    )
    assert ended.code == 0, ended.output
    assert f"resuming {ended.out} at step" in ended.output
    assert log(ended.out) == log(whole.out)
    torch.testing.assert_close(last_checkpoint(ended.out).tensors, last_checkpoint(whole.out).tensors, rtol=0, atol=0)
    assert last_checkpoint(ended.out).state["position"]["step"] == LAST_STEP and leftovers(ended.out) == []


@pytest.mark.fault("B10", "one of two processes killed, no restarts", "the other ends at once, says why; resumable")
@pytest.mark.timeout(120)
def test_a_lost_process_ends_the_others_with_one_line(tmp_path):
    recipe = replace(RECIPE, parallelism="fsdp")
    ended = run(tmp_path, event("forward", 5, "send", rank=1, name="SIGKILL"), recipe=recipe, processes=2, seconds=60)
    assert ended.code != 0
    assert "another process of this run has ended" in ended.output or "Signal 9 (SIGKILL)" in ended.output
    assert 1 <= last_checkpoint(ended.out).state["position"]["step"] <= 4


def session(leader: int) -> list[int]:
    """The processes of a session, which their parents' death does not change."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(") ")[2].split()[:4]
            if int(its_session) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(condition())


@pytest.mark.fault("B18", "two trainings in one folder; then kill -9 of the first", "exit 2 names it; then it resumes")
@pytest.mark.timeout(150)
def test_a_second_training_in_a_folder_is_refused_until_the_first_is_dead(tmp_path):
    first = Thread(target=run, args=(tmp_path, event("step", 4, "send", name="SIGSTOP")))
    first.start()
    lock, notes = tmp_path / "run" / ".lock", tmp_path / "notes-0"
    assert wait_until((notes / "sent-0.json").exists, 60)
    holder = lock.read_text()
    second = run(tmp_path)
    assert second.code == 2 and f"coatnet: error: {holder} is training in" in second.output, second.output
    assert socket.gethostname() in holder
    os.kill(int(holder.split()[1]), signal.SIGKILL)
    first.join()
    third = run(tmp_path)
    assert third.code == 0 and last_checkpoint(third.out).state["position"]["step"] == LAST_STEP, third.output
    steps = [record["step"] for record in log(third.out)]
    assert steps == sorted(steps) and not lock.exists()


@pytest.mark.fault("B19", "kill -9 of a training with two workers that decode", "they and their server end in seconds")
@pytest.mark.timeout(120)
def test_workers_do_not_outlive_a_killed_training(tmp_path):
    for index in range(40):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((600, 600), 50 + index).save(path)
    command = [sys.executable, "-m", "coatnet", "train", "--data", str(tmp_path / "images"), "--out"]
    command += [str(tmp_path / "run"), "--model", "coatnet-femto-16", "--epochs", "200", "--batch_size", "64"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = subprocess.Popen(
        [*command, "--num_workers", "2"], env=launching.environment(), start_new_session=True, **quiet
    )
    assert wait_until(lambda: len(session(started.pid)) >= 5, 60)  # with the fork server and the resource tracker
    time.sleep(1)
    started.kill()
    started.wait()
    assert wait_until(lambda: session(started.pid) == [], 10), session(started.pid)


@pytest.mark.fault("B19", "kill -9 of torchrun while two processes train", "both save and end in seconds; resumable")
@pytest.mark.timeout(150)
def test_processes_do_not_outlive_a_killed_torchrun(tmp_path):
    command = ["-m", "coatnet", "train", "--data", "digits", "--out", str(tmp_path / "run"), "--epochs", "300"]
    started = launching.start([*command, "--model", "coatnet-femto-16", "--seed", "1"])
    log_file = tmp_path / "run" / "metrics.jsonl"
    assert wait_until(lambda: log_file.exists() and log_file.stat().st_size > 0, 90)
    started.kill()
    started.communicate()
    assert wait_until(lambda: session(started.pid) == [], 30), session(started.pid)
    assert last_checkpoint(tmp_path / "run").state["position"]["step"] >= 1
