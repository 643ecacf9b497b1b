"""Muon against torch's own, singular values and the matrices that a weight holds."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tests.training.trainers import CONSTANT, trainer_for
from torch import nn

from coatnet import Recipe
from coatnet.model.network import create_model
from coatnet.training.muon import COEFFICIENTS, ITERATIONS, MAX_STACKED_VALUES, UPDATE_RMS, Muon, orthogonalize, stacks
from coatnet.training.optimizer import Optimization, matrix_weights, named_parameters, parameter_groups

MUON = Optimization(algorithm="muon", layer_decay=0.8)


@pytest.mark.parametrize("shape", [(2, 48, 16), (3, 16, 48), (1, 1, 5), (2, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalized_matrices_have_singular_values_near_one(shape, dtype):
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=torch.manual_seed(0)), full_matrices=False)
    s = s.clamp(min=0.1 * s.max())  # the smallest take more iterations
    found = orthogonalize(1e3 * (u * s.unsqueeze(-2)) @ v, dtype)
    assert found.dtype == dtype
    inner = u.mT @ found.float() @ v.mT  # diagonal: the singular vectors stay
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < values.min() <= values.max() < 1.25
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", [(2, 40, 80), (3, 160, 640), (1, 16, 256), (1, 64, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_few_gram_matrices_give_the_same_iterations(shape, dtype, tolerance):
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=torch.manual_seed(0)), full_matrices=False)
    x = (u * torch.logspace(0, -4, s.shape[-1])) @ v  # small singular values, which float32 loses in a Gram matrix
    a, b, c = COEFFICIENTS
    expected = (x / torch.linalg.matrix_norm(x, keepdim=True)).double()
    for _ in range(ITERATIONS):
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    distance = torch.linalg.matrix_norm(orthogonalize(x, dtype) - expected)
    assert (distance / torch.linalg.matrix_norm(expected)).max() < tolerance


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4), torch.float32), torch.zeros(2, 3, 4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon needs torch 2.9")
def test_steps_equal_those_of_torch():
    ours = nn.ParameterList([torch.randn(8, 12), torch.randn(24, 6), torch.randn(8, 12)])
    theirs = copy.deepcopy(ours)
    optimizers = [
        Muon([{"params": list(ours)}], lr=0.02, weight_decay=0.1, dtype=torch.bfloat16),
        torch.optim.Muon(list(theirs), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)  # a step moves the weights by 0.004


def test_queries_keys_and_values_are_three_matrices_and_kernels_are_columns():
    stacked, separate = nn.Parameter(torch.zeros(9, 5, 1, 1)), [nn.Parameter(torch.zeros(3, 5)) for _ in range(3)]
    gradient = torch.randn(9, 5)
    stacked.grad = gradient.clone()[..., None, None]
    for each, rows in zip(separate, gradient.clone().split(3), strict=True):
        each.grad = rows.clone()
    Muon([{"params": [stacked], "matrices": 3}], lr=1.0).step()
    Muon([{"params": separate}], lr=1.0).step()
    torch.testing.assert_close(stacked.detach()[..., 0, 0], torch.cat([each.detach() for each in separate]))
    rms = stacked.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(UPDATE_RMS, rel=0.2)

    kernel = nn.Parameter(torch.zeros(4, 2, 3, 3).contiguous(memory_format=torch.channels_last))
    kernel.grad = torch.randn(4, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    expected = orthogonalize(kernel.grad.flatten(1)[None], torch.float32)[0] * UPDATE_RMS * math.sqrt(18)
    Muon([{"params": [kernel]}], lr=1.0).step()
    torch.testing.assert_close(-kernel.detach().flatten(1), expected, rtol=0.01, atol=1e-4)


def test_weights_of_one_shape_are_stacked_up_to_a_limit():
    large = [torch.empty(MAX_STACKED_VALUES // 2, 1, device="meta") for _ in range(5)]
    small = [torch.empty(3, 2, device="meta") for _ in range(4)]
    assert [len(each) for each in stacks([*small, *large])] == [4, 2, 2, 1]


@pytest.mark.parametrize("name", ["coatnet-0", "coatnet_rmlp_0_rw_224", "coatnext_nano_rw_224"])
def test_every_parameter_has_one_optimizer_and_only_matrices_have_muon(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=7)
    groups = parameter_groups(model, MUON)
    names = [each for of_algorithm in groups.values() for group in of_algorithm for each in group["names"]]
    assert sorted(names) == sorted(each for each, _ in model.named_parameters())
    parameters, with_muon = dict(model.named_parameters()), matrix_weights(model)
    assert any(".qkv." in each for each in with_muon)
    for each, matrices in with_muon.items():
        assert parameters[each].ndim >= 2 and min(parameters[each].flatten(1).shape) > 1, each
        assert parameters[each].shape[0] % matrices == 0
        assert "bias" not in each and "classifier" not in each and not each.endswith("depthwise.weight")
    share = sum(parameters[each].numel() for each in with_muon) / sum(p.numel() for p in parameters.values())
    assert share > 0.9


def test_it_overfits_one_batch_and_resumes_with_its_momentum():
    recipe = Recipe(
        data="digits",
        model="coatnet-femto-16",
        precision="fp32",
        stochastic_depth=0.0,
        mixing={"label_smoothing": 0.0},
        optimizer={"algorithm": "muon", "learning_rate": 2e-3},
        schedule=CONSTANT,
    )
    trainer = trainer_for(recipe)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    losses = [trainer.step(images, labels)[0] for _ in range(20)]
    assert losses[0] > 2.0
    assert losses[-1] < 0.05
    moments = [name for name in trainer.tensors() if name.startswith("optimizer.momentum_buffer.")]
    assert {name.removeprefix("optimizer.momentum_buffer.") for name in moments} == {
        name for name, _ in named_parameters(trainer.optimizers[1])
    }
    assert not trainer_for(replace(recipe, optimizer={"algorithm": "adamw"})).optimizers[1:]
