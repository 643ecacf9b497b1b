"""`evaluate` equals a plain loop over the images, and matches classes by name."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.bundle import Bundle, load
from coatnet.data.datasets import ArrayDataset
from coatnet.data.open import open_dataset
from coatnet.data.splits import SplitRule, Splits
from coatnet.data.transforms import EvaluationTransform, Preprocessing
from coatnet.errors import UserError
from coatnet.evaluation.evaluate import evaluate, recorded_rule, was_trained_on
from coatnet.evaluation.features import extract_features
from coatnet.evaluation.outputs import label_translation
from coatnet.evaluation.report_markdown import to_markdown, write_report
from coatnet.inference.predictor import Predictor
from coatnet.model.network import create_model

CLASSES = ("a", "b", "c", "d")


def bundle_of(classes: tuple[str, ...] = CLASSES, *, multilabel: bool = False) -> Bundle:
    torch.manual_seed(0)
    model = create_model("coatnet-femto", num_classes=len(classes), in_channels=1, resolution=32)
    torch.nn.init.normal_(model.get_classifier().weight)
    return Bundle(model, classes, Preprocessing(resolution=32, mean=(0.5,), std=(0.5,)), multilabel=multilabel)


def test_a_model_of_images_without_a_rule_is_measured_by_the_usual_one() -> None:
    bundle = replace(bundle_of(), record={"recipe": {"validation_fraction": 0.0, "test_fraction": 0.1}})
    assert recorded_rule(bundle) == SplitRule(test_fraction=0.1)
    assert recorded_rule(replace(bundle, record={"recipe": {"validation_fraction": 0.3}})) == SplitRule(0.3)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of forty images of four classes, of noise."""
    generator = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "images" / CLASSES[number % 4] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (12, 30), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def test_the_test_split_of_a_training_takes_nothing_of_other_images(bundle: Bundle, images: Path) -> None:
    recipe = {"data": "somewhere/clothes", "validation_fraction": 0.2, "test_fraction": 0.3}
    other, same = (replace(bundle, record={"recipe": recipe | {"data": data}}) for data in ("clothes", str(images)))
    assert evaluate(other, images, split="all").figures["n"] == 40
    assert len(extract_features(other, images, split="all").gather()[2]) == 40
    # Of images of the training, `all` leaves out those that are measured once, at its end.
    counts = [evaluate(same, images, split=split).figures["n"] for split in ("all", "test")]
    assert sum(counts) == 40 and counts[1] > 4


def test_images_that_classes_were_added_from_have_no_test_split(bundle: Bundle, images: Path) -> None:
    recipe = {"data": "clothes", "validation_fraction": 0.2, "test_fraction": 0.3}
    added = {"data": images.name, "added": [CLASSES[0]]}
    for extension in (added, {"earlier": [added]}, {"data": "more", "added": [CLASSES[1]], "earlier": [added]}):
        extended = replace(bundle, record={"recipe": recipe, "extension": extension})
        assert not was_trained_on(extended, images)  # its network was not
        with pytest.raises(UserError, match="there is no test split"):
            evaluate(extended, images, split="test")
        counts = [evaluate(extended, images, split=split).figures["n"] for split in ("training", "validation")]
        assert sum(counts) == 40 == evaluate(extended, images, split="all").figures["n"]


def test_images_of_a_training_are_known_by_the_name_of_their_splits(bundle: Bundle) -> None:
    for data, name in (("hf://owner/clothes", "owner/clothes"), ("/some/labels.csv", "labels"), ("digits", "digits")):
        trained = replace(bundle, record={"recipe": {"data": data, "validation_fraction": 0.1}})
        assert was_trained_on(trained, data) and was_trained_on(trained, name)
        assert not was_trained_on(trained, "other") and not was_trained_on(trained, f"{name}.v2")
        # The record of an extension by splits has their name alone.
        trained = replace(bundle, record={"recipe": {"data": name, "validation_fraction": 0.1}})
        assert was_trained_on(trained, data) and not was_trained_on(trained, "other")


