"""A probe equals scikit-learn's logistic regression and a plain loop over neighbors."""

import errno
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from tests.training.trainers import trainer_for

from coatnet.bundle import Bundle, load
from coatnet.cli.main import main
from coatnet.data.datasets import ArrayDataset
from coatnet.data.open import open_dataset
from coatnet.data.splits import Splits
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError
from coatnet.evaluation.evaluate import evaluate, open_recorded
from coatnet.evaluation.features import extract_features
from coatnet.evaluation.metrics import Metrics, wilson_interval
from coatnet.evaluation.probe import L2_STRENGTHS, TEMPERATURE, _hold_out, fit_linear, fit_logistic, knn_scores, probe
from coatnet.model.network import create_model
from coatnet.training.config import Recipe
from coatnet.training.defaults import open_splits
from coatnet.training.recipes import named_recipe


def clusters(num_images: int, *, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, 12) around one point a class, and labels of 5 classes."""
    centers = np.random.default_rng(99).normal(size=(5, 12))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 5, num_images)
    features = centers[labels] + spread * generator.normal(size=(num_images, 12))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def linear_scores(features, labels, others, num_classes: int) -> tuple[torch.Tensor, float]:
    """Logits of others, and the L2 strength."""
    fitted = fit_linear(features, labels, num_classes)
    return fitted.scores(others), fitted.l2


def several(num_images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, 12), and three labels of which an image may have any number, (N, 3)."""
    features, _ = clusters(num_images, spread=1.0, seed=seed)
    noise = torch.from_numpy(np.random.default_rng(seed + 50).normal(size=(num_images, 3)))
    return features, (features[:, :3] + noise > 0.5).to(torch.uint8)


def objective(features, labels, weight, bias, l2: float) -> float:
    """Mean cross-entropy + l2 / 2 |W|^2 in double precision."""
    logits = features.double() @ weight.double().T + bias.double()
    return float(torch.nn.functional.cross_entropy(logits, labels) + l2 / 2 * weight.double().square().sum())


@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
def test_logistic_regression_equals_scikit_learn(l2: float) -> None:
    features, labels = clusters(400, spread=1.5)
    others, _ = clusters(300, spread=1.5, seed=1)
    weight, bias = fit_logistic(features, labels, 5, l2=l2)
    peer = LogisticRegression(C=1 / (l2 * 400), max_iter=10_000, tol=1e-8).fit(features.double(), labels)
    least = objective(features, labels, torch.from_numpy(peer.coef_), torch.from_numpy(peer.intercept_), l2)
    assert objective(features, labels, weight, bias, l2) == pytest.approx(least, rel=1e-5)
    agreement = ((others @ weight.T + bias).argmax(1).numpy() == peer.predict(others.double())).mean()
    assert agreement >= 0.99


def test_multilabel_is_one_regression_per_label() -> None:
    features, labels = several(300)
    weight, bias = fit_logistic(features, labels, 3, l2=1e-2)
    for k in range(3):
        peer = LogisticRegression(C=1 / (1e-2 * 300), max_iter=10_000, tol=1e-8).fit(features.double(), labels[:, k])
        assert weight[k].numpy() == pytest.approx(peer.coef_[0], abs=1e-3)
        assert float(bias[k]) == pytest.approx(float(peer.intercept_[0]), abs=1e-3)


def test_results_do_not_depend_on_the_rows_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(100, spread=1.5)
    others, _ = clusters(70, spread=1.5, seed=1)
    whole = *fit_logistic(features, labels, 5, l2=1e-2), knn_scores(features, labels, others, 5, k=9)
    monkeypatch.setattr(sys.modules["coatnet.evaluation.probe"], "LOGIT_ROWS_PER_STEP", 7)
    monkeypatch.setattr(sys.modules["coatnet.evaluation.probe"], "KNN_NUMBERS_PER_STEP", 500)
    parts = *fit_logistic(features, labels, 5, l2=1e-2), knn_scores(features, labels, others, 5, k=9)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)


