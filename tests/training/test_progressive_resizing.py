"""Progressive resizing: the sizes over a run, their cost, and a run that grows, stops and resumes alike."""

import json

import pytest
import torch

from coatnet import Recipe, UserError, load
from coatnet.training.duration import Duration
from coatnet.training.progressive_resizing import ProgressiveResizing
from coatnet.training.run import train
from coatnet.training.trainer import Trainer

GROWING = {"initial_scale": 0.5, "delay_fraction": 0.25, "finetune_fraction": 0.25}


def recipe(**changes):
    values = {
        "data": "digits",
        "model": "coatnet-femto-16",
        "epochs": 0.4,
        "batch_size": 32,
        "precision": "fp32",
        "progressive_resizing": GROWING,
    }
    return Recipe(**{**values, **changes})


def test_by_default_the_size_never_changes():
    resizing = ProgressiveResizing()
    assert {resizing.resolution_at(step / 100, 225, 32) for step in range(101)} == {225}
    assert resizing.cost_after(0.0) == 1.0


@pytest.mark.parametrize(("delay", "finetune"), [(0.5, 0.5), (0.8, 0.2), (0.0, 1.0)])
def test_the_size_may_change_at_once(delay, finetune):
    resizing = ProgressiveResizing(initial_scale=0.5, delay_fraction=delay, finetune_fraction=finetune)
    scales = [resizing.scale_at(progress) for progress in (0.0, max(0.0, delay - 1e-6), delay + 1e-6, 1.0)]
    assert scales == ([0.5, 0.5, 1.0, 1.0] if delay else [1.0] * 4)
    assert resizing.cost_after(0.0) == pytest.approx(1 - 0.75 * delay, abs=0.02)


def test_the_size_stays_then_grows_then_is_full():
    resizing = ProgressiveResizing(**GROWING)
    sizes = [resizing.resolution_at(step / 100, 224, 32) for step in range(101)]
    assert sizes == sorted(sizes) and set(sizes) == {128, 160, 192, 224}
    assert sizes[25] < sizes[50] < sizes[74] and sizes[24] == sizes[0] and sizes[75] == 224 == sizes[100]


def test_the_size_is_never_above_the_full_one():
    assert ProgressiveResizing(initial_scale=0.9).resolution_at(0.0, 100, 32) == 96
    assert ProgressiveResizing(initial_scale=0.01).resolution_at(0.0, 100, 32) == 32
    assert ProgressiveResizing(initial_scale=0.99).resolution_at(0.0, 20, 32) == 20


def test_the_cost_is_the_integral_of_the_squared_scale():
    resizing = ProgressiveResizing(**GROWING)
    # 1/4 at 0.25, 1/4 at 1, and between them the mean of (1 + t)^2 / 4 for t from 0 to 1, which is 7 / 12, over 1/2.
    assert resizing.cost_after(0.0) == pytest.approx(0.25 * 0.25 + 0.5 * 7 / 12 + 0.25, rel=0.02)
    assert resizing.cost_after(0.75) == 1.0 == resizing.cost_after(1.0)


def test_parts_that_do_not_fit_into_the_run_are_refused():
    with pytest.raises(UserError, match="delay_fraction and finetune_fraction must be at most 1 together"):
        ProgressiveResizing(delay_fraction=0.9, finetune_fraction=0.2)


def test_a_limit_in_minutes_counts_the_larger_images_to_come():
    resizing = ProgressiveResizing(**GROWING)
    planned = Duration(10_000, 1_000, 600.0, 1_000, 100, resizing)
    step, seconds = 0, 0.0
    planned.update(step, seconds)
    early = None
    while step < planned.total_steps:
        cost = resizing.scale_at(planned.progress(step)) ** 2
        step, seconds = step + 1, seconds + 0.5 * cost
        planned.add_step(0.5 * cost, cost)
        planned.update(step, seconds)
        early = early or (step == 100 and planned.total_steps)
    assert 560 < seconds <= 600
    assert abs(early - planned.total_steps) < 0.05 * planned.total_steps


class Recorded:
    """Sizes of the images that the network was given in training, by step."""

    def __init__(self, monkeypatch):
        self.sizes, step = {}, Trainer.step

        def recording(trainer, images, *rest):
            self.sizes[trainer.state.step] = images.shape[-1]
            return step(trainer, images, *rest)

        monkeypatch.setattr(Trainer, "step", recording)


@pytest.mark.slow
def test_a_run_grows_and_its_weights_are_those_of_full_size(tmp_path, monkeypatch):
    recorded = Recorded(monkeypatch)
    report = train(recipe(), tmp_path / "run")
    steps = len(recorded.sizes)
    assert [recorded.sizes[step] for step in (0, steps // 2, steps - 1)] == [4, 6, 8]
    assert load(tmp_path / "run").model.resolution == 8
    assert json.loads((tmp_path / "run/report.json").read_text())["figures"]["top1"] == report.figures["top1"]


@pytest.mark.slow
def test_a_run_that_stopped_among_small_images_goes_on_alike(tmp_path, monkeypatch):
    train(recipe(), tmp_path / "whole")
    recorded, step = Recorded(monkeypatch), Trainer.step

    def stopping(trainer, images, *rest):
        if trainer.state.step == 12:
            raise KeyboardInterrupt
        return step(trainer, images, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "step", stopping)
        train(recipe(checkpoint_every_minutes=1e-6), tmp_path / "run")
    assert recorded.sizes[11] < 8
    train(recipe(checkpoint_every_minutes=1e-6), tmp_path / "run")
    whole, resumed = (load(tmp_path / name).model.state_dict() for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
