"""Every figure equals its definition, for any batch size."""

import numpy as np
import pytest
import torch
from torch import Tensor

from coatnet.errors import UserError
from coatnet.evaluation.metrics import Metrics, paired_difference, wilson_interval


def sample(num_images: int = 203, num_classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    logits = 2 * torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), labels] += 2
    return logits, labels


def multilabel_sample(num_images: int = 211, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(num_images, num_classes, generator=generator) < 0.3).to(torch.uint8)
    logits = torch.randn(num_images, num_classes, generator=generator) + 2 * labels - 1
    return (4 * logits).round() / 4, labels  # rounded: average precision must treat ties right


def count(logits: Tensor, labels: Tensor, batch_size: int) -> Metrics:
    metrics = Metrics(logits.shape[1], multilabel=labels.ndim == 2)
    for first in range(0, len(labels), batch_size):
        metrics.update(logits[first : first + batch_size], labels[first : first + batch_size])
    return metrics


@pytest.mark.parametrize("data", [sample(), multilabel_sample()], ids=["single", "multi"])
@pytest.mark.parametrize("batch_size", [1, 2, 64, 100])
def test_figures_do_not_depend_on_the_batch_size(data: tuple[Tensor, Tensor], batch_size: int) -> None:
    whole, pieces = count(*data, batch_size=10_000), count(*data, batch_size)
    assert pieces.compute() == whole.compute()
    assert pieces.intervals() == whole.intervals()
    assert pieces.per_class() == whole.per_class()
    assert pieces.calibration() == whole.calibration()
    assert pieces.confused_pairs() == whole.confused_pairs()


def test_no_interval_claims_that_all_images_are_right() -> None:
    labels = torch.arange(20) % 3
    found = count(10 * torch.eye(3)[labels], labels, 64).intervals()
    assert found["macro_recall"] is None and found["macro_f1"] is None
    assert found["top1"] == wilson_interval(20, 20)
    right = np.ones(50, bool)
    least, most = paired_difference(right, right)
    assert -least == most == wilson_interval(0, 50)[1] > 0.05


def test_single_label_figures_equal_torchmetrics() -> None:
    reference = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = sample()
    metrics = count(logits, labels, 64)
    figures, probabilities = metrics.compute(), logits.softmax(1)
    options = {"num_classes": 7, "average": "macro"}
    expected = {
        "top1": reference.multiclass_accuracy(logits, labels, num_classes=7, average="micro"),
        "top5": reference.multiclass_accuracy(logits, labels, num_classes=7, average="micro", top_k=5),
        "macro_recall": reference.multiclass_recall(logits, labels, **options),
        "macro_f1": reference.multiclass_f1_score(logits, labels, **options),
        "nll": torch.nn.functional.cross_entropy(logits, labels),
        "brier": ((probabilities - torch.nn.functional.one_hot(labels, 7)) ** 2).sum(1).mean(),
        "calibration_error": reference.multiclass_calibration_error(logits, labels, num_classes=7, n_bins=15),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(float(value), abs=1e-6), name
    matrix = reference.multiclass_confusion_matrix(logits, labels, num_classes=7).numpy()
    assert np.array_equal(metrics.confusion(), matrix)
    pairs = metrics.confused_pairs(limit=100)
    assert all(matrix[truth, predicted] == number for truth, predicted, number in pairs)
    assert sum(number for _, _, number in pairs) == matrix.sum() - matrix.trace()


def test_per_class_figures_equal_scikit_learn() -> None:
    reference = pytest.importorskip("sklearn.metrics")
    logits, labels = sample()
    rows = count(logits, labels, 64).per_class()
    expected = reference.precision_recall_fscore_support(labels, logits.argmax(1))
    actual = [[row.precision, row.recall, row.f1, row.support] for row in rows]
    np.testing.assert_allclose(np.array(actual).T, expected)


def test_multilabel_figures_equal_scikit_learn() -> None:
    reference = pytest.importorskip("sklearn.metrics")
    logits, labels = multilabel_sample()
    metrics = count(logits, labels, 64)
    figures, claims = metrics.compute(), (logits >= 0).numpy()
    expected = {
        "mean_average_precision": reference.average_precision_score(labels, logits, average="macro"),
        "micro_f1": reference.f1_score(labels, claims, average="micro"),
        "macro_f1": reference.f1_score(labels, claims, average="macro"),
        "exact_match": reference.accuracy_score(labels, claims),
        "nll": float(torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())),
        "brier": float(((logits.sigmoid() - labels) ** 2).mean()),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-6), name
    for k, row in enumerate(metrics.per_class()):
        assert row.average_precision == pytest.approx(reference.average_precision_score(labels[:, k], logits[:, k]))
        assert row.recall == pytest.approx(reference.recall_score(labels[:, k], claims[:, k]))
    assert metrics.confusion() is None and metrics.confused_pairs() == []


def test_a_constant_output_has_chance_accuracy() -> None:
    labels = torch.arange(10).repeat(3)
    figures = count(torch.zeros(30, 10), labels, 7).compute()
    assert (figures["top1"], figures["top5"]) == (0.1, 0.5)
    assert figures["nll"] == pytest.approx(np.log(10))
    assert figures["calibration_error"] == pytest.approx(0)


def test_top5_is_left_out_for_five_classes_or_fewer() -> None:
    assert "top5" not in count(*sample(num_classes=5), batch_size=64).compute()


def test_huge_logits_stay_finite() -> None:
    figures = count(torch.tensor([[1e30, -1e30], [-800.0, 800.0]]), torch.tensor([0, 0]), 2).compute()
    assert figures["nll"] == 800 and figures["top1"] == 0.5
    figures = count(torch.tensor([[900.0, -900.0]]), torch.tensor([[1, 1]]), 1).compute()
    assert figures["nll"] == 450


def test_classes_without_images_have_no_figures() -> None:
    logits, labels = sample(num_classes=4)
    logits[:, 3] = -100
    row = count(logits[labels != 3], labels[labels != 3], 64).per_class()[3]
    assert (row.support, row.precision, row.recall, row.f1) == (0, None, None, None)
    silent = count(torch.zeros(2, 2), torch.tensor([[1, 0], [0, 0]]), 2).per_class()[1]
    assert (silent.support, silent.recall, silent.average_precision) == (0, None, None)


def test_the_calibration_error_is_the_sum_over_its_bins() -> None:
    metrics = count(*sample(), batch_size=64)
    bins = metrics.calibration()
    total = sum(row.count * abs(row.confidence - row.accuracy) for row in bins if row.count) / 203
    assert sum(row.count for row in bins) == 203
    assert metrics.compute()["calibration_error"] == pytest.approx(total)


def test_invalid_logits_and_labels_are_refused() -> None:
    metrics = Metrics(3)
    with pytest.raises(UserError, match="not finite"):
        metrics.update(torch.tensor([[0.0, float("nan"), 0.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="do not fit 3 classes"):
        metrics.update(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"must lie in 0\.\.2"):
        metrics.update(torch.zeros(1, 3), torch.tensor([3]))
    with pytest.raises(ValueError, match="no images"):
        metrics.compute()
