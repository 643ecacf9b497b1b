"""The length of a run: fixed by the recipe, or planned to end within its minutes."""

import pytest
from tests.training.configs import config_of

from coatnet.training.duration import Duration


def plan(limit_seconds=None, **changes):
    values = {"recipe_steps": 10_000, "evaluate_steps": 100, "num_validation_images": 1_000, "batch_size": 100}
    return Duration(limit_seconds=limit_seconds, **{**values, **changes})


def run(plan, seconds_a_step, seconds_an_evaluation=0.0, slow_start=0.0):
    """Step until the plan is over; the step and the time at the end."""
    step, seconds = 0, slow_start
    plan.update(step, seconds)
    while step < plan.total_steps:
        step, seconds = step + 1, seconds + seconds_a_step
        plan.add_step(seconds_a_step)
        if plan.evaluation_due(step, seconds):
            seconds += seconds_an_evaluation
            plan.add_evaluation(seconds, seconds_an_evaluation)
        plan.update(step, seconds)
    return step, seconds


def test_without_a_limit_the_epochs_give_the_last_step():
    assert run(plan(), 1.0) == (10_000, 10_000.0)


def test_a_distant_limit_changes_nothing():
    assert run(plan(1e6), 0.01)[0] == 10_000


@pytest.mark.parametrize("evaluation", [0.0, 3.0])
def test_the_run_ends_within_its_limit_and_uses_most_of_it(evaluation):
    step, seconds = run(plan(600.0), 0.5, evaluation)
    assert 540 < seconds <= 600 - 8
    assert step < 1200


def test_the_limit_includes_all_images_that_are_measured_at_the_end():
    """Those of the calibration and of a test split as well, and reading the files of images that were kept decoded."""
    planned = plan(600.0, num_other_final_images=4_000, reading_seconds=0.01)
    step, seconds = run(planned, 0.5, seconds_an_evaluation=3.0)
    end = 8 + 5 * (1.5 * 3.0 + 10.0)
    assert 540 - end < seconds <= 600 - end
    assert planned.seconds_left(step, seconds) == pytest.approx(end, abs=0.5)


def test_evaluations_on_the_way_are_shared_by_processes_and_the_last_is_not():
    planned = plan(600.0, num_processes=4)
    step, seconds = run(planned, 0.5, seconds_an_evaluation=3.0)
    assert planned.seconds_left(step, seconds) == pytest.approx(8 + 4 * 1.5 * 3.0, abs=0.5)


def test_the_estimate_converges_early():
    planned = plan(600.0)
    totals = []
    for step in range(1, 200):
        planned.add_step(0.5)
        planned.update(step, step * 0.5)
        totals.append(planned.total_steps)
    assert max(totals[20:]) - min(totals[20:]) < 0.05 * min(totals[20:])


def test_a_run_ends_at_once_when_its_time_is_over():
    planned = plan(60.0)
    planned.update(17, 59.0)
    assert planned.total_steps == 17


def test_a_run_without_any_time_takes_one_step():
    planned = plan(60.0)
    planned.update(0, 61.0)
    assert planned.total_steps == 1


def test_evaluations_come_at_their_steps_but_not_at_the_end():
    planned = plan(recipe_steps=300)
    assert [step for step in range(301) if step and planned.evaluation_due(step, float(step))] == [100, 200]


@pytest.mark.parametrize("slow", [[30.0], [3.0, 3.0, 3.0], [20.0, 0.1, 20.0]])
def test_slow_steps_at_the_start_do_not_end_the_run(slow):
    """The final evaluation is then guessed from a few of them; the guess may take half of the time, no more."""
    planned, seconds = plan(120.0, num_validation_images=2_000), 0.0
    durations = iter([0.1] * 10 + slow)  # after ten that are not timed
    step = 0
    while step < planned.total_steps:
        took = next(durations, 0.1)
        step, seconds = step + 1, seconds + took
        planned.add_step(took)
        planned.update(step, seconds)
    assert 100 < seconds < 120 - 8


def test_the_estimate_includes_steps_that_wait_for_their_workers():
    planned, seconds = plan(600.0, num_validation_images=0), 0.0
    for step in range(200):
        took = 1.0 if step % 4 == 0 else 0.2
        seconds += took
        planned.add_step(took)
        planned.update(step + 1, seconds)
    assert planned.total_steps == pytest.approx((600 - 8) / 0.4, rel=0.02)


