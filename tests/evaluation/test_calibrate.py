"""Calibration: temperatures, novelty and sets of classes, stored in the bundle and the same everywhere."""

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from coatnet.bundle import Bundle, load
from coatnet.bundle.calibration import (
    FOLDS,
    METHODS,
    NO_THRESHOLD,
    STEPS,
    is_refused,
    logits_and_means,
    set_scores,
    threshold_index,
)
from coatnet.bundle.hub import CALIBRATION
from coatnet.bundle.weights import write_tensors
from coatnet.cli.main import main
from coatnet.data.datasets import ArrayDataset
from coatnet.data.decode import BadImage
from coatnet.data.open import open_dataset
from coatnet.data.splits import Splits
from coatnet.data.transforms import EvaluationTransform, Preprocessing
from coatnet.errors import UserError
from coatnet.evaluation import calibrate, evaluate, extend, soup
from coatnet.evaluation.calibrate import (
    calibrate_and_evaluate,
    coverage_thresholds,
    fit_temperature,
    sample_outputs,
)
from coatnet.evaluation.evaluate import SplitOutputs
from coatnet.inference.predictor import Predictor
from coatnet.model.network import create_model


@pytest.fixture(scope="module")
def digits() -> Splits:
    return open_dataset("digits")


@pytest.fixture(scope="module")
def trained(digits: Splits) -> Bundle:
    """A small network that has learned the digits somewhat, with far too small logits."""
    torch.manual_seed(0)
    seen = Preprocessing(resolution=8, mean=(0.3,), std=(0.35,), crop_fraction=1.0)
    model = create_model("coatnet-femto-16", num_classes=10, in_channels=1, resolution=8)
    images, labels = images_of(digits.training, seen)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(25):
        rows = torch.randint(len(images), (64,))
        torch.nn.functional.cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.3).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Bundle(model.eval(), digits.classes, seen)


@pytest.fixture(scope="module")
def calibrated(trained: Bundle, digits: Splits) -> Bundle:
    return calibrate(trained, digits)


def images_of(dataset: object, seen: Preprocessing) -> tuple[Tensor, Tensor]:
    pixels, labels = dataset.read_batch(np.arange(len(dataset)))  # pyrefly: ignore
    transform = EvaluationTransform(seen)
    return torch.stack([transform(each) for each in pixels]), torch.as_tensor(labels).long()


def test_the_temperature_is_that_of_least_likelihood_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5000, 7, generator=generator)
    labels = torch.multinomial((3 * logits).softmax(1), 1, generator=generator)[:, 0]
    found = fit_temperature(logits, labels, multilabel=False)
    assert found == pytest.approx(1 / 3, rel=0.05)
    losses = [torch.nn.functional.cross_entropy(logits / t, labels) for t in (found / 1.05, found, found * 1.05)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_each_of_several_labels_has_a_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8000, 3, generator=generator)
    scale = torch.tensor([0.5, 2.0, 1.0])
    labels = (torch.rand(8000, 3, generator=generator) < (scale * logits).sigmoid()).to(torch.uint8)
    labels[:, 2] = 0  # never present: nothing can be learned
    found = fit_temperature(logits, labels, multilabel=True)
    assert found[:2].tolist() == pytest.approx([2, 0.5], rel=0.1)
    assert found[2] == 1


def test_images_that_are_all_right_give_a_finite_temperature() -> None:
    logits = torch.eye(4).repeat(5, 1)
    assert 0.01 < fit_temperature(logits, torch.arange(4).repeat(5), multilabel=False) < 1


def test_coverage_thresholds_are_those_of_split_conformal_prediction() -> None:
    scores = torch.arange(1, 20) / 20  # 19 images
    found = coverage_thresholds(scores)
    assert found[threshold_index(0.9)] == pytest.approx(18 / 20)  # ceil(20 * 0.9) = 18
    assert found[threshold_index(0.95)] == pytest.approx(19 / 20)
    assert found[threshold_index(0.96)] == NO_THRESHOLD  # the 20th of 19
    assert threshold_index(0.999) == len(found) - 1