def test_images_that_cannot_be_read_a_second_time_cost_no_figure(bundle: Bundle, images: Path) -> None:
    whole = evaluate(bundle, images, split="all")

    def gone(done: int, total: int) -> None:
        if done == total:
            for number in range(0, 40, 2):
                (images / CLASSES[number % 4] / f"{number}.png").unlink()

    found = evaluate(bundle, images, split="all", progress=gone)
    assert found == whole
    shown = [
        (each.shape, int(Path(mistake.image).stem) % 2)
        for images in (found.thumbnails, found.heat_maps)
        for each, mistake in zip(images, found.mistakes, strict=True)
    ]
    assert set(shown) == {((12, 30, 3), 1), ((160, 160, 3), 0)}  # a gray square in place of each that is gone
    assert [row for row, _ in found.examples] == [row for row, _ in whole.examples]


def dataset_of(num_images: int = 37, *, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> ArrayDataset:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 255, (num_images, 28, 28), dtype=np.uint8)
    return ArrayDataset("noise", classes, images, generator.integers(0, len(classes), num_images))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return bundle_of()


def probabilities_of(bundle: Bundle, dataset: ArrayDataset) -> np.ndarray:
    transform = EvaluationTransform(bundle.preprocessing)
    images = torch.stack([transform(dataset.read(index)[0]) for index in range(len(dataset))])
    with torch.inference_mode():
        return bundle.model.eval()(images).softmax(1).numpy()


def test_figures_equal_a_plain_loop(bundle: Bundle) -> None:
    dataset = dataset_of()
    probabilities = probabilities_of(bundle, dataset)
    right = probabilities.argmax(1) == dataset.labels
    report = evaluate(bundle, dataset, batch_size=8)
    assert report.figures["n"] == 37
    assert report.figures["top1"] == right.mean()
    assert report.figures["nll"] == pytest.approx(
        -np.log(probabilities[np.arange(37), dataset.labels]).mean(), rel=1e-4
    )
    assert np.trace(report.confusion) == right.sum()
    assert report.per_class[0].support == (dataset.labels == 0).sum()

    wrong = sorted(np.flatnonzero(~right), key=lambda index: -probabilities[index].max())[:24]
    assert [mistake.image for mistake in report.mistakes] == [f"noise[{index}]" for index in wrong]
    assert report.mistakes[0].predicted == CLASSES[probabilities[wrong[0]].argmax()]
    assert report.mistakes[0].truth == CLASSES[dataset.labels[wrong[0]]]
    assert report.mistakes[0].probability == pytest.approx(probabilities[wrong[0]].max(), abs=1e-5)
    assert np.array_equal(report.thumbnails[0][..., 1], dataset.images[wrong[0]])


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("views", ["flip", "ten-crop", "ten-shift"])
def test_probabilities_are_the_mean_over_views_as_a_predictor_has_it(
    views: str, multilabel: bool, images: Path, tmp_path: Path
) -> None:
    made = bundle_of(multilabel=multilabel)
    seen = replace(made, preprocessing=replace(made.preprocessing, crop_fraction=0.8))
    (images / "a" / "16.png").write_bytes(b"no image")  # amid the others of its batch
    report = evaluate(seen, images, split="all", views=views, batch_size=50)
    predictor = Predictor(seen, "torch", "fp32", views=views)
    paths = [path for path in sorted(images.rglob("*.png")) if path.name != "16.png"]
    found = predictor.probabilities(np.stack([predictor.prepare(path) for path in paths]))
    names = [str(path.relative_to(images)) for path in paths]
    assert report.predictions is not None and sorted(report.predictions.images) == sorted(names)
    rows = [names.index(name) for name in report.predictions.images]
    if multilabel:
        np.testing.assert_allclose(report.predictions.probabilities, found[rows], atol=1e-5)
    else:
        np.testing.assert_allclose(report.predictions.probability, found[rows].max(1), atol=1e-5)
    assert list(report.bad_images) == ["a/16.png"] and report.figures["n"] == 39
    labels = np.array([CLASSES.index(name[0]) for name in names])
    if not multilabel:
        assert report.figures["top1"] == pytest.approx((found.argmax(1) == labels).mean())
        assert report.figures["nll"] == pytest.approx(-np.log(found[np.arange(39), labels]).mean(), rel=1e-4)
    assert report.views == views == report.to_dict()["views"] and f"({views})" in to_markdown(report)
    one = evaluate(seen, images, split="all")
    assert one != report and one.figures != report.figures and "views" not in one.to_dict()
    for batch_size in (1, 64):
        other = evaluate(seen, images, split="all", views=views, batch_size=batch_size)
        assert other.figures == pytest.approx(report.figures, rel=1e-4)


