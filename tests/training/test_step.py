"""One optimizer step: refuses a loss that is not finite, accumulates exactly, and learns."""

import signal
from dataclasses import replace

import pytest
import torch
from tests.training.trainers import CONSTANT, trainer_for

from coatnet.errors import NotFinite, UserError
from coatnet.training.config import Recipe
from coatnet.training.interruption import Interruption
from coatnet.training.trainer import explain_out_of_memory

RECIPE = Recipe(data="digits", stochastic_depth=0.0, precision="fp32", ema_decay=0.9)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    trainer = trainer_for(RECIPE)
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    trainer.step(images, labels)
    parameters = [name for name, _ in trainer.model.named_parameters()]
    before = {name: value.clone() for name, value in trainer.tensors().items() if "running" not in name}
    images[3, 0, 2, 2] = float("nan")
    with pytest.raises(NotFinite, match=r"step 1: loss nan.*nothing was updated"):
        trainer.step(images, labels)
    after = trainer.tensors()
    for name in [n for n in before if "num_batches" not in n]:
        assert torch.equal(before[name], after[name]), name
    assert all(f"model.{name}" in before for name in parameters)


def test_statistics_begin_with_the_first_batch_that_counts():
    images, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
    one, other = (trainer_for(replace(RECIPE, non_finite_budget=1)) for _ in range(2))
    with pytest.raises(NotFinite):
        one.step(torch.full_like(images, float("nan")), labels)
    one.state.step = one.state.left_out = 1  # as `step_within_budget` counts it
    for trainer in (one, other):
        trainer.step(images, labels)
    found, wanted = ({n: b for n, b in each.model.named_buffers() if "running" in n} for each in (one, other))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    recipe = replace(RECIPE, variations={"mbconv_norm": "layer"})
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    norms = []
    for micro in (32, 20, 7):
        trainer = trainer_for(replace(recipe, micro_batch_size=micro))
        trainer.model.stages.eval()
        trainer.model.stem.eval()  # the stem's BatchNorm would see other batches
        norms.append(trainer.step(images, labels))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_it_overfits_one_batch():
    recipe = replace(RECIPE, mixing={"label_smoothing": 0.0}, optimizer={"learning_rate": 2e-3}, schedule=CONSTANT)
    trainer = trainer_for(recipe)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    losses = [trainer.step(images, labels)[0] for _ in range(40)]
    assert losses[0] > 2.0
    assert losses[-1] < 0.05


def test_the_first_batch_initializes_the_batch_norm_statistics():
    """From 0 and 1 they would be wrong for some 150 steps, and so would every evaluation until then."""
    trainer = trainer_for(replace(RECIPE, optimizer={"learning_rate": 1e-12}, schedule=CONSTANT))
    images, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
    with torch.no_grad():
        seen_in_training = trainer.model(images)
    trainer.model.load_state_dict(trainer_for(RECIPE).model.state_dict())
    trainer.step(images, labels)
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(images), seen_in_training, rtol=0.05, atol=0.05)


def test_a_second_sigint_aborts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal is signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
    ],
)
def test_exhausted_memory_is_explained(error):
    explained = r"step 5: out of memory with 8 images of 224 pixels.*micro_batch_size 4"
    with pytest.raises(UserError, match=explained), explain_out_of_memory(5, 8, 224):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), NotImplementedError("no such kernel"), RecursionError()]
)
def test_other_runtime_errors_are_not_taken_for_exhausted_memory(error):
    with pytest.raises(type(error)), explain_out_of_memory(5, 8, 224):
        raise error