def test_scores_of_sets_by_hand() -> None:
    probabilities = torch.tensor([[0.2, 0.7, 0.1]])
    assert set_scores(probabilities, "lac")[0].tolist() == pytest.approx([0.8, 0.3, 0.9])
    assert set_scores(probabilities, "aps")[0].tolist() == pytest.approx([0.9, 0.7, 1.0])
    many = torch.full((1, 8), 1 / 8)
    # RAPS adds 0.01 for each rank after the fifth.
    assert set_scores(many, "raps")[0].tolist() == pytest.approx([(k + 1) / 8 + 0.01 * max(0, k - 4) for k in range(8)])


@pytest.mark.slow
def test_calibrated_logits_are_the_networks_over_the_temperature(
    trained: Bundle, calibrated: Bundle, digits: Splits
) -> None:
    images, _ = images_of(digits.validation, trained.preprocessing)
    assert calibrated.calibration is not None
    temperature = calibrated.calibration.temperature[0]
    with torch.inference_mode():
        own, now = trained.model(images), calibrated.model(images)
        torch.testing.assert_close(now, own / temperature)
        torch.testing.assert_close(calibrated.uncalibrated().model(images), own)
    assert trained.uncalibrated() is trained
    again = calibrate(calibrated, digits).calibration
    assert again is not None  # a second calibration starts from the network's own logits
    torch.testing.assert_close(again.temperature, calibrated.calibration.temperature, rtol=1e-3, atol=1e-4)


def test_reported_figures_are_cross_fitted(calibrated: Bundle, trained: Bundle, digits: Splits) -> None:
    report = evaluate(calibrated, digits)
    found, fitted = report.reliability, calibrated.calibration
    assert found is not None and fitted is not None
    assert found.num_shared == len(digits.validation)
    assert found.error_after < found.error_before
    assert report.figures["calibration_error"] == pytest.approx(found.error_after, abs=1e-6)
    assert report.figures["top1"] == evaluate(trained, digits).figures["top1"]
    # By hand: each image at the temperature of the folds without it.
    images, labels = images_of(digits.validation, trained.preprocessing)
    outputs = torch.cat([*logits_and_means(trained.model, images)], 1).detach()
    from coatnet.inference.logits import _digests

    folds = _digests(images) % FOLDS + 1
    logits = outputs[:, :10] / fitted.temperature[folds]
    losses = torch.nn.functional.cross_entropy(logits, labels)
    assert report.figures["nll"] == pytest.approx(float(losses), rel=1e-4)
    assert losses != pytest.approx(
        float(torch.nn.functional.cross_entropy(outputs[:, :10] / fitted.temperature[0], labels))
    )
    # Images that calibration has not seen are measured with what the bundle answers.
    assert (other := evaluate(calibrated, digits, split="training").reliability) is not None and other.num_shared == 0


def test_figures_of_views_are_cross_fitted_too(calibrated: Bundle, digits: Splits) -> None:
    report, fitted = evaluate(calibrated, digits, views="flip"), calibrated.calibration
    found = report.reliability
    assert found is not None and fitted is not None
    assert found.num_shared == len(digits.validation)  # an image is known by its first view
    images, labels = images_of(digits.validation, calibrated.preprocessing)
    from coatnet.inference.logits import _digests

    temperature = fitted.temperature[0] / fitted.temperature[_digests(images) % FOLDS + 1]
    with torch.inference_mode():
        views = [calibrated.model(each) for each in (images, images.flip(-1))]
    mean = (views[0] * temperature).softmax(1) / 2 + (views[1] * temperature).softmax(1) / 2
    assert report.figures["nll"] == pytest.approx(float(torch.nn.functional.nll_loss(mean.log(), labels)), rel=1e-4)
    own = [(each * fitted.temperature[0]).softmax(1) / 2 for each in views]  # of the network without its calibration
    assert found.network["nll"] == pytest.approx(
        float(torch.nn.functional.nll_loss((own[0] + own[1]).log(), labels)), rel=1e-4
    )
    assert found.error_before == pytest.approx(found.network["calibration_error"], abs=1e-6)
    assert report.predictions is not None and len(report.mistakes) > 3
    told = dict(zip(report.predictions.images, report.predictions.probability, strict=True))
    assert all(told[wrong.image] == pytest.approx(wrong.probability, abs=1e-6) for wrong in report.mistakes)
    # Of images that the calibration was not fitted to, all of it is what a predictor answers.
    predictor = Predictor(calibrated, "torch", "fp32", views="flip", reject=0.05)
    pixels, labels = digits.training.read_batch(np.arange(len(digits.training)))
    prepared = np.stack([predictor.prepare(each) for each in pixels])
    probabilities, novelty = predictor.scores(prepared)
    report = evaluate(calibrated, digits, split="training", views="flip")
    assert report.figures["top1"] == pytest.approx((probabilities.argmax(1) == labels).mean(), abs=1e-3)
    assert report.reliability is not None and novelty is not None
    refused = {each.asked: each.refused for each in report.reliability.refusals}
    assert refused[0.05] == pytest.approx(is_refused(novelty, 0.05).mean(), abs=2e-3)
    assert refused[0.2] == pytest.approx(is_refused(novelty, 0.2).mean(), abs=2e-3)


