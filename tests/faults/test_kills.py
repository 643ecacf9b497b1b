"""`kill -9` at any moment leaves a checkpoint to resume from, and the resumed run is the one never killed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.faults.running import LAST_STEP, RECIPE, event, last_checkpoint, leftovers, log, run
from tests.training import launching

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
