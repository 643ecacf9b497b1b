"""Wrong labels are found as cleanlab finds them, by probabilities of images that were not learned from."""

import numpy as np
import pytest
import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores

from coatnet.bundle import Bundle
from coatnet.data.datasets import ArrayDataset
from coatnet.data.splits import Splits, assign_folds
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError
from coatnet.evaluation.label_check import (
    check_labels,
    confident_suspects,
    far_out,
    judge,
    neighbor_distances,
    out_of_fold,
)
from coatnet.model.network import create_model


def noisy(num_images: int = 400, num_classes: int = 4, wrong: int = 20) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Features (N, 8) around a point a class, labels of which some are wrong, and which are."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, num_classes, num_images)
    features = generator.normal(size=(num_classes, 8))[truth] * 2 + generator.normal(size=(num_images, 8))
    labels, rows = truth.copy(), generator.choice(num_images, wrong, replace=False)
    labels[rows] = (truth[rows] + generator.integers(1, num_classes, wrong)) % num_classes
    return torch.from_numpy(features).float(), labels, labels != truth


@pytest.mark.parametrize(("seed", "num_classes"), [(0, 5), (1, 5), (2, 2), (3, 2)])
def test_suspects_and_their_order_are_those_of_cleanlab(seed: int, num_classes: int) -> None:
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.full(num_classes, 0.4), 600)
    labels = np.array([generator.choice(num_classes, p=row) for row in probabilities])
    suspected, _, scores = confident_suspects(probabilities, labels)
    expected = find_label_issues(labels, probabilities, filter_by="confident_learning", n_jobs=1)
    assert 0 < suspected.sum() < 600 and (suspected == expected).all()
    np.testing.assert_allclose(scores, get_label_quality_scores(labels, probabilities, method="self_confidence"))


def test_the_suggestion_is_the_class_that_is_confident() -> None:
    # Thresholds: 0.7 for class 0, 0.35 for class 1, and class 2 has no image. Row 3 is above that of class 1 alone.
    probabilities = np.array([[0.9, 0.05, 0.05], [0.5, 0.1, 0.4], [0.3, 0.6, 0.1], [0.45, 0.1, 0.45], [0.2, 0.5, 0.3]])
    labels = np.array([0, 0, 1, 1, 0])
    suspected, suggested, scores = confident_suspects(probabilities, labels)
    assert suspected.tolist() == [False, False, False, False, True] and suggested[4] == 1
    assert scores[4] == pytest.approx(0.2)


def test_no_image_is_judged_by_a_probe_that_learned_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, _ = noisy(60)
    folds = assign_folds([str(row) for row in range(60)], labels, 5)
    with monkeypatch.context() as patch:  # another label would move other images to other folds
        patch.setattr("coatnet.evaluation.label_check.assign_folds", lambda *_: folds)
        before = out_of_fold(features, torch.from_numpy(labels), 4)
        changed = labels.copy()
        changed[7] = (changed[7] + 1) % 4
        after = out_of_fold(features, torch.from_numpy(changed), 4)
    np.testing.assert_allclose(before.sum(dim=1).numpy(), 1, atol=1e-5)
    same = torch.from_numpy(folds == folds[7])
    torch.testing.assert_close(after[same], before[same], rtol=0, atol=0)
    assert not torch.equal(after[~same], before[~same])  # the other folds have learned from it
    random = torch.from_numpy(np.random.default_rng(1).normal(size=(200, 150))).float()  # could be learned by heart
    guesses = torch.from_numpy(np.random.default_rng(2).integers(0, 2, 200))
    right = (out_of_fold(random, guesses, 2).argmax(dim=1) == guesses).float().mean()
    assert 0.3 < right < 0.7


def test_folds_hold_as_many_of_each_class() -> None:
    labels = np.array([0] * 50 + [1] * 13 + [2] * 3)
    folds = assign_folds([str(row) for row in range(66)], labels, 5)
    for label in range(3):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert set(np.bincount(folds)) <= {13, 14}


def test_most_wrong_labels_are_first() -> None:
    features, labels, wrong = noisy()
    suspected, _, scores = confident_suspects(out_of_fold(features, torch.from_numpy(labels), 4).numpy(), labels)
    assert wrong[np.argsort(scores)[:20]].mean() > 0.8 and wrong[suspected].mean() > 0.7