def test_views_that_are_unknown_are_named(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="views is 'two'; it is one of one, flip"):
        evaluate(bundle, dataset_of(), views="two")
    whole = replace(bundle, preprocessing=replace(bundle.preprocessing, crop="squash", crop_fraction=1.0))
    with pytest.raises(UserError, match="five-crop crop images, and this model sees all of each"):
        evaluate(whole, dataset_of(), views="five-crop")


def test_figures_do_not_depend_on_the_batch_size(bundle: Bundle) -> None:
    reports = [evaluate(bundle, dataset_of(), batch_size=batch_size) for batch_size in (1, 5, 64)]
    for report in reports[1:]:
        assert report.confusion == reports[0].confusion
        assert report.figures == pytest.approx(reports[0].figures, rel=1e-4)


def test_classes_are_matched_by_name(bundle: Bundle) -> None:
    dataset = dataset_of()
    turned = ArrayDataset("noise", CLASSES[::-1], dataset.images, 3 - dataset.labels)
    assert evaluate(bundle, turned) == evaluate(bundle, dataset)
    some = ArrayDataset("noise", ("d", "b"), dataset.images[:5], np.array([0, 1, 0, 0, 1]))
    assert [row.support for row in evaluate(bundle, some).per_class] == [0, 2, 0, 3]


def test_an_unknown_class_is_named(bundle: Bundle) -> None:
    with pytest.raises(UserError, match=r"noise: 1 of 2 classes are unknown to the model, first 'zebra'"):
        evaluate(bundle, dataset_of(classes=("a", "zebra")))


def test_split_selects_one_or_all_splits(bundle: Bundle) -> None:
    splits = Splits("both", dataset_of(10), dataset_of(7, seed=1))
    counts = {split: evaluate(bundle, splits, split=split).figures["n"] for split in ("validation", "training", "all")}
    assert counts == {"validation": 7, "training": 10, "all": 17}
    with pytest.raises(UserError, match="there is no test split"):
        evaluate(bundle, splits, split="test")


def test_multilabel_decisions_are_evaluated_label_by_label() -> None:
    bundle = bundle_of(multilabel=True)
    labels = (np.random.default_rng(0).random((20, 4)) < 0.4).astype(np.uint8)
    dataset = ArrayDataset("noise", CLASSES, dataset_of(20).images, labels)
    report = evaluate(bundle, dataset, batch_size=6)
    assert "mean_average_precision" in report.figures and "top1" not in report.figures
    turned = ArrayDataset("noise", CLASSES[::-1], dataset.images, labels[:, ::-1])
    assert evaluate(bundle, turned).figures == pytest.approx(report.figures)
    for mistake in report.mistakes:
        assert (mistake.predicted.removeprefix("not ") in mistake.truth) == mistake.predicted.startswith("not ")
    with pytest.raises(UserError, match="the model gives only one"):
        evaluate(bundle_of(), dataset)


def test_single_label_data_suits_a_multilabel_model() -> None:
    dataset = dataset_of(20)
    report = evaluate(bundle_of(multilabel=True), dataset)
    assert [row.support for row in report.per_class] == np.bincount(dataset.labels, minlength=4).tolist()


def test_images_of_a_table_may_have_no_label_where_the_model_gives_several(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "test.csv").write_text("path,label\n0.png,a\n1.png,\n2.png,b\n")
    report = evaluate(bundle_of(multilabel=True), tmp_path / "test.csv", split="all")
    assert report.figures["n"] == 3 and [row.support for row in report.per_class] == [1, 1, 0, 0]
    with pytest.raises(UserError, match="row 3: no label; every image needs one"):
        evaluate(bundle_of(), tmp_path / "test.csv", split="all")


def test_accents_of_class_names_are_matched_however_they_are_written() -> None:
    names = tuple(f"caf\u00e9 {name}" for name in CLASSES)
    decomposed = tuple(unicodedata.normalize("NFD", name) for name in names)
    assert evaluate(bundle_of(decomposed), dataset_of(classes=names)).figures["n"] == 37