def test_a_limit_shorter_than_the_reserve_still_trains():
    assert run(plan(6.0), 0.05)[0] > 30


def test_a_resumed_run_has_an_estimate_at_once():
    planned = plan(600.0, paced=True)
    planned.resume(step=1_000, seconds=500.0)
    planned.update(1_000, 505.0)
    assert planned.total_steps == pytest.approx(1_000 + (95 - 8) / 0.5, rel=0.05)
    assert not planned.evaluation_due(1_000, 505.0)


def test_the_time_left_is_close_to_what_the_run_takes():
    planned, seconds, guessed = plan(recipe_steps=1000), 0.0, {}
    for step in range(1, 1001):
        seconds += 0.5
        planned.add_step(0.5)
        if planned.evaluation_due(step, seconds):
            seconds += 20.0
            planned.add_evaluation(seconds, 20.0)
        guessed[step] = seconds, planned.seconds_left(step, seconds)
    whole = seconds + 8 + 1.5 * 20
    assert guessed[5][1] is None  # still warming
    for step in (150, 500, 850, 1000):
        at, left = guessed[step]
        assert at + left == pytest.approx(whole, abs=20)


@pytest.mark.parametrize("limit_seconds", [None, 2_000.0])
@pytest.mark.parametrize("evaluation", [0.5, 20.0, 70.0])
def test_evaluations_take_a_twentieth_of_the_time_at_most(limit_seconds, evaluation):
    planned, seconds, spent = plan(limit_seconds, recipe_steps=4_000, paced=True), 0.0, []
    step = 0
    while step < planned.total_steps:
        step, seconds = step + 1, seconds + 0.5
        planned.add_step(0.5)
        if planned.evaluation_due(step, seconds):
            seconds += evaluation
            spent.append(evaluation)
            planned.add_evaluation(seconds, evaluation)
        planned.update(step, seconds)
    assert spent and sum(spent) <= 0.053 * seconds  # the first one's duration is a guess
    assert limit_seconds is None or seconds > 0.9 * limit_seconds - 1.5 * evaluation
    if evaluation < 1:  # none is left out
        assert len(spent) == (39 if limit_seconds is None else 9)


def test_after_a_resumption_evaluations_are_paced_again():
    planned = plan(recipe_steps=10_000, paced=True)
    planned.resume(step=1_000, seconds=1_000.0)
    planned.add_evaluation(1_000.0, 20.0)
    assert not planned.evaluation_due(1_100, 1_100.0)
    assert planned.evaluation_due(2_000, 2_000.0)


def test_an_explicit_interval_is_obeyed_whatever_it_takes():
    planned = plan(600.0, evaluate_steps=10)
    planned.add_evaluation(100.0, 50.0)
    assert planned.evaluation_due(10, 101.0)


@pytest.mark.parametrize(
    ("asked", "epochs_between", "paced"),
    [
        ({}, 3, True),
        ({"evaluate_every": 0.5}, 0.5, False),
        ({"patience": 2}, 3, False),
        ({"max_minutes": 5.0}, 2, True),
        ({"max_minutes": 5.0, "patience": 2}, 2, True),
        ({"epochs": 6.0, "patience": 2}, 2, False),
        ({"epochs": 6.0, "progressive_resizing": {"initial_scale": 0.5}}, None, True),
    ],
)
def test_where_evaluations_are_follows_from_the_recipe_and_the_numbers_of_images(asked, epochs_between, paced):
    """200 images are measured by a third of the time of 200 of 1,000 training images: 6.7 % of an epoch."""
    config = config_of(**{"epochs": 36.0, "batch_size": 10, **asked})
    planned = Duration.of(config, 1_000, 200)
    assert planned.paced is paced
    if epochs_between:
        assert planned.evaluate_steps == 100 * epochs_between
    else:
        assert planned.evaluate_steps > 200  # small images are cheaper, an evaluation is not


def test_the_time_left_is_never_beyond_the_limit():
    planned = plan(60.0)
    for _ in range(20):
        planned.add_step(1.0)
    assert planned.seconds_left(20, 20.0) == 40.0
    assert planned.seconds_left(20, 61.0) == 0.0
