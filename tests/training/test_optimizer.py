"""Schedule, decay groups, averaging and losses against closed forms and torch's own operations."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.training.trainers import trainer_for
from torch import nn

from coatnet.model.network import create_model
from coatnet.training.config import Recipe
from coatnet.training.optimizer import (
    Optimization,
    Schedule,
    WeightAverage,
    balancing_weights,
    build_loss,
    clip_gradients,
    gradient_norm,
    learning_rate_at,
    parameter_groups,
    update_weights,
)


def test_warmup_is_a_line_to_the_peak():
    schedule = Schedule("cosine", warmup_steps=10)
    assert [learning_rate_at(step, 100, 2.0, schedule) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])


@pytest.mark.parametrize(("decay", "halfway"), [("cosine", 1.1), ("linear", 1.1), ("constant", 2.0)])
def test_decay_is_halfway_between_peak_and_minimum_halfway_through(decay, halfway):
    schedule = Schedule(decay, warmup_steps=20, minimum_learning_rate=0.2)
    assert learning_rate_at(20, 120, 2.0, schedule) == pytest.approx(2.0)
    assert learning_rate_at(70, 120, 2.0, schedule) == pytest.approx(halfway)
    end = 2.0 if decay == "constant" else 0.2
    assert learning_rate_at(120, 120, 2.0, schedule) == pytest.approx(end)


def test_cosine_equals_its_formula():
    schedule = Schedule("cosine", minimum_learning_rate=1e-5)
    for step in range(0, 1000, 97):
        expected = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * step / 1000))
        assert learning_rate_at(step, 1000, 1e-3, schedule) == pytest.approx(expected)


def test_biases_norms_and_relative_bias_tables_are_not_decayed():
    model = create_model("coatnet-0", num_classes=3, resolution=64)
    groups = parameter_groups(model, Optimization(weight_decay=0.05))["adamw"]
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decay.keys() == dict(model.named_parameters()).keys()
    tables = [name for name in decay if "bias.table" in name]
    assert tables
    for name, parameter in model.named_parameters():
        assert decay[name] == (0.0 if parameter.ndim == 1 or name in tables else 0.05), name


def test_layer_decay_multiplies_once_a_block_towards_the_stem():
    model = create_model("coatnet-0", num_classes=3, resolution=64)
    groups = parameter_groups(model, Optimization(layer_decay=0.5))["adamw"]
    scale = {name: group["scale"] for group in groups for name in group["names"]}
    num_blocks = sum(stage.depth for stage in model.variant.stages)
    stem, head = (next(scale[name] for name in scale if name.startswith(part)) for part in ("stem", "head"))
    assert head == 1.0
    assert stem == 0.5 ** (num_blocks + 1)


def test_a_step_equals_torch_adamw_with_clipped_gradients():
    torch.manual_seed(0)
    ours = nn.Linear(4, 3)
    theirs = copy.deepcopy(ours)
    groups = [{"params": list(ours.parameters()), "scale": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1, fused=True)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        batch = torch.randn(8, 4)
        for model in (ours, theirs):
            model(batch).square().sum().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        parameters = list(ours.parameters())
        clip_gradients(parameters, gradient_norm(parameters), 0.5)
        update_weights([optimizer], 0.01)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_layer_decay_scales_the_learning_rate_of_each_group():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [weight], "scale": scale} for weight, scale in zip(weights, (1.0, 0.5), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for weight in weights:
        weight.grad = torch.ones(2)
    update_weights([optimizer], 0.1)
    assert [1 - weight[0].item() for weight in weights] == pytest.approx([0.1, 0.05])


def test_a_step_of_a_run_clips_its_gradients_and_follows_the_schedule():
    schedule = {"decay": "cosine", "warmup_steps": 2, "minimum_learning_rate": 1e-4}
    recipe = Recipe(data="digits", epochs=0.2, batch_size=32, optimizer={"grad_clip_norm": 1e-3}, schedule=schedule)
    trainer = trainer_for(recipe)
    seen, peak, total = [], trainer.config.optimizer.learning_rate, trainer.duration.total_steps

    def look(*_):
        gradients = [
            parameter.grad.flatten() for parameter in trainer.parameters.values() if parameter.grad is not None
        ]
        seen.append(float(torch.cat(gradients).norm()))

    trainer.optimizers[0].register_step_pre_hook(look)
    images, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    for step in range(total):
        _, norm = trainer.step(images, labels)
        assert norm > 1e-2 and seen[-1] <= 1.001e-3
        expected = learning_rate_at(step, total, peak, trainer.config.schedule)
        assert trainer.last_learning_rate == pytest.approx(expected)
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)
    assert total == 11 and trainer.config.schedule.warmup_steps == 2


def test_the_average_is_the_weighted_sum_of_all_weights_and_batch_norm_statistics():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, decay=0.5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(6):
        model(torch.randn(4, 2))
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 2))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            mixed = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
            expected[name] = mixed.clone()
    torch.testing.assert_close(dict(average.model.state_dict()), expected)
    assert average.model[1].num_batches_tracked == 6


def test_without_decay_the_average_is_the_model():
    model = nn.Linear(2, 2)
    assert WeightAverage(model, decay=0.0).model is model


def test_losses_equal_torchs_own():
    logits, labels = torch.randn(5, 4), torch.randint(4, (5,))
    smoothed = F.one_hot(labels, 4) * 0.9 + 0.1 / 4
    softmax, sigmoid = build_loss("softmax"), build_loss("sigmoid")
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(softmax(logits, smoothed), expected)
    expected = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="sum")
    torch.testing.assert_close(sigmoid(logits, smoothed), expected)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1])
    expected = F.binary_cross_entropy_with_logits(logits, smoothed, weight=weights, reduction="sum")
    torch.testing.assert_close(build_loss("sigmoid", weights)(logits, smoothed), expected)


def test_class_weights_make_every_class_count_the_same():
    labels = np.array([0] * 6 + [1] * 3 + [3])
    weights = balancing_weights(labels, 4).numpy()
    assert weights[labels].mean() == pytest.approx(1.0)
    assert [weights[k] * (labels == k).sum() for k in (0, 1, 3)] == pytest.approx([10 / 3] * 3)
    assert weights[2] == 1.0
