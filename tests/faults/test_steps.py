"""A step that goes wrong is not taken: NaN, infinity, no memory; and surroundings that change under a run."""

from dataclasses import replace

import pytest
from tests.faults.running import LAST_STEP, RECIPE, event, last_checkpoint, last_step, log, run


@pytest.mark.fault("B3", "a loss that becomes NaN", "stops before the update, exit 2, the last checkpoint is finite")
def test_a_loss_that_is_not_finite_ends_the_run_with_finite_weights(tmp_path):
    recipe = replace(RECIPE, optimizer={"learning_rate": 1e30}, schedule={"warmup_steps": 0}, precision="fp32")
    ended = run(tmp_path, recipe=recipe)
    assert ended.code == 2 and "nothing was updated" in ended.output and "Traceback" not in ended.output


@pytest.mark.fault(
    "B3", "a NaN image at step 4 on one of two processes", "both stop, exit 2, its batch in the log; resumable"
)
@pytest.mark.timeout(120)
def test_an_image_of_nan_is_traced_to_its_batch(tmp_path):
    ended = run(tmp_path, event("step", 4, "spoil_image", rank=1), processes=2)
    assert ended.codes == [2, 2] and ended.output.count("nothing was updated") == 1, ended.output
    assert last_step(ended.out) <= 3
    (record,) = [record for record in log(ended.out) if "not_finite" in record]
    assert record["step"] == 4 and len(set(record["indices"])) == 32
    again = run(tmp_path, processes=2)
    assert again.code == 0 and last_step(again.out) == LAST_STEP, again.output


@pytest.mark.fault("B3", "the same with a budget of one such step", "a warning, skipped by both, and the run completes")
@pytest.mark.timeout(120)
def test_a_step_that_is_not_finite_is_skipped_within_the_budget(tmp_path):
    recipe = replace(RECIPE, non_finite_budget=1)
    ended = run(tmp_path, event("step", 4, "spoil_image", rank=1), recipe=recipe, processes=2)
    assert ended.code == 0 and ended.output.count("the step is skipped") == 1, ended.output
    checkpoint = last_checkpoint(ended.out)
    assert checkpoint.state["position"]["left_out"] == 1 and last_step(ended.out) == LAST_STEP
    assert all(value.isfinite().all() for value in checkpoint.tensors.values())


@pytest.mark.fault("B14", "out of memory at step 5, in one process", "one line of advice, exit 2, checkpoint whole")
def test_exhausted_memory_is_reported_with_advice(tmp_path):
    ended = run(tmp_path, event("forward", 5, "exhaust_memory"))
    assert ended.code == 2 and "Traceback" not in ended.output
    assert "out of memory with 32 images of 8 pixels at once. Give micro_batch_size 16" in ended.output
    assert 1 <= last_step(ended.out) <= 4


@pytest.mark.fault("B14", "out of memory at step 5 on one of two processes", "both end in seconds, checkpoint whole")
@pytest.mark.timeout(120)
def test_exhausted_memory_of_one_process_ends_both(tmp_path):
    ended = run(tmp_path, event("forward", 5, "exhaust_memory", rank=1), processes=2, seconds=60)
    assert ended.code != 0 and "out of memory with 16 images" in ended.output
    assert 1 <= last_step(ended.out) <= 4


@pytest.mark.fault("B13", "the clock turned {hours} hours", "nothing changes")
@pytest.mark.parametrize("hours", [-10, 10])
def test_a_jump_of_the_clock_changes_nothing(hours, tmp_path):
    whole = run(tmp_path, out=tmp_path / "whole")
    ended = run(tmp_path, event("step", 4, "turn_clock", hours=hours))
    assert ended.code == 0 and log(ended.out) == log(whole.out)


@pytest.mark.fault("B13", "the run's folder removed while it trains", "training goes on; the bundle is written")
def test_removing_the_run_folder_does_not_end_the_training(tmp_path):
    ended = run(tmp_path, event("step", 5, "remove_run"))
    assert ended.code == 0, ended.output
    assert (ended.out / "bundle" / "model.safetensors").exists()
    assert last_step(ended.out) == LAST_STEP


@pytest.mark.fault("B11", "a batch of 31 for two processes, an odd number of held-out images", "no hang, exact counts")
@pytest.mark.timeout(120)
def test_uneven_shares_hang_nothing_and_count_exactly(tmp_path):
    recipe = replace(RECIPE, batch_size=31, micro_batch_size=5, validation_fraction=0.11)
    ended = run(tmp_path, recipe=recipe, processes=2)
    assert ended.code == 0, ended.output
    counts = {record["n"] for record in log(ended.out) if "n" in record}
    assert len(counts) == 1 and last_checkpoint(ended.out).state["position"]["step"] >= 10
