"""Mixing mixes images and targets by the same share."""

import math

import pytest
import torch

from coatnet.data.mixing import Mixing, mix, smooth
from coatnet.errors import UserError


@pytest.fixture
def images():
    """Image b is constant b, so that a blend shows its partner and its share."""
    return torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)


LABELS = torch.arange(8) % 5
ONE_HOT = torch.nn.functional.one_hot(LABELS, 5).float()


def test_without_mixing_images_are_unchanged_and_targets_one_hot(images):
    mixed, targets = mix(images, LABELS, num_classes=5, mixing=Mixing(), seed=0)
    assert mixed is images
    assert torch.equal(targets, ONE_HOT)


def test_smoothing_equals_cross_entropy_with_label_smoothing():
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    targets = smooth(LABELS, num_classes=5, label_smoothing=0.1)
    ours = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, LABELS, label_smoothing=0.1))


def test_smoothing_of_several_labels_goes_towards_one_half():
    labels = torch.tensor([[1, 0, 1]], dtype=torch.uint8)
    torch.testing.assert_close(smooth(labels, num_classes=3, label_smoothing=0.2), torch.tensor([[0.9, 0.1, 0.9]]))


@pytest.mark.parametrize("seed", range(5))
def test_mixup_mixes_images_and_targets_by_the_same_share(images, seed):
    mixed, targets = mix(images, LABELS, num_classes=5, mixing=Mixing(mixup_alpha=0.8), seed=seed)
    partners = torch.arange(8).roll(1)
    share = 1 - (mixed[1, 0, 0, 0] - 1) / (0 - 1)
    torch.testing.assert_close(mixed, images * share + images[partners] * (1 - share))
    torch.testing.assert_close(targets, ONE_HOT * share + ONE_HOT[partners] * (1 - share))


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_pastes_a_box_and_weights_targets_by_its_area(images, seed):
    mixed, targets = mix(images, LABELS, num_classes=5, mixing=Mixing(cutmix_alpha=1.0), seed=seed)
    pasted = mixed[1, 0] == 0
    share = 1 - pasted.float().mean()
    partners = torch.arange(8).roll(1)
    assert torch.equal(mixed, torch.where(pasted, images[partners], images))
    torch.testing.assert_close(targets, ONE_HOT * share + ONE_HOT[partners] * (1 - share))


@pytest.mark.parametrize("mixing", [Mixing(0.8), Mixing(0.0, 1.0), Mixing(0.8, 1.0, 0.1)])
def test_targets_remain_probabilities_and_images_channels_last(images, mixing):
    for seed in range(10):
        mixed, targets = mix(images, LABELS, num_classes=5, mixing=mixing, seed=seed)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        assert (targets >= 0).all()
        assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_with_both_one_is_drawn_for_each_batch(images):
    pasted = 0
    for seed in range(200):
        mixed, _ = mix(images, LABELS, num_classes=5, mixing=Mixing(0.8, 1.0), seed=seed)
        pasted += int(((mixed == images) | (mixed == images.roll(1, 0))).all())
    assert 70 < pasted < 130


def test_mixing_is_a_function_of_its_seed(images):
    mixing = Mixing(0.8, 1.0)
    first = mix(images, LABELS, num_classes=5, mixing=mixing, seed=3)
    torch.manual_seed(99)
    again = mix(images, LABELS, num_classes=5, mixing=mixing, seed=3)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], mix(images, LABELS, num_classes=5, mixing=mixing, seed=4)[1])


@pytest.mark.parametrize("field", ["mixup_alpha", "cutmix_alpha", "label_smoothing"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_impossible_strengths_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        Mixing(**{field: value})