def test_a_probe_without_the_suspects_finds_more_labels_that_are_a_similar_class() -> None:
    """60 images of one class are labeled as one that looks much like it, which a probe then believes of others."""
    generator = np.random.default_rng(3)
    truth, centers = generator.integers(0, 4, 800), generator.normal(size=(4, 12))
    centers[1] = centers[0] + 0.5 * generator.normal(size=12)
    features = torch.from_numpy(centers[truth] + 0.7 * generator.normal(size=(800, 12))).float()
    labels = truth.copy()
    labels[generator.choice(np.flatnonzero(truth == 0), 60, replace=False)] = 1
    wrong = labels != truth
    first, judged = (each.numpy() for each in judge(features, torch.from_numpy(labels), 4))
    found, more = (wrong[np.argsort(confident_suspects(each, labels)[2])[:60]].mean() for each in (first, judged))
    assert more >= found + 0.05
    np.testing.assert_allclose(judged.sum(axis=1), 1, atol=1e-5)


def test_a_class_that_is_suspected_as_a_whole_is_not_lost() -> None:
    features, labels, _ = noisy()
    labels[labels == 3] = np.resize([0, 3], (labels == 3).sum())  # one class in two names
    _, judged = judge(features, torch.from_numpy(labels), 5)  # and one without images
    assert torch.isfinite(judged).all() and (judged.argmax(dim=1) == 3).any()


def test_distances_to_neighbors_equal_a_plain_loop() -> None:
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(30, 5)))
    unit = features / features.norm(dim=1, keepdim=True)
    expected = [
        sorted((1 - unit[row] @ unit[other]).item() for other in range(30) if other != row)[:3] for row in range(30)
    ]
    np.testing.assert_allclose(neighbor_distances(features, 3).numpy(), np.mean(expected, axis=1), atol=1e-9)


def test_what_is_far_from_all_others_is_an_outlier() -> None:
    features, _, _ = noisy(200)
    assert far_out(neighbor_distances(features).numpy()).sum() <= 3
    features[7] = -10 * features.mean(dim=0)
    distances = neighbor_distances(features).numpy()
    assert far_out(distances)[7] and distances.argmax() == 7


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=2, in_channels=1, resolution=16)
    return Bundle(model.eval(), ("one", "two"), Preprocessing(resolution=16, mean=(0.5,), std=(0.5,)))


def test_wrong_labels_of_both_splits_are_named(bundle: Bundle) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = (40 + 140 * labels[:, None, None] + generator.integers(0, 30, (60, 16, 16))).astype(np.uint8)
    given = labels.copy()
    given[[5, 44]] = 1 - given[[5, 44]]
    numbers = np.arange(60)
    splits = Splits(
        "stripes",
        ArrayDataset("stripes", ("dark", "light"), images[:40], given[:40], numbers[:40]),
        ArrayDataset("stripes", ("dark", "light"), images[40:], given[40:], numbers[40:]),
    )
    found = check_labels(bundle, splits)
    assert {"stripes[5]", "stripes[44]"} <= {each.name for each in found.suspects}
    worst = next(each for each in found.suspects if each.name == "stripes[44]")
    assert (worst.split, worst.label, worst.suggested) == ("validation", "light", "dark")
    assert len(found.scores) == 60
    assert [each.score for each in found.suspects] == sorted(each.score for each in found.suspects)
    assert "stripes[44]: light, rather dark" in found.describe()


@pytest.mark.slow
def test_classes_that_look_the_same_are_told(bundle: Bundle) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 3  # of the classes 0 and 1 both are gray noise
    images = np.where((labels == 2)[:, None, None], 20, 160) + generator.integers(0, 30, (120, 16, 16))
    dataset = ArrayDataset("noise", ("one", "same", "other"), images.astype(np.uint8), labels)
    splits = Splits("noise", dataset, ArrayDataset("noise", dataset.classes, dataset.images[:0], labels[:0]))
    found = check_labels(bundle, splits)
    assert [pair[:2] for pair in found.alike] == [("one", "same")]


def test_several_labels_an_image_are_refused_in_a_line(bundle: Bundle) -> None:
    dataset = ArrayDataset("some", ("a", "b"), np.zeros((4, 16, 16), np.uint8), np.ones((4, 2), np.uint8))
    with pytest.raises(UserError, match="images have several labels"):
        check_labels(bundle, Splits("some", dataset, dataset))
