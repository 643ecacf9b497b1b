"""CoAtNets as estimators of scikit-learn: a classifier that trains, and features for any other estimator.

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from coatnet.integrations.sklearn import CoAtNetFeatures

classifier = make_pipeline(CoAtNetFeatures("timm/coatnet_0_rw_224.sw_in1k"), LogisticRegression())
classifier.fit(paths, labels)
"""

import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.console import Console

from coatnet.bundle import Bundle, load
from coatnet.data.channels import find_scale, with_scale
from coatnet.data.datasets import ArrayDataset, Dataset, Encoded, as_labels, printable, read_image_file
from coatnet.data.decode import MAX_CHANNELS
from coatnet.data.splits import Splits, choose_validation
from coatnet.errors import UserError, import_extra
from coatnet.evaluation.features import extract_features
from coatnet.inference.predictor import Predictor
from coatnet.training.config import Recipe
from coatnet.training.interruption import Interrupted, exit_code
from coatnet.training.run import train

import_extra("sklearn", "sklearn", "coatnet.integrations.sklearn")

from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin  # noqa: E402
from sklearn.utils import Tags  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d  # noqa: E402

__all__ = ["CoAtNetClassifier", "CoAtNetFeatures"]

_Image = str | NDArray


class _ImageEstimator(BaseEstimator):
    """An estimator whose samples are images: paths of files, or arrays of pixels."""

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        return tags

    def _learn_range(self, X: Any) -> None:
        """Note the lowest and the highest value of pixels that are not uint8: these become 0 and 255."""
        self.value_range_ = (0.0, 255.0)
        if isinstance(X, str | os.PathLike | bytes) or not hasattr(X, "__len__"):
            return  # `_images` refuses it
        whole = isinstance(X, np.ndarray) and X.dtype.kind in "iufb"
        arrays = [X] if whole else [np.asarray(each) for each in X if not isinstance(each, str | os.PathLike)]
        arrays = [each for each in arrays if each.dtype.kind in "iufb" and each.dtype != np.uint8 and each.size]
        if arrays:
            self.value_range_ = (float(min(each.min() for each in arrays)), float(max(each.max() for each in arrays)))

    def _images(self, X: Any, bundle: Bundle | None = None) -> list[_Image]:
        """Each image as a path or as pixels: uint8 (H, W) or (H, W, 3), or values for a model with a scale."""
        if isinstance(X, str | os.PathLike | bytes) or not hasattr(X, "__len__"):
            raise ValueError(f"X is a {type(X).__name__}: give a list of paths, or an array (N, H, W) or (N, H, W, C)")
        if hasattr(X, "to_numpy"):  # a column of a data frame
            X = X.to_numpy()
        if isinstance(X, np.ndarray) and X.dtype.kind == "O" and X.ndim > 1:
            X = X.ravel()  # a data frame of one column of paths
        images = [self._image(image, bundle) for image in X]
        if not images:
            raise ValueError("X has 0 samples; a minimum of 1 is required")
        return images

    def _image(self, image: Any, bundle: Bundle | None) -> _Image:
        if isinstance(image, str | os.PathLike):
            return os.fspath(image)
        pixels = np.asarray(image)
        height, _, channels = (*pixels.shape, 1)[:3] if pixels.ndim in (2, 3) else (0, 0, 0)
        if not 1 <= channels <= MAX_CHANNELS or channels > max(3, height) or pixels.dtype.kind not in "iufb":
            raise ValueError(
                f"an image of X is {pixels.dtype} of shape {pixels.shape}: give a path, or pixels (H, W) or (H, W, C)"
            )
        scale = None if bundle is None else bundle.preprocessing.scale
        if channels not in (1, 3) and bundle is not None and scale is None:
            raise ValueError(f"an image of X has {channels} channels; this model takes gray or color images (1 or 3)")
        if channels not in (1, 3) or scale is not None:
            return pixels
        pixels = pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels
        if pixels.dtype == np.uint8:
            return pixels
        if not np.isfinite(pixels).all():
            raise ValueError("an image of X contains NaN or infinity")
        low, high = self.value_range_
        scaled = (pixels.astype(np.float64) - low) * (255 / (high - low or 1))
        return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


