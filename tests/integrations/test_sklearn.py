"""The estimators train, predict and compose as scikit-learn's do, on real images."""

import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted, validate_data

from coatnet import Predictor, UserError
from coatnet.data.builtin import open_fashion_mnist_small
from coatnet.data.decode import Scale
from coatnet.integrations.sklearn import CoAtNetClassifier, CoAtNetFeatures, _Images
from coatnet.training.trainer import Trainer

TINY: dict[str, Any] = {"model": "coatnet-femto-16", "resolution": 16, "recipe": {"num_workers": 0}}


@pytest.fixture(scope="module")
def garments() -> tuple[NDArray[np.uint8], NDArray[np.str_]]:
    """Trousers and ankle boots, which a network tells apart in some steps: 160 images."""
    splits = open_fashion_mnist_small()
    rows = np.concatenate([np.flatnonzero(splits.training.labels == label)[:80] for label in (1, 9)])
    rows = np.random.default_rng(0).permutation(rows)
    return np.asarray(splits.training.images[rows]), np.array(splits.classes)[splits.training.labels[rows]]


@pytest.fixture(scope="module")
def fitted(garments: tuple[NDArray[np.uint8], NDArray[np.str_]]) -> CoAtNetClassifier:
    return CoAtNetClassifier(epochs=6, **TINY).fit(*garments)


@pytest.mark.slow
def test_a_classifier_learns_and_gives_probabilities(fitted: CoAtNetClassifier, garments: Any) -> None:
    images, labels = garments
    assert fitted.score(images, labels) > 0.9
    found = fitted.predict_proba(images[:8])
    assert found.shape == (8, 2) and np.allclose(found.sum(axis=1), 1)
    assert (fitted.classes_[found.argmax(axis=1)] == fitted.predict(images[:8])).all()
    assert list(fitted.classes_) == ["Ankle boot", "Trouser"] and set(fitted.bundle_.classes) == set(fitted.classes_)
    assert fitted.report_.figures["n"] >= 8


@pytest.mark.nightly
def test_the_same_seed_gives_the_same_model(garments: Any) -> None:
    images, labels = garments
    one, other = (CoAtNetClassifier(epochs=1, **TINY).fit(images, labels).predict_proba(images[:4]) for _ in range(2))
    assert (one == other).all()


def test_a_pickle_and_a_saved_bundle_predict_alike(fitted: CoAtNetClassifier, garments: Any, tmp_path: Path) -> None:
    images = garments[0][:4]
    expected = fitted.predict_proba(images)
    assert (pickle.loads(pickle.dumps(fitted)).predict_proba(images) == expected).all()
    saved = Predictor(fitted.bundle_.save(tmp_path / "bundle"), "torch")(list(images))
    assert [each.classes[0] for each in saved] == list(fitted.predict(images))


def test_paths_and_scaled_pixels_are_the_same_images(fitted: CoAtNetClassifier, garments: Any, tmp_path: Path) -> None:
    images = garments[0][:6]
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    expected = fitted.predict_proba(images)
    assert (fitted.predict_proba(paths) == expected).all()
    assert (fitted.predict_proba(np.array([str(path) for path in paths])) == expected).all()
    assert (fitted.predict_proba(list(images)) == expected).all()
    unit = CoAtNetFeatures(str(fitted.bundle_.save(tmp_path / "bundle")))
    whole = garments[0] / 255.0
    expected = unit.fit(images).transform(images)
    for scaled in (whole, list(whole)):
        assert np.allclose(unit.fit(scaled).transform(scaled[:6]), expected, atol=1e-5)


def test_features_feed_any_estimator(fitted: CoAtNetClassifier, garments: Any, tmp_path: Path) -> None:
    images, labels = garments
    source = str(fitted.bundle_.save(tmp_path / "bundle"))
    pipeline = make_pipeline(CoAtNetFeatures(source), LogisticRegression())
    assert cross_val_score(pipeline, images, labels, cv=2).mean() > 0.9
    features = pipeline[0].fit(images)
    table = features.transform(images[:3])
    assert table.shape == (3, len(features.get_feature_names_out())) and table.dtype == np.float32