def naive_votes(features: torch.Tensor, labels: torch.Tensor, others: torch.Tensor, k: int) -> np.ndarray:
    """The double loop: every other image, every neighbor."""
    rows = labels.numpy() if labels.ndim == 2 else np.eye(5)[labels]
    votes = np.zeros((len(others), rows.shape[1]))
    for row, other in enumerate(others.double().numpy()):
        similarities = []
        for feature in features.double().numpy():
            similarities.append(other @ feature / np.linalg.norm(other) / np.linalg.norm(feature))
        total = 0.0
        for neighbor in sorted(range(len(features)), key=lambda index: -similarities[index])[:k]:
            weight = math.exp(similarities[neighbor] / TEMPERATURE)
            votes[row] += weight * rows[neighbor]
            total += weight
        votes[row] /= total
    return votes


@pytest.mark.parametrize("k", [1, 5, 60])
def test_knn_votes_equal_a_plain_loop(k: int) -> None:
    for (features, labels), (others, _) in (
        (clusters(60, spread=1.5), clusters(25, spread=1.5, seed=1)),
        (several(60), several(25, seed=1)),
    ):
        votes = knn_scores(features, labels, others, 5, k=k)
        assert votes.numpy() == pytest.approx(naive_votes(features, labels, others, k), abs=1e-4)


def test_accuracy_of_separable_features_and_of_shuffled_labels() -> None:
    features, labels = clusters(300, spread=0.05)
    others, truth = clusters(400, spread=0.05, seed=1)
    shuffled = labels[torch.from_numpy(np.random.default_rng(2).permutation(300))]
    for scores_of in (
        lambda labels: knn_scores(features, labels, others, 5, k=20),
        lambda labels: linear_scores(features, labels, others, 5)[0],
    ):
        assert (scores_of(labels).argmax(1) == truth).all()
        # The features of a class are alike, and so are their predictions: chance is 1 class of 5, give or take one.
        assert (scores_of(shuffled).argmax(1) == truth).float().mean() <= 0.45


def test_noise_has_chance_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    features, others = (torch.randn(400, 12, generator=generator) for _ in range(2))
    labels, truth = (torch.randint(0, 5, (400,), generator=generator) for _ in range(2))
    for scores in (knn_scores(features, labels, others, 5, k=20), linear_scores(features, labels, others, 5)[0]):
        low, high = wilson_interval(int((scores.argmax(1) == truth).sum()), 400)
        assert low <= 0.2 <= high


def test_the_linear_probe_ignores_the_scale_of_features() -> None:
    features, labels = clusters(200, spread=1.0)
    others, _ = clusters(80, spread=1.0, seed=1)
    scores, l2 = linear_scores(features, labels, others, 5)
    scale, shift = torch.logspace(-3, 3, 12), torch.linspace(-5, 5, 12)
    moved, moved_l2 = linear_scores(features * scale + shift * scale, labels, others * scale + shift * scale, 5)
    assert moved_l2 == l2
    torch.testing.assert_close(moved, scores, rtol=1e-2, atol=5e-2)
    constant = torch.full((200, 1), 0.3), torch.full((80, 1), 0.3) + 1e-7
    padded, _ = linear_scores(torch.cat([features, constant[0]], 1), labels, torch.cat([others, constant[1]], 1), 5)
    torch.testing.assert_close(padded, scores, rtol=1e-2, atol=5e-2)


def test_of_strengths_that_are_equally_right_the_strongest_is_taken() -> None:
    features, labels = clusters(40, spread=0.01)
    assert linear_scores(features, labels, features, 5)[1] == L2_STRENGTHS[0]


def test_the_strength_is_the_best_one_on_images_that_were_held_out() -> None:
    # The class is a small difference of two large features, which a strong penalty does not let through.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    common = torch.randn(400, generator=generator)
    apart = 0.02 * (2 * labels - 1) + 0.01 * torch.randn(400, generator=generator)
    features = torch.stack([common, common + apart], dim=1)
    spread, mean = torch.std_mean(features, dim=0, correction=0)
    scaled, held_out = (features - mean) / spread, _hold_out(labels)
    found = {}
    for l2 in L2_STRENGTHS:
        weight, bias = fit_logistic(scaled[~held_out], labels[~held_out], 2, l2=l2)
        found[l2] = float(((scaled[held_out] @ weight.T + bias).argmax(1) == labels[held_out]).float().mean())
    best = max(found, key=lambda l2: found[l2])
    assert best != L2_STRENGTHS[0] and fit_linear(features, labels, 2).l2 == best


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=2, in_channels=1, resolution=8).eval()
    return Bundle(model, ("x", "y"), Preprocessing(resolution=8, mean=(0.5,), std=(0.5,)))


