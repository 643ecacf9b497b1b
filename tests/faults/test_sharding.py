"""Sharded runs that go on with another number of processes, and with copies of shards (HSDP) on two machines."""

import socket
from dataclasses import replace

import pytest
from tests.faults.running import LAST_STEP, PROGRAM, RECIPE, event, last_step, log, run
from tests.training import launching

from coatnet.training.run import train

SHARDED = replace(RECIPE, parallelism="fsdp", stochastic_depth=0.0)


def losses(out):
    return {record["step"]: record["loss"] for record in log(out) if "loss" in record}


@pytest.mark.fault("B9", "two processes, then four, then one (FSDP2)", "loads; the same images; losses within 10 %")
@pytest.mark.timeout(300)
def test_a_sharded_run_resumes_with_four_processes_and_with_one(tmp_path):
    whole = run(tmp_path, recipe=SHARDED, processes=2, out=tmp_path / "whole")
    run(tmp_path, event("forward", 3, "send", name="SIGTERM"), recipe=SHARDED, processes=2)
    run(tmp_path, event("forward", 6, "send", name="SIGTERM"), recipe=SHARDED, processes=4)
    assert 6 <= last_step(tmp_path / "run") < LAST_STEP
    train(SHARDED, tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(whole.out), rel=0.1)


@pytest.mark.fault(
    "B8", "HSDP on two machines of two processes, stopped and resumed", "bit for bit the run never stopped"
)
@pytest.mark.timeout(300)
def test_replicated_shards_on_two_machines_resume_bit_for_bit(tmp_path):
    recipe = replace(RECIPE, parallelism="hsdp")
    for name, events in (("whole", ()), ("cut", (event("forward", 4, "send", name="SIGTERM"),)), ("cut", ())):
        two_machines(tmp_path, recipe, tmp_path / name, events)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


def two_machines(folder, recipe, out, events):
    """Two torchruns that meet, as on two machines."""
    import json

    notes = folder / f"notes-{len(list(folder.glob('notes-*')))}"
    notes.mkdir()
    (notes / "recipe.yaml").write_text(recipe.to_yaml())
    plan = {"recipe": str(notes / "recipe.yaml"), "out": str(out), "notes": str(notes), "events": list(events)}
    (notes / "plan.json").write_text(json.dumps(plan))
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    meet = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test")
    machines = [launching.start([str(PROGRAM), str(notes / "plan.json")], options=meet) for _ in range(2)]
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    codes = [json.loads(path.read_text())["code"] for path in sorted(notes.glob("exit-*"))]
    assert codes == [143 if events else 0] * 4, outputs