def test_copies_in_other_data_are_not_called_training_images(bundle: Bundle, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "other" / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.random.default_rng(number // 2).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "other" / name / f"{number}.png")
    text = to_markdown(evaluate(bundle, tmp_path / "other"))
    assert "the same pixels as an image of the training split of other; " in text and "a training image" not in text


def test_the_model_and_its_mode_do_not_change(bundle: Bundle) -> None:
    for training in (True, False):
        bundle.model.train(training)
        before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
        evaluate(bundle, dataset_of(5))
        assert bundle.model.training == training
        assert all(torch.equal(before[name], tensor) for name, tensor in bundle.model.state_dict().items())


def test_progress_reports_every_batch(bundle: Bundle) -> None:
    calls = []
    evaluate(bundle, dataset_of(10), batch_size=4, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(4, 10), (8, 10), (10, 10)]


def test_unreadable_files_are_left_out_and_named(bundle: Bundle, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(5):
            pixels = generator.integers(0, 255, (40, 400, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    bad = tmp_path / "images" / "b" / "2.png"
    bad.write_bytes(bad.read_bytes()[:200])

    report = evaluate(bundle, tmp_path / "images", split="all", batch_size=3)
    assert report.figures["n"] == 19
    assert list(report.bad_images) == ["b/2.png"]
    assert "| b/2.png |" in to_markdown(report).replace("\\", "")
    assert {thumbnail.shape for thumbnail in report.thumbnails} == {(16, 160, 3)}
    write_report(report, tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["bad_images"] == dict(report.bad_images)


def test_data_without_a_readable_image_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.png").write_text("not an image")
    with pytest.raises(UserError, match="none of the 8 images"):
        evaluate(bundle, tmp_path, split="all")


@pytest.mark.slow
def test_a_loaded_bundle_has_the_same_report(bundle: Bundle, tmp_path: Path) -> None:
    splits = open_dataset("digits")
    digits = bundle_of(splits.classes)
    assert evaluate(load(digits.save(tmp_path / "bundle")), splits) == evaluate(digits, splits)
    assert evaluate(digits, "digits") == replace(evaluate(digits, splits), seconds=0.0)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_bundle_is_accepted_by_its_folder(bundle: Bundle, tmp_path: Path, kind: type) -> None:
    folder = bundle.save(tmp_path / "bundle")
    assert evaluate(kind(folder), dataset_of()).figures == pytest.approx(evaluate(bundle, dataset_of()).figures)
    with pytest.raises(UserError, match="nowhere is not a bundle: there is no such folder"):
        evaluate(kind(tmp_path / "nowhere"), dataset_of())


def test_data_is_split_as_it_was_for_training() -> None:
    classes = tuple(open_dataset("digits").classes)
    trained = replace(bundle_of(classes), record={"recipe": {"validation_fraction": 0.02}})
    held_out = open_dataset("digits", validation_fraction=0.02).validation
    report = evaluate(trained, "digits")
    assert report.figures["n"] == len(held_out) < len(open_dataset("digits").validation)


@pytest.mark.parametrize("counts", [{"a": 3}, {"a": 1, "b": 1}, {"test/a": 2, "test/b": 1}])
def test_what_is_too_little_to_train_on_is_measured(counts: dict[str, int], bundle: Bundle, tmp_path: Path) -> None:
    for name, count in counts.items():
        (tmp_path / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(tmp_path / name / f"{number}.png")
    assert evaluate(bundle, tmp_path, split="all").figures["n"] == sum(counts.values())
    features, labels, names = extract_features(bundle, tmp_path, split="all").gather()
    assert len(features) == len(labels) == len(names) == sum(counts.values())
    assert evaluate(bundle, tmp_path).figures["n"] >= 1
    if "a" in counts and len(counts) == 1:
        return
    with pytest.raises(UserError, match="the training split holds no images; --split all"):
        evaluate(bundle, tmp_path, split="training")


def test_two_spellings_of_an_accent_stay_two_classes_of_a_model_that_has_both() -> None:
    names = tuple(unicodedata.normalize(form, "caf\u00e9") for form in ("NFD", "NFC"))
    translate = label_translation(dataset_of(classes=names), bundle_of(names))
    assert translate(torch.tensor([0, 1, 0])).tolist() == [0, 1, 0]