def part(dataset: ArrayDataset, keep: np.ndarray) -> ArrayDataset:
    return ArrayDataset(dataset.name, dataset.classes, dataset.images[keep], dataset.labels[keep])


@pytest.fixture(scope="module")
def digits() -> Splits:
    """300 and 100 of them, so that it does not take long."""
    whole = open_dataset("digits", validation_fraction=0.3)
    parts = ((whole.training, 300), (whole.validation, 100))
    return Splits(
        "digits", *(part(dataset, np.linspace(0, len(dataset) - 1, size).astype(int)) for dataset, size in parts)
    )


@pytest.mark.slow
def test_a_probe_equals_its_parts_and_is_deterministic(bundle: Bundle, digits: Splits) -> None:
    report = probe(bundle, digits, k=7)
    features, labels, _ = extract_features(bundle, digits, split="training").gather()
    others, truth, _ = extract_features(bundle, digits, split="validation").gather()
    assert (report.n, report.num_training, report.num_features) == (100, 300, bundle.model.num_features)
    for scores, value, interval in (
        (knn_scores(features, labels, others, 10, k=7), report.knn, report.knn_interval),
        (linear_scores(features, labels, others, 10)[0], report.linear, report.linear_interval),
    ):
        right = int((scores.argmax(1) == truth).sum())
        assert value == right / 100 and interval == wilson_interval(right, 100)
        assert value > 0.5  # features of random weights tell digits apart
    assert probe(bundle, digits, k=7) == report
    assert probe(bundle, digits, k=7, batch_size=300).n == 100
    values = json.loads(report.to_json())
    assert values["linear"] == report.linear and values["knn_interval"] == list(report.knn_interval)
    assert f"{100 * report.knn:.1f} %" in report.to_text() and "100 held-out images of digits" in report.to_text()


def test_multilabel_probe_reports_mean_average_precision(bundle: Bundle, digits: Splits) -> None:
    def even_and_large(dataset: ArrayDataset) -> ArrayDataset:
        labels = np.stack([dataset.labels % 2 == 0, dataset.labels >= 5], axis=1)
        return ArrayDataset("digits", ("even", "large"), dataset.images, labels)

    splits = Splits("digits", even_and_large(digits.training), even_and_large(digits.validation))
    report = probe(bundle, splits)
    features, labels, _ = extract_features(bundle, splits, split="training").gather()
    others, truth, _ = extract_features(bundle, splits, split="validation").gather()
    metrics = Metrics(2, multilabel=True)
    metrics.update(knn_scores(features, labels, others, 2, k=20), truth)
    assert report.figure == "mean_average_precision"
    assert report.knn == metrics.compute()["mean_average_precision"]
    assert 0.6 < report.linear <= 1 and report.linear_interval[0] < report.linear < report.linear_interval[1]
    assert "mean average precision" in report.to_text()


def test_data_that_cannot_be_probed_is_refused(bundle: Bundle, digits: Splits) -> None:
    training, validation = digits.training, digits.validation
    for k in (0, 301):
        with pytest.raises(UserError, match=f"k is {k}; it must be 1 to 300, the training images of digits"):
            probe(bundle, digits, k=k)
    with pytest.raises(UserError, match="digits: 1 of 10 classes with training images"):
        probe(bundle, Splits("digits", part(training, training.labels == 3), validation))
    with pytest.raises(UserError, match="digits: the validation split holds no images"):
        probe(bundle, Splits("digits", training, part(validation, validation.labels < 0)))
    with pytest.raises(UserError, match="digits: 0 of 10 classes"):
        probe(bundle, Splits("digits", part(training, training.labels < 0), validation))
    with pytest.raises(UserError, match="digits is one dataset"):
        probe(bundle, training)
    one_of_each = part(training, np.unique(training.labels, return_index=True)[1])
    with pytest.raises(UserError, match="no class has two training images"):
        probe(bundle, Splits("digits", one_of_each, validation), k=1)