class CoAtNetClassifier(ClassifierMixin, _ImageEstimator):
    """Train a CoAtNet on images, as `coatnet train` does.

    X is a list or an array of N images: paths of image files, or pixels (N, H, W) or (N, H, W, C), C of 1 to 16. Gray
    and color pixels that are not uint8 are scaled to it by the lowest and the highest value of X in `fit`.

    Args:
        model: name of the network; None is chosen from the images.
        init: weights to start from: a bundle's folder, an id on the hub, or "auto"; None is from nothing.
        epochs: passes over the images; None is chosen from their number.
        max_minutes: at most so many minutes; the schedule is fitted to them. None is without a limit.
        resolution: side of the images that the network sees, in pixels; None is chosen from the images.
        validation_fraction: the fraction of X that `fit` holds out, to calibrate the probabilities and for `report_`.
        recipe: other fields of `coatnet.Recipe`, by name.
        random_state: seed of the run.
        verbose: 0 for silence, 1 for the progress of `coatnet train`.

    Attributes:
        classes_: labels of the K classes, sorted, (K,).
        bundle_: the finished model; `bundle_.save(folder)` writes it for every other use.
        report_: its evaluation on the held-out images.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        init: str | None = None,
        epochs: float | None = None,
        max_minutes: float | None = None,
        resolution: int | None = None,
        validation_fraction: float = 0.1,
        recipe: Mapping[str, Any] | None = None,
        random_state: int = 0,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.init = init
        self.epochs = epochs
        self.max_minutes = max_minutes
        self.resolution = resolution
        self.validation_fraction = validation_fraction
        self.recipe = recipe
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: ArrayLike) -> Self:
        """Train from the beginning.

        Args:
            X: N images.
            y: their labels, (N,).

        Raises:
            ValueError: X or y is no such thing, they differ in length, or y has one class only.
            UserError: the images cannot be read or trained on, or a field of the recipe is wrong.
            KeyboardInterrupt: Ctrl-C; nothing of the training is kept.
        """
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        self._learn_range(X)
        images = self._images(X)
        labels = column_or_1d(y, warn=True)
        check_classification_targets(labels)
        check_consistent_length(images, labels)
        self.classes_, indices = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class, {str(self.classes_[0])!r}; a classifier needs two")
        fields: dict[str, Any] = {
            "model": self.model,
            "init": self.init,
            "epochs": self.epochs,
            "max_minutes": self.max_minutes,
            "resolution": self.resolution,
            "validation_fraction": self.validation_fraction,
            "seed": self.random_state,
        }
        asked = {name: value for name, value in fields.items() if value is not None}
        held_out = choose_validation([f"X[{row}]" for row in range(len(images))], indices, self.validation_fraction)
        if not held_out.any():
            raise ValueError("no class of y has two images, so that one could be held out")
        training, validation = (
            self._dataset(images, indices, np.flatnonzero(chosen)) for chosen in (~held_out, held_out)
        )
        scale = find_scale(training)
        training, validation = with_scale(training, scale), with_scale(validation, scale)
        channels = {image.shape[2] for image in images if isinstance(image, np.ndarray) and image.ndim == 3}
        if channels - {3}:
            asked["channels"] = max(channels)
        recipe = Recipe(data="X", **{**asked, **(self.recipe or {})})
        with tempfile.TemporaryDirectory(prefix="coatnet-") as folder:
            console = None if self.verbose else Console(quiet=True)
            try:
                self.report_ = train(recipe, folder, splits=Splits("X", training, validation), console=console)
            except Interrupted as stopped:
                if stopped.code == exit_code(signal.SIGINT):  # Ctrl-C must not end a Python session
                    raise KeyboardInterrupt from None
                raise
            self.bundle_ = load(Path(folder) / "bundle")
        return self

    def _dataset(self, images: Sequence[_Image], labels: NDArray, rows: NDArray) -> Dataset:
        chosen = [images[row] for row in rows]
        first = chosen[0]
        plain = isinstance(first, np.ndarray) and first.shape[2:] in ((), (3,))
        if plain and all(isinstance(image, np.ndarray) and image.shape == first.shape for image in chosen):
            return ArrayDataset("X", self._names(), np.stack(chosen), labels[rows], rows)
        return _Images(self._names(), chosen, labels[rows], rows)

    def _names(self) -> list[str]:
        """Names of the classes in the bundle."""
        names = [str(label) for label in self.classes_]
        if unusable := [name for name in names if not name.strip() or not name.isprintable()]:
            raise ValueError(f"y has the label {unusable[0]!r}: a class needs a name that can be printed")
        return names

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probabilities of the classes, (N, K), in the order of `classes_`. Raises ValueError for unreadable images."""
        check_is_fitted(self)
        predictions = Predictor(self.bundle_, "torch")(self._images(X, self.bundle_), top_k=len(self.classes_))
        column = {name: index for index, name in enumerate(self._names())}
        found = np.zeros((len(predictions), len(self.classes_)))
        for row, prediction in zip(found, predictions, strict=True):
            if prediction.error is not None:
                raise ValueError(f"{prediction.name}: {prediction.error}")
            row[[column[name] for name in prediction.classes]] = prediction.probabilities
        return found / found.sum(axis=1, keepdims=True)  # of float32, whose sum is 1 to its precision only

    def predict(self, X: Any) -> NDArray:
        """The most probable label of each image, (N,)."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]


class CoAtNetFeatures(TransformerMixin, _ImageEstimator):
    """The features of a trained CoAtNet, the input of its classifier, for any estimator of scikit-learn.

    X is as for `CoAtNetClassifier`. Nothing is trained: `fit` loads the model.

    Args:
        source: a bundle's folder or an id on the hub.
        batch_size: images computed together.
        device: "cpu", "cuda" or "cuda:1"; None is the first GPU if there is one.

    Attributes:
        bundle_: the model.
    """

    def __init__(self, source: str, *, batch_size: int = 64, device: str | None = None) -> None:
        self.source = source
        self.batch_size = batch_size
        self.device = device

    def fit(self, X: Any, y: ArrayLike | None = None) -> Self:
        """Load the model. Raises ValueError if X holds no images, UserError if there is no such model."""
        self._learn_range(X)
        bundle = load(self.source)
        self._images(X, bundle)
        self.bundle_ = bundle
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """The features of N images, (N, D). Raises ValueError for unreadable images."""
        check_is_fitted(self)
        pixels_or_paths = self._images(X, self.bundle_)
        count = len(pixels_or_paths)
        images = _Images((), pixels_or_paths, np.full(count, -1), np.arange(count))
        features = extract_features(self.bundle_, images, batch_size=self.batch_size, device=self.device or "auto")
        try:
            table, _, names = features.gather()
        except UserError as error:
            raise ValueError(str(error)) from error
        if features.bad_images:
            name, reason = next(iter(features.bad_images.items()))
            raise ValueError(f"{name}: {reason}")
        assert len(names) == count
        return table.numpy()

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> NDArray:
        """Names of the D features."""
        check_is_fitted(self)
        return np.array([f"coatnet{number}" for number in range(self.bundle_.model.num_features)], dtype=object)


class _Images(Dataset):
    """Images of any size, each a path or pixels: some rows of X."""

    name, multilabel = "X", False
    thread_safe = True

    def __init__(self, classes: Sequence[str], images: Sequence[_Image], labels: NDArray, rows: NDArray) -> None:
        self.classes = tuple(classes)
        self.images, self.labels, self.rows = images, as_labels(labels), rows

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Encoded, NDArray]:
        image = self.images[index]
        return read_image_file(image, image) if isinstance(image, str) else image, self.labels[index]

    def describe(self, index: int) -> str:
        image = self.images[index]
        return printable(image) if isinstance(image, str) else f"X[{self.rows[index]}]"
