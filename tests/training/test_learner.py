"""One optimizer step: refuses a loss that is not finite, accumulates exactly, and learns."""

import signal
from dataclasses import replace

import pytest
import torch

import coatnet
from coatnet.training.config import Recipe
from coatnet.training.defaults import resolve
from coatnet.training.interruption import Interruption
from coatnet.training.learner import Learner, NotFinite

RECIPE = Recipe(data="digits", stochastic_depth=0.0, precision="fp32", ema_decay=0.9)


def learner(recipe=RECIPE):
    splits = coatnet.open_dataset("digits")
    return Learner(resolve(recipe, splits), splits.training, None)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    model = learner()
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    model.step(images, labels, step=0, learning_rate=1e-3)
    parameters = [name for name, _ in model.model.named_parameters()]
    before = {name: value.clone() for name, value in model.tensors().items() if "running" not in name}
    images[3, 0, 2, 2] = float("nan")
    with pytest.raises(NotFinite, match=r"step 1: loss nan.*nothing was updated"):
        model.step(images, labels, step=1, learning_rate=1e-3)
    after = model.tensors()
    for name in [n for n in before if "num_batches" not in n]:
        assert torch.equal(before[name], after[name]), name
    assert all(f"model.{name}" in before for name in parameters)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    recipe = replace(RECIPE, variations={"mbconv_norm": "layer"})
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    norms = []
    for micro in (32, 20, 7):
        model = learner(replace(recipe, micro_batch_size=micro))
        model.model.stages.eval()
        model.model.stem.eval()  # the stem's BatchNorm would see other batches
        norms.append(model.step(images, labels, step=0, learning_rate=1e-3))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_it_learns_one_batch_by_heart():
    recipe = replace(RECIPE, mixing={"label_smoothing": 0.0})
    model = learner(recipe)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    losses = [model.step(images, labels, step=step, learning_rate=2e-3)[0] for step in range(40)]
    assert losses[0] > 2.0
    assert losses[-1] < 0.05


def test_the_first_batch_starts_the_statistics_that_evaluation_uses():
    """From 0 and 1 they would be wrong for some 150 steps, and so would every evaluation until then."""
    model = learner()
    images, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
    with torch.no_grad():
        seen_in_training = model.model(images)
    model.model.load_state_dict(learner().model.state_dict())
    model.step(images, labels, step=0, learning_rate=0.0)
    with torch.no_grad():
        torch.testing.assert_close(model.model.eval()(images), seen_in_training, rtol=0.05, atol=0.05)


def test_a_second_sigint_aborts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal is signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