def test_a_class_without_training_images_is_never_predicted(bundle: Bundle, digits: Splits) -> None:
    report = probe(bundle, Splits("digits", part(digits.training, digits.training.labels != 3), digits.validation))
    missing = (digits.validation.labels == 3).mean()
    assert 0.4 < report.linear <= 1 - missing and 0.4 < report.knn <= 1 - missing


# The linear probe as a model


def colorful(splits: Splits, multilabel: bool) -> Splits:
    """Digits in red, whose labels are a digit, or whether it is even and whether it is large."""

    def painted(dataset: ArrayDataset) -> ArrayDataset:
        images = np.stack([dataset.images, dataset.images // 2, dataset.images // 4], axis=-1)
        if not multilabel:
            return ArrayDataset("digits", dataset.classes, images, dataset.labels)
        labels = np.stack([dataset.labels % 2 == 0, dataset.labels >= 5], axis=1)
        return ArrayDataset("digits", ("even", "large"), images, labels)

    return Splits("digits", painted(splits.training), painted(splits.validation))


@pytest.fixture
def one_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search for the L2 strength, which takes most of the time."""
    monkeypatch.setattr(sys.modules["coatnet.evaluation.probe"], "L2_STRENGTHS", (1e-2,))


@pytest.fixture(scope="module")
def timm_bundle() -> Bundle:
    """A network of timm's, for color, that had several labels of other classes."""
    torch.manual_seed(0)
    model = create_model("test_coatnet", num_classes=3, resolution=32).eval()
    return Bundle(model, ("a", "b", "c"), Preprocessing(resolution=32), multilabel=True)


@pytest.mark.parametrize("kind", ["gray", "timm", "timm, several labels"])
def test_the_model_of_a_probe_has_the_figures_of_the_probe(
    kind, bundle, timm_bundle, digits, one_strength, tmp_path, capsys
) -> None:
    start, splits = (bundle, digits) if kind == "gray" else (timm_bundle, colorful(digits, multilabel="labels" in kind))
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    plain, report = probe(start, splits), probe(start, splits, out=tmp_path / "out")
    assert replace(report, out=None) == plain and report.out == str(tmp_path / "out")
    found = load(tmp_path / "out")
    assert (found.classes, found.multilabel) == (splits.classes, splits.multilabel)
    assert found.preprocessing == start.preprocessing
    assert found.calibration is not None
    after = found.uncalibrated().model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"head.classifier.weight", "head.classifier.bias"}
    assert all(torch.equal(before[name], value) for name, value in start.model.state_dict().items())

    evaluated = evaluate(found, splits)
    assert evaluated.figures[report.figure] == report.linear == plain.linear > 0.5
    features, labels, _ = extract_features(start, splits, split="training").gather()
    others, _, _ = extract_features(start, splits, split="validation").gather()
    fitted = fit_linear(features, labels, len(splits.classes))
    with torch.no_grad():
        folded = found.uncalibrated().model.get_classifier()(others)
    torch.testing.assert_close(folded, fitted.scores(others), rtol=1e-3, atol=1e-3)

    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["figures"] == dict(evaluated.figures) == found.record["report"]["figures"]
    pictures = {"calibration.png", "mistakes.png", "probabilities.npy" if splits.multilabel else "confusion.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "bundle",
        "predictions.csv",
        "report.html",
        "report.md",
        "report.json",
    } | pictures
    about = {"model": start.model.variant.name, "data": "digits", "num_training": 300, "l2": fitted.l2}
    assert found.record["probe"] == about | {"validation_fraction": 0.1}
    card = (tmp_path / "out" / "bundle" / "README.md").read_text()
    assert f"the network is that of {start.model.variant.name.replace('_', chr(92) + '_')}, unchanged" in card
    assert f"coatnet predict {tmp_path / 'out'} IMAGE" in report.to_text()
    capsys.readouterr()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["run"], listed["model"], listed["data"]) == ("out", start.model.variant.name, "digits")
    assert (listed["value"], listed["n"], listed["state"]) == (report.linear, report.n, "finished")


