"""Two real processes train as one: they resume to the last bit, stop together, and see what one process sees.

One `torchrun` makes all the runs (two_processes.py); the tests compare what they left.
"""

import json
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from tests.training import launching
from tests.training.distributed.two_processes import RECIPE, RECIPES, STOPPED_AFTER, signal_at

import coatnet
from coatnet.errors import UserError
from coatnet.training.checkpoint import load_checkpoint, published
from coatnet.training.distributed.parallelize import check_batch_size
from coatnet.training.distributed.processes import Processes
from coatnet.training.interruption import Interrupted
from coatnet.training.run import train

pytestmark = pytest.mark.slow
TIMES = ("seconds", "images_per_second")


def log(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def losses(out):
    return {record["step"]: record["loss"] for record in log(out) if "loss" in record}


def last(out):
    return load_checkpoint(published(out / "checkpoints")[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("half of the runs have shards, which need torch 2.7 on CPUs")
    folder = tmp_path_factory.mktemp("runs")
    with signal_at(STOPPED_AFTER, 0, signal.SIGTERM), pytest.raises(Interrupted):
        train(RECIPE, folder / "grown")
    program = launching.ROOT / "tests" / "training" / "distributed" / "two_processes.py"
    code, output = launching.run([program, folder], seconds=300)
    assert code == 0, output
    (folder / "output.txt").write_text(output)
    return folder


@pytest.fixture(scope="module")
def found(runs):
    return [json.loads((runs / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "run"
    return out, train(RECIPE, out)


@pytest.mark.parametrize("name", RECIPES)
def test_resumed_run_equals_uninterrupted_run(name, runs, found):
    whole, cut = runs / name / "whole", runs / name / "cut"
    assert log(whole) == log(cut)
    assert [record["step"] for record in log(whole) if "loss" in record] == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(last(cut).tensors, last(whole).tensors, rtol=0, atol=0)
    weights = [load_file(out / "bundle" / "model.safetensors") for out in (whole, cut)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert all(of_one[name]["same_report"] for of_one in found)


@pytest.mark.parametrize("name", RECIPES)
def test_a_signal_to_one_process_stops_both_with_one_checkpoint(name, runs, found):
    assert [of_one[name]["codes"] for of_one in found] == [[143], [143]]
    stopping = [line for line in (runs / "output.txt").read_text().splitlines() if "stopped by SIGTERM" in line]
    assert len(stopping) == len(RECIPES) + 2  # the first process alone says it


def test_a_sharded_checkpoint_has_a_part_of_each_process(runs):
    (path, *_) = published(runs / "fsdp" / "whole" / "checkpoints")
    assert {part.name for part in path.iterdir()} == {
        "tensors-00000-of-00002.safetensors",
        "tensors-00001-of-00002.safetensors",
        "state.json",
        "manifest.json",
    }
    sizes = [part.stat().st_size for part in path.glob("tensors*")]
    assert max(sizes) < 1.3 * min(sizes)


def test_both_processes_return_the_report_over_all_held_out_images(found):
    held_out = len(coatnet.open_dataset("digits").validation)
    assert all(of_one[name]["n"] == held_out for of_one in found for name in RECIPES)


def test_a_limit_in_minutes_ends_both_at_the_same_step(runs, found):
    assert found[0]["timed"] == found[1]["timed"]
    assert log(runs / "timed")[-1]["step"] == last(runs / "timed").state["position"]["step"] > 1


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_nan_on_one_process_stops_both_before_the_update(parallelism, found):
    first, second = (of_one["nan"][parallelism] for of_one in found)
    assert re.match("NotFinite: step 1: loss nan.*nothing was updated", first["raised"])
    assert second["raised"] == first["raised"]
    assert first["same"] and second["same"]


def test_evaluation_during_training_counts_every_image_once_on_any_number_of_processes(runs, single):
    """The first evaluation of the run that one process began is its own; the later ones are of two processes."""
    held_out = len(coatnet.open_dataset("digits").validation)
    for out in (single[0], runs / "grown", runs / "ddp" / "whole", runs / "fsdp" / "whole"):
        assert [record["n"] for record in log(out) if "n" in record] == [held_out] * 3


@pytest.mark.parametrize(("name", "kind"), [("shrinking", "ddp"), ("shrinking-fsdp", "fsdp")])
def test_a_run_of_two_processes_resumes_with_one(name, kind, runs):
    before = losses(runs / name)
    assert max(before) == STOPPED_AFTER
    train(RECIPES[kind], runs / name)
    after, whole = losses(runs / name), losses(runs / kind / "whole")
    assert {step: after[step] for step in before} == before == {step: whole[step] for step in before}
    # the same images, but BatchNorm now sees 32 of them together instead of 16, and other residuals are dropped
    assert after == pytest.approx(whole, rel=0.1)


def test_a_run_of_one_process_resumes_with_two(runs, single):
    after, whole = losses(runs / "grown"), losses(single[0])
    assert {step: after[step] for step in range(1, STOPPED_AFTER + 1)} == {
        step: whole[step] for step in range(1, STOPPED_AFTER + 1)
    }
    assert after == pytest.approx(whole, rel=0.1)


def test_sharded_and_replicated_runs_differ_only_in_their_initial_weights(runs):
    """DDP draws them as one process does; what is sharded from (seed, name), so that no process needs them all."""
    ddp, fsdp = (last(runs / name / "whole") for name in ("ddp", "fsdp"))
    assert set(ddp.tensors) == set(fsdp.tensors)
    assert {name: value.shape for name, value in ddp.tensors.items()} == {
        name: value.shape for name, value in fsdp.tensors.items()
    }
    assert losses(runs / "fsdp" / "whole")[6] == pytest.approx(losses(runs / "ddp" / "whole")[6], rel=0.3)


def test_only_the_first_process_writes(runs):
    for name in RECIPES:
        steps = [record["step"] for record in log(runs / name / "whole") if "loss" in record]
        assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("batch_size", "parallelism", "message"),
    [(3, "ddp", "batch_size 3 leaves nothing to do for some of 4"), (6, "fsdp", "6 is not a multiple of 4 processes")],
)
def test_a_batch_that_cannot_be_shared_is_refused(batch_size, parallelism, message):
    recipe = coatnet.Recipe(data="digits", batch_size=batch_size)
    with pytest.raises(UserError, match=message):
        check_batch_size(recipe, Processes(0, 4), parallelism)
