"""A signal to any process, in any part of a step, stops all of them after the same step, saved, in seconds."""

from dataclasses import replace

import pytest
from tests.faults.running import LAST_STEP, RECIPE, event, last_checkpoint, last_step, leftovers, log, run

SECONDS = 10


@pytest.mark.fault("B4", "{name} to {target} in {moment}", "both stop at one step, one checkpoint, exit 143 (130)")
@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("moment", "target", "name", "parallelism"),
    [
        ("forward", "process 0", "SIGTERM", "ddp"),
        ("forward", "process 1", "SIGUSR1", "fsdp"),
        ("forward", "torchrun", "SIGTERM", "fsdp"),
        ("backward", "process 0", "SIGUSR1", "fsdp"),
        ("backward", "process 1", "SIGTERM", "ddp"),
        ("backward", "torchrun", "SIGINT", "ddp"),
        ("evaluation", "process 0", "SIGTERM", "fsdp"),
        ("evaluation", "process 1", "SIGINT", "ddp"),
        ("evaluation", "torchrun", "SIGTERM", "ddp"),
        ("save", "process 0", "SIGTERM", "ddp"),
        ("save", "process 1", "SIGTERM", "fsdp"),
        ("save", "torchrun", "SIGTERM", "fsdp"),
    ],
)
def test_a_signal_stops_all_processes_at_the_same_step(moment, target, name, parallelism, tmp_path):
    rank = 1 if target == "process 1" else 0
    to = "parent" if target == "torchrun" else "self"
    injected = event(moment, 4, "send", rank=rank, name=name, to=to)
    ended = run(tmp_path, injected, recipe=replace(RECIPE, parallelism=parallelism), processes=2)
    assert ended.codes == [130 if name == "SIGINT" else 143] * 2, ended.output
    assert ended.seconds_to_end < SECONDS
    stopped_after = last_step(ended.out)
    assert 4 <= stopped_after <= 6 and leftovers(ended.out) == []
    assert max(record["step"] for record in log(ended.out)) == stopped_after
    assert ended.output.count(f"stopped by {name} and saved") == 1


@pytest.mark.fault(
    "B4", "SIGTERM in an evaluation of one process", "given up, made after resuming; the log is the same"
)
@pytest.mark.timeout(120)
def test_an_interrupted_evaluation_is_made_after_resuming(tmp_path):
    whole = run(tmp_path, out=tmp_path / "whole")
    ended = run(tmp_path, event("evaluation", 4, "send", name="SIGTERM"))
    assert ended.code == 143
    assert not any("top1" in record for record in log(ended.out)) and last_step(ended.out) == 4
    again = run(tmp_path)
    assert again.code == 0, again.output
    assert log(again.out) == log(whole.out)
    assert last_checkpoint(again.out).state["position"]["measured"] == 8


@pytest.mark.fault("B5", "a second {name} during the save", "the save is whole or absent, the run resumes")
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_second_signal_never_corrupts_a_checkpoint(name, code, tmp_path):
    first = event("backward", 5, "send", name="SIGINT" if name == "SIGINT" else "SIGTERM")
    ended = run(tmp_path, first, event("writing", 5, "slow_save_with", name=name))
    assert ended.code == code, ended.output
    assert last_step(ended.out) >= 3
    again = run(tmp_path)
    assert again.code == 0, again.output
    assert last_step(again.out) == LAST_STEP and leftovers(again.out) == []
