"""Classes that arrive later: added, left out, merged and renamed, on a network that learned eight of ten garments."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import coatnet
from coatnet import Bundle, Predictor, Recipe, UserError
from coatnet.bundle.classes import drop_classes, merge_classes, rename_classes
from coatnet.cli.main import main
from coatnet.data.builtin import open_fashion_mnist_small
from coatnet.data.datasets import ArrayDataset, Dataset
from coatnet.data.splits import Splits
from coatnet.evaluation.extend import class_weights, extend, fit_means, fit_new_rows, fit_ridge, lower_new

pytestmark = pytest.mark.slow  # a network is trained for them
ARRIVING = ("Sneaker", "Bag")


def only(dataset: Dataset, classes: tuple[str, ...], *, per_class: int) -> ArrayDataset:
    """The first images of some classes."""
    assert isinstance(dataset, ArrayDataset)
    numbers = [dataset.classes.index(name) for name in classes]
    rows = np.concatenate([np.flatnonzero(dataset.labels == number)[:per_class] for number in numbers])
    labels = np.array([numbers.index(number) for number in dataset.labels[rows]])
    return ArrayDataset(dataset.name, classes, np.asarray(dataset.images)[rows], labels, rows)


@pytest.fixture(scope="module")
def garments() -> tuple[Splits, Splits]:
    """Eight classes, 150 training images each; and the two others, ten images each. 100 of each are held out."""
    whole = open_fashion_mnist_small()
    old = tuple(name for name in whole.classes if name not in ARRIVING)
    known = Splits("old", only(whole.training, old, per_class=150), only(whole.validation, old, per_class=100))
    new = Splits("new", only(whole.training, ARRIVING, per_class=10), only(whole.validation, ARRIVING, per_class=100))
    return known, new


@pytest.fixture(scope="module")
def eight(garments: tuple[Splits, Splits], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("eight") / "run"
    recipe = Recipe(data="old", model="coatnet-femto-16", resolution=16, epochs=2, num_workers=0)
    coatnet.train(recipe, run, splits=garments[0])
    return run / "bundle"


def test_two_classes_of_ten_images_are_added_and_the_loss_of_the_others_is_measured(
    eight: Path, garments: tuple[Splits, Splits], tmp_path: Path
) -> None:
    known, new = garments
    found = extend(eight, new, old=known)
    assert found.added == ARRIVING and found.bundle.classes == (*coatnet.load(eight).classes, *ARRIVING)
    assert found.new is not None and found.before is not None and found.after is not None
    assert found.new.n == 200 and found.new.correct / found.new.n > 0.6
    assert found.before.n == found.after.n == 800
    assert found.after.correct / found.after.n > found.before.correct / found.before.n - 0.1
    assert max(found.methods.values()) == found.methods[found.method]
    # The figures are those of the saved model: the report's, and the predictor's for single images.
    assert found.report is not None and found.report.figures["n"] == 1000
    right = (found.after.correct + found.new.correct) / 1000
    assert found.report.figures["top1"] == pytest.approx(right, abs=0.003)
    assert found.bundle.calibration is not None
    predictor = Predictor(found.bundle.save(tmp_path / "ten"), "torch", reject=0.05)
    card = (tmp_path / "ten" / "README.md").read_text(encoding="utf-8")
    assert "Classes added by `coatnet extend`: Sneaker, Bag; the network is the same." in card
    assert "coatnet-femto-16" in card and "repeats" not in card
    images = list(np.asarray(new.validation.images)[:20])  # pyrefly: ignore
    assert sum(each.classes[0] == "Sneaker" for each in predictor(images)) > 10
    # A second extension goes on from what the first one knows.
    again = extend(found.bundle, Splits("more", _renamed(new.training, ("Trainer", "Purse")), new.validation))
    assert again.bundle.classes[-2:] == ("Trainer", "Purse") and again.before is None


def _renamed(dataset: Dataset, classes: tuple[str, ...]) -> ArrayDataset:
    assert isinstance(dataset, ArrayDataset)
    return ArrayDataset("renamed", classes, dataset.images, dataset.labels)


def test_accents_of_class_names_are_matched_however_they_are_written(
    eight: Path, garments: tuple[Splits, Splits]
) -> None:
    known, new = garments
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    bundle = rename_classes(coatnet.load(eight), {"Coat": composed})
    old = tuple(decomposed if name == "Coat" else name for name in known.classes)
    arriving = (ARRIVING[0], decomposed)  # more images of an old class beside a new one
    found = extend(
        bundle,
        Splits("new", _renamed(new.training, arriving), _renamed(new.validation, arriving)),
        old=Splits("old", _renamed(known.training, old), _renamed(known.validation, old)),
    )
    assert found.added == ARRIVING[:1] and found.bundle.classes == (*bundle.classes, ARRIVING[0])
    assert found.before is not None and found.before.n == 800


def test_all_images_that_arrive_are_learned_from_or_measured(
    eight: Path, garments: tuple[Splits, Splits], tmp_path: Path
) -> None:
    """A test split belongs to the images of the training."""
    dataset = garments[1].validation
    for index in range(200):
        path = tmp_path / "new" / dataset.classes[int(dataset.labels[index])] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dataset.read(index)[0]).save(path)
    bundle = coatnet.load(eight)
    recipe = {**bundle.record["recipe"], "test_fraction": 0.5}
    found = extend(replace(bundle, record={"recipe": recipe}), tmp_path / "new")
    parts = coatnet.open_dataset(tmp_path / "new").parts
    assert found.new is not None and found.new.n == len(parts["validation"]) == 200 - len(parts["training"])


def test_what_the_old_classes_may_lose_is_held(eight: Path, garments: tuple[Splits, Splits]) -> None:
    known, new = garments
    kept, free = (extend(eight, new, old=known, max_drop=share) for share in (0.0, 1.0))
    assert kept.lowered >= free.lowered == 0 and kept.bundle.record["extension"]["lowered"] == kept.lowered
    for found in (kept, free):
        assert found.before is not None and found.after is not None and found.new is not None
    assert (
        kept.after.correct >= kept.before.correct - 16
    )  # two points of 800 images; none of those learned from is lost
    with pytest.raises(UserError, match="max-drop is a share of accuracy, 0 to 1"):
        extend(eight, new, old=known, max_drop=5)


def test_new_logits_are_lowered_no_more_than_the_old_classes_need() -> None:
    before = torch.tensor([[2.0, 0.0]] * 10)
    logits = torch.cat([before, torch.tensor([[3.0], [2.5], [2.1], *[[0.0]] * 7])], dim=1)
    labels = torch.tensor([0] * 10)
    for share, lowered in ((0.0, 1.0), (0.1, 0.5), (0.25, 0.1), (0.3, 0.0)):
        assert lower_new(logits, before, labels, share) == pytest.approx(lowered, abs=1e-3)
    assert lower_new(logits[:, [1, 0, 2]], before, labels, 0.5) is None  # the old rows alone lose all


def test_without_old_images_their_features_are_drawn(eight: Path, garments: tuple[Splits, Splits]) -> None:
    known, new = garments
    found = extend(eight, new)
    assert found.before is None and found.report is None and found.bundle.calibration is None
    assert "--old DATA" in found.to_text()
    assert coatnet.evaluate(found.bundle, known.validation).figures["top1"] > 0.6
    with pytest.raises(UserError, match="nothing is known of the old classes"):
        extend(coatnet.load(eight).uncalibrated(), new)
    assert extend(coatnet.load(eight).uncalibrated(), new, old=known).after is not None


def test_of_old_classes_without_images_only_the_rows_they_have_are_known(
    eight: Path, garments: tuple[Splits, Splits]
) -> None:
    known, new = garments
    fewer = Splits("fewer", only(known.training, known.classes[:7], per_class=50), known.validation)
    fewer = replace(fewer, validation=only(known.validation, known.classes[:7], per_class=50))
    found = extend(coatnet.load(eight).uncalibrated(), new, old=fewer)
    assert found.methods and all(name.startswith("new rows") for name in found.methods)


def test_what_cannot_be_added_is_one_error(eight: Path, garments: tuple[Splits, Splits]) -> None:
    known, new = garments
    with pytest.raises(UserError, match="has all of its classes already"):
        extend(eight, known)
    with pytest.raises(UserError, match="the model has no class 'Sneaker'"):
        extend(eight, new, old=new)
    assert isinstance(new.training, ArrayDataset)
    bags = new.training.labels == ARRIVING.index("Bag")
    for kept in (~bags, np.zeros_like(bags)):  # a class, or all, has held-out images alone
        rows = np.flatnonzero(kept)
        part = ArrayDataset("new", ARRIVING, np.asarray(new.training.images)[rows], new.training.labels[rows], rows)
        with pytest.raises(UserError, match=r"no training image of the new class '(Bag|Sneaker)'"):
            extend(eight, Splits("new", part, new.validation))


def test_the_command_writes_a_bundle_for_every_other_command(
    eight: Path, garments: tuple[Splits, Splits], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dataset in (garments[1].training, garments[1].validation):
        for index in range(20):
            path = tmp_path / "new" / dataset.classes[int(dataset.labels[index])] / f"{len(dataset)}-{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(dataset.read(index)[0]).save(path)
    call = ["extend", str(eight), "--data", str(tmp_path / "new"), "--out", str(tmp_path / "ten"), "--json"]
    assert main(call) == 0
    assert json.loads(capsys.readouterr().out)["added"] == ["Bag", "Sneaker"]
    (tmp_path / "odd" / "Bag").mkdir(parents=True)
    (tmp_path / "odd" / "Sneaker").symlink_to(tmp_path / "new" / "Sneaker")
    for number in range(10):
        (tmp_path / "odd" / "Bag" / f"{number}.png").write_bytes(b"no image")
    call = ["extend", str(eight), "--data", str(tmp_path / "odd"), "--out", str(tmp_path / "none")]
    assert main(call) == 2 and not (tmp_path / "none").exists()
    assert "no training image of the new class 'Bag' can be read" in capsys.readouterr().err
    call = ["rename", str(tmp_path / "ten"), "Bag=Handbag", "--out", str(tmp_path / "renamed")]
    assert main(call) == 0
    assert main([*call[:-1], str(tmp_path / "ten")]) == 2  # the model that is read stays
    assert main(["predict", str(tmp_path / "renamed"), str(tmp_path / "new/Bag")]) == 0
    assert "Handbag" in capsys.readouterr().out
    call = [
        "shrink",
        str(eight),
        "--merge",
        "top=Shirt,Pullover,Coat",
        "--drop",
        "Dress",
        "--out",
        str(tmp_path / "few"),
    ]
    assert main(call) == 0
    assert set(coatnet.load(tmp_path / "few").classes) == {"T-shirt/top", "Trouser", "Sandal", "Ankle boot", "top"}
    for wrong in (["--merge", "top"], ["--drop", "Shrit"], []):
        assert main(["shrink", str(eight), *wrong, "--out", str(tmp_path / "none")]) == 2
    assert "did you mean 'Shirt'" in capsys.readouterr().err and not (tmp_path / "none").exists()
    few, before = str(tmp_path / "few"), (tmp_path / "few/config.json").read_bytes()
    for call in (["shrink", few, "--drop", "Sandal"], ["extend", few, "--data", str(tmp_path / "new")]):
        assert main([*call, "--out", few]) == 2
        assert "would replace a model that is read" in capsys.readouterr().err
    assert (tmp_path / "few/config.json").read_bytes() == before


def test_renaming_changes_names_alone(eight: Path) -> None:
    bundle = coatnet.load(eight)
    renamed = rename_classes(bundle, {"Coat": "Jacket", "Shirt": "Coat"})
    assert renamed.classes[bundle.classes.index("Shirt")] == "Coat" and "Jacket" in renamed.classes
    assert renamed.calibration is bundle.calibration
    assert bundle.record["report"]["figures"] == renamed.record["report"]["figures"]
    report, before = renamed.record["report"], bundle.record["report"]
    assert "Jacket" in report["classes"] and before["mistakes"] and before["suspects"]
    assert json.loads(json.dumps(report).replace('"Coat"', '"Shirt"').replace('"Jacket"', '"Coat"')) == before
    with pytest.raises(UserError, match="two classes would be called 'Dress'"):
        rename_classes(bundle, {"Coat": "Dress"})


def test_renaming_reaches_the_mistakes_about_several_labels(eight: Path) -> None:
    bundle = coatnet.load(eight)
    report = {
        "multilabel": True,
        "classes": ["not Coat", *bundle.classes],
        "mistakes": [
            {"image": "Coat", "truth": "Coat, Dress", "predicted": "not Coat"},
            {"image": "2", "truth": "nothing", "predicted": "Coat"},
        ],
        "per_class": [{"class": "not Coat"}],
    }
    renamed = rename_classes(replace(bundle, record={"report": report}), {"Coat": "Jacket"}).record["report"]
    assert renamed["mistakes"] == [
        # "not Coat" is a class of its own here, which is not renamed.
        {"image": "Coat", "truth": "Jacket, Dress", "predicted": "not Coat"},
        {"image": "2", "truth": "nothing", "predicted": "Jacket"},
    ]
    assert renamed["per_class"] == [{"class": "not Coat"}]
    report["classes"].remove("not Coat")
    renamed = rename_classes(replace(bundle, record={"report": report}), {"Coat": "Jacket"}).record["report"]
    assert renamed["mistakes"][0]["predicted"] == "not Jacket"


def test_dropping_leaves_the_proportions_of_the_others(eight: Path, garments: tuple[Splits, Splits]) -> None:
    bundle = coatnet.load(eight)
    fewer = drop_classes(bundle, ["Coat", "Shirt"])
    images = [garments[0].validation.read(index)[0] for index in range(0, 800, 40)]
    for before, after in zip(
        *(Predictor(each, "torch", "fp32", raw=False)(images, top_k=8) for each in (bundle, fewer)), strict=True
    ):
        kept = {n: p for n, p in zip(before.classes, before.probabilities, strict=True) if n in fewer.classes}
        total = sum(kept.values())
        assert dict(zip(after.classes, after.probabilities, strict=True)) == pytest.approx(
            {name: value / total for name, value in kept.items()}, abs=1e-4
        )
    with pytest.raises(UserError, match="at least two"):
        drop_classes(bundle, bundle.classes[1:])


def test_a_merged_class_has_about_the_sum_of_probabilities(eight: Path, garments: tuple[Splits, Splits]) -> None:
    bundle = coatnet.load(eight)
    merged, agreement = merge_classes(bundle, {"top": ["Pullover", "Coat", "Shirt"]})
    assert agreement > 0.95
    images = [garments[0].validation.read(index)[0] for index in range(800)]
    before, after = (Predictor(each, "torch", "fp32")(images, top_k=8) for each in (bundle, merged))
    parts = {"Pullover", "Coat", "Shirt"}
    summed = [sum(p for n, p in zip(one.classes, one.probabilities, strict=True) if n in parts) for one in before]
    found = [dict(zip(one.classes, one.probabilities, strict=True))["top"] for one in after]
    assert np.abs(np.subtract(summed, found)).mean() < 0.05
    with pytest.raises(UserError, match="merged twice"):
        merge_classes(bundle, {"a": ["Coat", "Shirt"], "b": ["Shirt", "Dress"]})
    with pytest.raises(UserError, match="calibrate"):
        merge_classes(bundle.uncalibrated(), {"top": ["Coat", "Shirt"]})


@pytest.mark.parametrize("fit", [fit_means, fit_ridge, fit_new_rows])
def test_a_method_separates_classes_of_very_different_sizes(fit: object) -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(4, 12, generator=generator)
    labels = torch.tensor([0] * 500 + [1] * 500 + [2] * 10 + [3] * 10)
    features = centers[labels] + torch.randn(len(labels), 12, generator=generator)
    options = {
        fit_means: {"shrinkage": 0.1},
        fit_ridge: {"strength": 0.1},
        fit_new_rows: {"old": (centers[:2], -centers[:2].square().sum(1) / 2), "l2": 1e-2},
    }[fit]  # pyrefly: ignore
    weight, bias = fit(features, labels, 4, **options)  # pyrefly: ignore
    others = centers.repeat_interleave(200, 0) + torch.randn(800, 12, generator=generator)
    right = F.linear(others, weight, bias).argmax(1) == torch.arange(4).repeat_interleave(200)
    assert right.float().mean() > 0.95 and right[400:].float().mean() > 0.9
    assert class_weights(labels, 4).mean() == pytest.approx(1)


def test_the_summary_of_features_is_that_of_its_bundle(eight: Path, tmp_path: Path) -> None:
    bundle = coatnet.load(eight)
    assert bundle.calibration is not None and bundle.calibration.features is not None
    drawn, labels = bundle.calibration.features.draw(400)
    again = type(bundle.calibration.features).of(drawn, labels, 8)
    assert torch.allclose(again.means, bundle.calibration.features.means, atol=0.3)
    assert isinstance(bundle, Bundle) and (labels.bincount() == 400).all()