def test_copies_are_on_one_side_as_in_a_training_that_starts_from_the_probe(bundle, one_strength, tmp_path) -> None:
    generator, data = np.random.default_rng(0), tmp_path / "images"
    for label in ("ant", "bee"):
        (data / label).mkdir(parents=True)
        for number in range(20):
            Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(data / label / f"{number}.png")
    held_out = names_of(open_dataset(data).validation)
    for name in held_out:
        shutil.copy(data / name, data / Path(name).with_name("copy-of-" + Path(name).name))
    parted = open_dataset(data)
    copies = [{name, str(Path(name).with_name("copy-of-" + Path(name).name))} for name in held_out]
    assert any(0 < len(pair & names_of(parted.validation)) < 2 for pair in copies)

    # What the model was trained on before says nothing about these images.
    recipe = {"data": "others", "validation_fraction": 0.5, "fold": "1/2", "training_images": 4}
    probe(replace(bundle, record={"recipe": recipe}), data, k=1, out=tmp_path / "probe")
    found = load(tmp_path / "probe")
    assert found.record["report"]["figures"]["n"] == len(open_recorded(data, found).validation)
    _, trained = open_splits(Recipe(data=str(data)), print)
    assert names_of(trained.validation) == names_of(open_recorded(data, found).validation)
    assert all(len(pair & names_of(trained.validation)) in (0, 2) for pair in copies)


def names_of(dataset) -> set[str]:
    return {dataset.describe(index) for index in range(len(dataset))}


@pytest.mark.slow
def test_the_model_of_a_probe_is_measured_on_its_held_out_images_and_a_start(bundle, one_strength, tmp_path) -> None:
    """The model that it starts from may have held out another fraction than the usual one."""
    first = replace(bundle, record={"recipe": {"data": "digits", "validation_fraction": 0.5}})
    report = probe(first, "digits", k=1, out=tmp_path / "probe")
    assert report.n == len(open_dataset("digits", validation_fraction=0.5).validation)
    assert evaluate(tmp_path / "probe", "digits").figures["n"] == report.n

    start = load(tmp_path / "probe")
    trainer = trainer_for(named_recipe("finetune", {"init": str(tmp_path / "probe"), "data": "digits"}), init=start)
    assert "probe, its classifier kept" in trainer.describe()
    assert torch.equal(trainer.model.get_classifier().weight, start.model.get_classifier().weight)


def test_a_folder_that_cannot_be_the_model_is_refused_before_any_work(bundle: Bundle, digits: Splits, tmp_path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists already: give a new folder"):
        probe("no such model", "no such data", out=tmp_path / "there")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="would be read as images of a class; give a folder outside"):
        probe("no such model", tmp_path / "images", out=tmp_path / "images" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out could not be written"):
        probe("no such model", "digits", out=tmp_path / "file" / "out")
    with pytest.raises(UserError, match="no such model is not a bundle"):
        probe("no such model", "digits", out=tmp_path / "new")
    with pytest.raises(UserError, match="k is 301"):
        probe(bundle, digits, k=301, out=tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "images", "there"]


def test_a_full_disk_costs_the_model_and_not_the_figures(bundle, one_strength, tmp_path, monkeypatch, capsys) -> None:
    bundle.save(tmp_path / "start")

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.modules["coatnet.evaluation.probe"], "write_report", full)
    assert main(["probe", str(tmp_path / "start"), "--data", "digits", "--out", str(tmp_path / "out"), "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["figure"] == "top1" and json.loads(printed.out)["out"] is None
    assert f"{tmp_path}/out could not be written: No space left on device" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_few_images_are_all_neighbors(bundle: Bundle, digits: Splits, one_strength) -> None:
    few = Splits("digits", part(digits.training, np.arange(0, 300, 20)), digits.validation)
    assert probe(bundle, few).k == 15