class Counted(ArrayDataset):
    """Images that are read one by one, as files are; each reading is counted."""

    in_memory = False

    def __init__(self, source: ArrayDataset) -> None:
        super().__init__(source.name, source.classes, source.images, source.labels, source.numbers)
        self.readings: list[int] = []

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.readings.append(index)
        return super().read(index)


def test_the_benchmark_of_novelty_compares_scores(calibrated: Bundle, digits: Splits) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "novelty.py"
    spec = importlib.util.spec_from_file_location("novelty_benchmark", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    training, known = (
        benchmark.Views(calibrated, each, 300, labeled=True) for each in (digits.training, digits.validation)
    )
    noise = benchmark.Views(calibrated, benchmark.sources(["noise"], calibrated)["noise"], 100)
    found = {
        name: benchmark.auroc(score(known), score(noise))
        for name, score in benchmark.scores(calibrated, training).items()
    }
    assert len(found) == 9 and all(0 <= each <= 1 for each in found.values())
    assert found["novelty of the package"] > 0.9 and found["distance, all maps"] > 0.9


def test_calibration_and_report_share_one_pass_over_the_images(trained: Bundle, digits: Splits) -> None:
    counted = Counted(digits.validation)  # pyrefly: ignore
    training = Counted(digits.training)  # pyrefly: ignore
    splits = replace(digits, training=training, validation=counted)
    bundle, report = calibrate_and_evaluate(trained, SplitOutputs(trained, splits, num_workers=0, keep=True))
    assert training.readings == list(range(len(training)))  # for distances and copies
    assert counted.readings[: len(counted)] == list(range(len(counted)))
    assert len(counted.readings) == len(counted) + len(report.mistakes) + len(report.examples)
    assert report == evaluate(bundle, digits) and report.slices and report.duplicates is not None
    # The network's own probabilities, of which the log of a training tells, stay beside the calibrated ones.
    own = evaluate(trained, digits).figures
    assert report.network_figures() == pytest.approx(own, rel=1e-4) and report.figures["nll"] < own["nll"] - 0.01
    few = replace(digits, validation=ArrayDataset("few", digits.classes, counted.images[:19], counted.labels[:19]))
    bundle, report = calibrate_and_evaluate(trained, SplitOutputs(trained, few, keep=True))
    assert bundle is trained and report.figures["n"] == 19


@pytest.fixture
def batch_sizes() -> Iterator[list[int]]:
    """How many images the convolutions of any network are given at once."""
    found: list[int] = []

    def note(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Conv2d):
            found.append(len(given[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    yield found
    hook.remove()


def test_no_more_images_are_computed_at_once_than_asked_for(
    trained: Bundle, digits: Splits, batch_sizes: list[int]
) -> None:
    parts = [each.read_batch(np.arange(60)) for each in (digits.training, digits.validation)]
    few = Splits("few", *(ArrayDataset("few", digits.classes, *part) for part in parts))
    new = Splits("new", *(ArrayDataset("new", ("a",), pixels[:20], np.zeros(20, int)) for pixels, _ in parts))
    copied = replace(trained, model=copy.deepcopy(trained.model))
    for name, value in copied.model.state_dict().items():
        if "running_mean" in name:
            value += 1e-3  # else statistics count as frozen, and are not computed anew
    for compute in (
        lambda: calibrate(trained, few, batch_size=10),
        lambda: calibrate_and_evaluate(trained, SplitOutputs(trained, few, batch_size=10, keep=True)),
        lambda: extend(trained, new, old=few, batch_size=10),
        lambda: soup([trained, copied], few, batch_size=10),
    ):
        batch_sizes.clear()
        compute()
        assert max(batch_sizes) == 10
    with pytest.raises(UserError, match="batch_size must be 1 or more, got 0"):
        calibrate(trained, few, batch_size=0)
    for batch_size, most in ((50, 50), (25, 20), (3, 10)):
        batch_sizes.clear()
        evaluate(trained, few, views="ten-shift", batch_size=batch_size)
        assert max(batch_sizes) == most
    with pytest.raises(UserError, match="batch_size must be 1 or more, got -15"):
        evaluate(trained, few, views="flip", batch_size=-15)


@pytest.mark.slow
def test_every_command_that_measures_has_a_batch_size(
    trained: Bundle, digits: Splits, batch_sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["coatnet.evaluation.probe"], "L2_STRENGTHS", (1e-2,))
    from PIL import Image

    run, other, new = tmp_path / "run", tmp_path / "other" / "bundle", tmp_path / "new" / "a"
    bundle = str(trained.save(run / "bundle"))
    replace(trained, model=copy.deepcopy(trained.model)).save(other)
    (run / "recipe.yaml").write_text("data: digits\n")
    (run / "report.json").write_text("{}")  # of an earlier release: `compare` measures it again
    new.mkdir(parents=True)
    for index in range(20):
        Image.fromarray(digits.training.read(index)[0]).save(new / f"{index}.png")
    for command in (
        ["evaluate", bundle, "--data", "digits"],
        ["calibrate", bundle, "--data", "digits", "--out", str(tmp_path / "calibrated")],
        ["probe", bundle, "--data", "digits", "--out", str(tmp_path / "probe")],
        ["extend", bundle, "--data", str(new.parent), "--old", "digits", "--out", str(tmp_path / "extended")],
        ["soup", bundle, str(other), "--data", "digits", "--out", str(tmp_path / "soup")],
        ["compare", str(run), str(tmp_path / "probe")],
    ):
        batch_sizes.clear()
        assert main([*command, "--batch-size", "150"]) == 0
        assert max(batch_sizes) == 150, command


def test_more_images_than_are_kept_are_computed_again(
    trained: Bundle, digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("evaluate", "calibrate"):
        monkeypatch.setattr(sys.modules[f"coatnet.evaluation.{module}"], "KEPT_IMAGES", 100)
    images = SplitOutputs(trained, digits, num_workers=0, keep=True)
    assert not images.keeps
    bundle, report = calibrate_and_evaluate(trained, images)
    assert bundle.calibration is not None and 50 < len(bundle.calibration.images) <= 100
    assert report == evaluate(bundle, digits) and report.figures["n"] == len(digits.validation)


def test_a_sample_of_training_images_has_all_classes_whatever_their_order(trained: Bundle, digits: Splits) -> None:
    training = digits.training
    assert isinstance(training, ArrayDataset)
    rare = np.flatnonzero(training.labels == 7)[5:]
    rows = np.setdiff1d(np.argsort(training.labels, kind="stable"), rare, assume_unique=True)
    ordered = ArrayDataset("sorted", digits.classes, training.images[rows], training.labels[rows])
    found, looks = sample_outputs(trained, (ordered,), 100, 0, lambda done: None, balanced=True)
    counts = found.labels.bincount(minlength=10).tolist()
    assert sum(counts) == 100 and counts[7] == 5 and min(counts[:7]) >= 10 and looks == []
    counts = sample_outputs(trained, (ordered,), 200, 0, lambda done: None)[0].labels.bincount(minlength=10)
    wanted = 200 / len(rows) * np.bincount(ordered.labels)
    assert counts.sum() == 200 and np.abs(counts.numpy() - wanted).max() < 1.2


@pytest.mark.slow
def test_classes_that_arrive_and_averages_take_one_pass_over_the_held_out_images(
    trained: Bundle, digits: Splits
) -> None:
    training, held_out = Counted(digits.training), Counted(digits.validation)  # pyrefly: ignore
    known = replace(digits, training=training, validation=held_out)
    few = (ArrayDataset("new", ("a", "b"), each.images[:20], np.arange(20) % 2) for each in (training, held_out))
    found = extend(trained, Splits("new", *few), old=known, num_workers=0)
    assert found.report is not None and found.before is not None and found.after is not None
    assert held_out.readings[: len(held_out)] == list(range(len(held_out)))
    shown = len(found.report.mistakes) + len(found.report.examples)
    assert len(held_out.readings) <= len(held_out) + shown
    assert found.before.correct == round(evaluate(trained, digits).figures["top1"] * len(held_out))
    assert found.after.n == len(held_out) and found.report.figures["n"] == len(held_out) + 20

    training.readings, held_out.readings = [], []
    made = soup([trained, replace(trained, model=copy.deepcopy(trained.model))], known, num_workers=0)
    assert made.report is not None and made.bundle.calibration is not None
    shown = len(made.report.mistakes) + len(made.report.examples)
    assert len(held_out.readings) == 3 * len(held_out) + shown  # both models, and their average
    assert len(training.readings) <= 2 * len(training)  # statistics of BatchNorm; distances and copies


def test_coverage_and_refusals_are_those_asked_for(calibrated: Bundle, digits: Splits) -> None:
    found = evaluate(calibrated, digits).reliability
    assert found is not None
    n = len(digits.validation)
    for sets in found.sets:
        assert sets.coverage > 0.9 - 3 * (0.09 / n) ** 0.5
        assert 0.5 < sets.mean_size < 10
        assert len(sets.class_coverage) == 10
    assert [sets.method for sets in found.sets] == list(METHODS)
    for each in found.refusals:
        assert each.refused == pytest.approx(each.asked, abs=0.03)
    accuracies = [each.accuracy for each in found.selective]
    assert 0.5 < accuracies[0] < accuracies[-1]
    assert found.risk_coverage[-1] == (1.0, pytest.approx(1 - accuracies[0]))


def test_foreign_images_are_more_novel(calibrated: Bundle, digits: Splits) -> None:
    predictor = Predictor(calibrated, "torch", "fp32", reject=0.05, coverage=0.9)
    noise = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    known = [digits.validation.read(index)[0] for index in range(100)]
    foreign, familiar = predictor(list(noise)), predictor(known)
    assert sum(each.unknown for each in foreign) >= 36
    assert sum(each.unknown for each in familiar) <= 15
    assert all(each.unknown == ((each.novelty or 0) > 0.95 + 1e-6) for each in foreign + familiar)
    assert all(each.novelty == round(each.novelty or 0, 3) for each in foreign + familiar)  # as people read it
    assert all(each.class_set is not None and set(each.class_set) <= set(digits.classes) for each in familiar)
    truth = [digits.classes[int(digits.validation.label(index))] for index in range(100)]
    sizes = {each.method: each.mean_size for each in evaluate(calibrated, digits).reliability.sets}  # pyrefly: ignore
    for method in METHODS:
        answers = Predictor(calibrated, "torch", "fp32", coverage=0.9, set_method=method)(known)
        sets = [each.class_set or () for each in answers]
        assert sum(name in chosen for name, chosen in zip(truth, sets, strict=True)) >= 80
        assert np.mean([len(chosen) for chosen in sets]) == pytest.approx(sizes[method], rel=0.25)
    assert not any(each.unknown for each in Predictor(calibrated, "torch", "fp32")(list(noise)))


def test_a_bundle_keeps_its_calibration(calibrated: Bundle, digits: Splits, tmp_path: Path) -> None:
    opened = load(calibrated.save(tmp_path / "bundle"))
    assert opened.calibration is not None and calibrated.calibration is not None
    for name, tensor in calibrated.calibration.tensors().items():
        torch.testing.assert_close(opened.calibration.tensors()[name], tensor, rtol=0, atol=0)
    images, _ = images_of(digits.validation, calibrated.preprocessing)
    with torch.inference_mode():
        torch.testing.assert_close(opened.model(images), calibrated.model(images))
    plain = calibrated.uncalibrated().save(tmp_path / "bundle")
    assert not (plain / CALIBRATION).exists()
    assert load(plain).calibration is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("temperature", lambda each: -each, "not positive"),
        ("novelty.scale", torch.zeros_like, "not positive"),
        ("novelty.mean", lambda each: each[:-1], "novelty.mean is F32"),
        ("novelty.class_means", lambda each: each.repeat(101, 1), "axis 0 must be 1 to 1,000"),
        ("sets.lac", lambda each: each[:, : STEPS - 1], "sets.lac is F32"),
        ("images", lambda each: each[:0], "axis 0"),
        ("novelty.quantiles", lambda each: each * float("nan"), "NaN"),
    ],
)
def test_a_damaged_calibration_is_one_error(
    calibrated: Bundle, tmp_path: Path, name: str, change: object, message: str
) -> None:
    folder = calibrated.save(tmp_path / "bundle")
    assert calibrated.calibration is not None
    tensors = calibrated.calibration.tensors()
    write_tensors({**tensors, name: change(tensors[name])}, folder / CALIBRATION)  # pyrefly: ignore
    with pytest.raises(UserError, match=message):
        load(folder)


def refuse(index: int) -> None:
    raise BadImage(f"{index}", "corrupt: no image")


def test_wrong_requests_are_one_error(trained: Bundle, calibrated: Bundle, digits: Splits) -> None:
    for options, message in (
        ({"reject": 0.05}, "needs a calibrated model"),
        ({"coverage": 0.9}, "needs a calibrated model"),
    ):
        with pytest.raises(UserError, match=message):
            Predictor(trained, "torch", **options)  # pyrefly: ignore
    for options, message in (
        ({"reject": 0.0}, "between 0 and 1"),
        ({"coverage": 1.0}, "above 0 and at most 0.999"),
        ({"coverage": 0.9995}, "is 0.9995; it must be above 0 and at most 0.999, such as 0.9"),
        ({"coverage": 0.9, "set_method": "lca"}, "one of lac, aps, raps"),
        ({"reject": 0.05, "raw": True}, "raw answers"),
    ):
        with pytest.raises(UserError, match=message):
            Predictor(calibrated, "torch", **options)  # pyrefly: ignore
    odd = ArrayDataset("odd", digits.classes, *digits.training.read_batch(np.arange(8)))
    odd.in_memory, odd.read = False, refuse  # pyrefly: ignore
    found = calibrate(trained, Splits("digits", odd, digits.validation), num_workers=0)  # by halves, as without any
    assert found.calibration is not None
    few = ArrayDataset("few", digits.classes, *digits.validation.read_batch(np.arange(8)))
    with pytest.raises(UserError, match="calibration needs 10"):
        calibrate(trained, few)


def test_the_command_calibrates_in_place(trained: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained.save(tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["calibrate", str(folder), "--data", "digits", "--out", ""]) == 2
    assert "--out is empty: give a path" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert main(["calibrate", str(folder), "--data", "digits"]) == 0
    assert "calibrated by" in capsys.readouterr().out
    noise = tmp_path / "noise.png"
    from PIL import Image

    Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 8), dtype=np.uint8)).save(noise)
    command = ["predict", str(folder), str(noise), "--engine", "torch", "--precision", "fp32"]
    assert main([*command, "--reject", "0.05", "--set", "0.9", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["unknown"] is True and line["novelty"] > 0.95 and isinstance(line["set"], list)
    assert main([*command, "--reject", "0.05"]) == 0
    assert ": unknown (more foreign than" in capsys.readouterr().out
    assert main([*command, "--raw", "--json"]) == 0
    assert "novelty" not in json.loads(capsys.readouterr().out)


def test_a_record_has_no_figures_of_the_probabilities_before(trained: Bundle, digits: Splits) -> None:
    report = evaluate(trained, digits).to_dict()
    assert {"nll", "brier", "calibration_error"} <= report["figures"].keys() and report["mistakes"]
    found = calibrate(replace(trained, record={"report": report, "recipe": {"data": "digits"}}), digits).record
    assert found["recipe"] == {"data": "digits"} and found["report"]["figures"]["top1"] == report["figures"]["top1"]
    for part in ("figures", "intervals"):
        assert not {"nll", "brier", "calibration_error"} & found["report"][part].keys()
    assert not {"reliability", "calibration", "mistakes", "suspects"} & found["report"].keys()


def test_engines_give_the_same_novelty(calibrated: Bundle, digits: Splits) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    images = [digits.validation.read(index)[0] for index in range(20)]
    expected = Predictor(calibrated, "torch", "fp32", reject=0.1, coverage=0.9)(images)
    for engine in ("openvino", "onnxruntime"):
        found = Predictor(calibrated, engine, "fp32", reject=0.1, coverage=0.9)(images)
        for one, other in zip(expected, found, strict=True):
            assert other.probabilities == pytest.approx(one.probabilities, abs=1e-4)
            assert other.novelty == pytest.approx(one.novelty, abs=0.005)
            assert (other.classes, other.class_set) == (one.classes, one.class_set)