@pytest.mark.nightly
def test_grid_search_over_a_field(garments: Any) -> None:
    search = GridSearchCV(CoAtNetClassifier(**TINY), {"epochs": [0.1, 4]}, cv=2)
    search.fit(*garments)
    assert search.best_params_ == {"epochs": 4}
    assert clone(search.best_estimator_).get_params() == search.best_estimator_.get_params()


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (np.zeros((4, 5)), [0, 1, 0, 1], r"an image of X is float64 of shape \(5,\)"),
        (np.zeros((4, 5, 5)), [0, 0, 0, 0], "y has one class"),
        (np.zeros((4, 5, 5)), [0, 1, 0], "inconsistent numbers of samples"),
        (np.full((4, 5, 5), np.nan), [0, 1, 0, 1], "NaN or infinity"),
        (np.zeros((0, 5, 5)), [], "0 samples"),
        (np.zeros((4, 5, 5), np.uint8), ["", "c", "", "c"], "the label ''"),
        ("image.png", [1], "give a list of paths"),
        (np.zeros((2, 5, 5)), [0, 1], "no class of y has two images"),
    ],
)
def test_what_cannot_be_fitted_is_one_error(X: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoAtNetClassifier(**TINY).fit(X, y)


def test_paths_that_are_no_unicode_are_images_like_others() -> None:
    paths = [f"/images/{number}-\udcff.png" for number in range(4)]
    images = _Images(("a", "b"), paths, np.arange(4) % 2, np.arange(4))
    assert images.describe(0) == r"/images/0-\xff.png" and len(list(images.content())) == 5


def test_unreadable_images_have_their_name_in_the_error(fitted: CoAtNetClassifier, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    features = CoAtNetFeatures(str(fitted.bundle_.save(tmp_path / "bundle"))).fit([str(tmp_path / "cut.png")])
    for call in (fitted.predict, features.transform):
        with pytest.raises(ValueError, match=r"cut\.png"):
            call([str(tmp_path / "cut.png")])
    with pytest.raises(UserError, match="rescipe"):
        CoAtNetClassifier(recipe={"rescipe": 1}).fit(np.zeros((4, 5, 5), np.uint8), [0, 1, 0, 1])


def test_ctrl_c_ends_the_call_and_not_the_session(garments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def interrupted(trainer: Trainer, *batch: Any) -> tuple[float, float]:
        signal.raise_signal(signal.SIGINT)
        return step(trainer, *batch)

    monkeypatch.setattr(Trainer, "step", interrupted)
    images, labels = garments
    with pytest.raises(KeyboardInterrupt):
        CoAtNetClassifier(epochs=1, **TINY).fit(images, labels)


def as_images(X: Any) -> Any:
    """Rows of numbers as images of bars, 8 pixels wide."""
    return np.repeat(X[:, :, None], 8, axis=2)


class RowsAsImages:
    """Rows of numbers as images, so that scikit-learn's own checks, which know rows only, can be run."""

    def fit(self, X: Any, y: Any) -> Any:
        X, y = validate_data(self, X, y)
        return super().fit(as_images(X), y)  # pyrefly: ignore

    def predict_proba(self, X: Any) -> Any:
        check_is_fitted(self)
        return super().predict_proba(as_images(validate_data(self, X, reset=False)))  # pyrefly: ignore

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # pyrefly: ignore
        tags.input_tags.two_d_array, tags.input_tags.three_d_array, tags.input_tags.string = True, False, False
        tags.classifier_tags.poor_score = True  # a few steps
        tags.non_deterministic = False
        return tags


class RowClassifier(RowsAsImages, CoAtNetClassifier):
    """The classifier for rows."""


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_checks_of_scikit_learn() -> None:
    estimator = RowClassifier("coatnet-femto-16", resolution=16, epochs=0.5, recipe={"num_workers": 0})
    failed = {
        check["check_name"]: str(check["exception"])
        for check in check_estimator(estimator, on_fail=None, on_skip=None)
        if check["status"] == "failed"
    }
    assert failed == {}


def test_images_of_four_channels_for_a_model_of_colors_are_refused(fitted: CoAtNetClassifier, tmp_path: Path) -> None:
    saved = str(fitted.bundle_.save(tmp_path / "bundle"))
    with pytest.raises(ValueError, match=r"an image of X has 4 channels; this model takes gray or color images"):
        CoAtNetFeatures(saved).fit(np.zeros((2, 16, 16, 4), np.uint8))


def test_images_of_twelve_bands_are_paths_or_values(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 4096, (40, 16, 16, 12)).astype(np.uint16)
    labels = np.arange(40) % 2
    values[labels == 1, ..., 7] //= 8
    paths = [str(tmp_path / f"{number}.npy") for number in range(40)]
    for path, each in zip(paths, values, strict=True):
        np.save(path, each)
    given = {**TINY, "recipe": {"num_workers": 0, "batch_size": 8}}
    by_path, by_value = (CoAtNetClassifier(epochs=1, **given).fit(X, labels) for X in (paths, values))
    for fitted in (by_path, by_value):
        assert fitted.bundle_.preprocessing.scale == Scale(12, 0, 4095)
        np.testing.assert_allclose(fitted.predict_proba(paths[:4]), fitted.predict_proba(values[:4]), atol=1e-6)
    saved = str(by_value.bundle_.save(tmp_path / "bundle"))
    one, other = (CoAtNetFeatures(saved).fit_transform(X) for X in (paths[:5], values[:5]))
    np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(ValueError, match=r"give a path, or pixels \(H, W\) or \(H, W, C\)"):
        by_value.predict(np.moveaxis(values[:1], -1, 1))  # channels first
