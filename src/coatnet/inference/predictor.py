"""A finished model in an engine: from images in any form to class names with probabilities.

Shapes: B images, V views of each, R resolution, C channels (3, or 1 for grayscale models), K classes.
"""

import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from coatnet.bundle import Bundle, load
from coatnet.bundle.calibration import METHODS, Calibration, is_refused, set_scores, threshold_index
from coatnet.data.channels import as_values, read_pixels, to_levels, values_of
from coatnet.data.datasets import MAX_IMAGE_BYTES, read_image_file
from coatnet.data.decode import BadImage, Scale, pixels_of
from coatnet.data.folder import expand_paths
from coatnet.data.test_time_augmentation import NUM_VIEWS, augmented_views, check_crops, check_views
from coatnet.data.transforms import as_images, match_channels, normalize, seen_box
from coatnet.errors import UserError, first_line, nearest
from coatnet.inference.engines import open_engine
from coatnet.inference.explanation import Box, Explanation, check_method, heat_maps
from coatnet.inference.graph import to_probabilities
from coatnet.public_names import renamed_attribute
from coatnet.system.hardware import num_cores

Image = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | PIL.Image.Image | NDArray[np.uint8] | Tensor
)

_FORMS = "give a path, encoded bytes, a file opened in binary mode, an image of Pillow, an array or a tensor"


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, or why it has none.

    Attributes:
        name: the path of the image, or `image 3` for the fourth of images without a path.
        classes: names of the `top_k` most probable classes, in descending order of probability.
        probabilities: of these classes.
        error: why the image is unreadable, or the model has no answer to it; None if it was classified.
        novelty: the share of the model's held-out images that look more like its training images, 0 to 1; None if the
            model is not calibrated.
        unknown: whether the novelty is above the limit of `reject`; the classes are then a guess.
        class_set: with `coverage`, names of the classes that together hold the truth so often, most probable first.
    """

    name: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None
    novelty: float | None = None
    unknown: bool = False
    class_set: tuple[str, ...] | None = None


class BatchScores(NamedTuple):
    """What a model computes for a batch: probabilities (B, K), and the novelty (B,) if it is calibrated."""

    probabilities: NDArray[np.float32]
    novelty: NDArray[np.float32] | None


class Predictor:
    """Classify images with a finished model.

    Args:
        source: a bundle, its folder, or its id on the hub.
        engine: "torch", "torch-compiled", "openvino" or "onnxruntime"; "auto" is the fastest that is installed.
        precision: "fp32" or "bf16"; "auto" is bf16 where engine and hardware compute in it, and on CPUs only where
            that is faster.
        views: test-time augmentation: "one" for none; or "flip", "five-crop", "ten-crop" or "ten-shift", whose
            probabilities are averaged, as is the novelty.
        reject: the share of images like the held-out ones that may be refused as unknown, such as 0.05; None for none.
        coverage: how often a set of classes is to hold the truth, such as 0.9; None for no sets.
        set_method: "lac" (the smallest sets), "aps" or "raps" (sets that grow with the doubt about an image).
        raw: take the network's own probabilities, without its calibration.
        device: "cpu", "cuda" or "cuda:1"; "auto" is the first GPU if there is one. Only torch runs on a GPU.

    Attributes:
        bundle: the model with its classes and preprocessing.
        classes: names of the K classes.
        multilabel: whether an image may have several labels; probabilities are then independent of each other.
        engine: computes the logits; its `name` and `precision` are those chosen.
        image_shape: of a prepared image: (V, R, R, C).
        scale: how values become levels, where the model takes other images than 8-bit RGB; else None.
        pixel_type: of a prepared image: uint8, or float32 where the model takes other values than 8-bit RGB.

    Raises:
        UserError: there is no such model, engine, precision, view or device, the engine is not installed, or `reject`
            or `coverage` is given for a model that is not calibrated (or, for sets, has several labels).
    """

    picture_shape = renamed_attribute("picture_shape", "image_shape", since="0.2", removed_in="0.3")

    def __init__(
        self,
        source: Bundle | str | Path,
        engine: str = "auto",
        precision: str = "auto",
        *,
        views: str = "one",
        reject: float | None = None,
        coverage: float | None = None,
        set_method: str = "lac",
        raw: bool = False,
        device: str = "auto",
    ) -> None:
        check_views(views)
        bundle = source if isinstance(source, Bundle) else load(source)
        check_crops(views, bundle.preprocessing)
        self.bundle = bundle.uncalibrated() if raw else bundle
        self.reject = check_reject(self.bundle, reject)
        self.coverage, self.set_method = coverage, set_method
        self._set_threshold = None if coverage is None else find_threshold(self.bundle, coverage, set_method)
        self.classes, self.multilabel = self.bundle.classes, self.bundle.multilabel
        self.views = views
        self.image_shape = (NUM_VIEWS[views], *self.bundle.preprocessing.size, self.bundle.preprocessing.channels)
        self.scale = self.bundle.preprocessing.scale
        self.pixel_type = np.dtype(np.uint8 if self.scale is None else np.float32)
        self.engine = open_engine(self.bundle, engine, precision, device)
        self._explaining = threading.Lock()  # attention is read by hooks

    def __call__(self, images: Image | Iterable[Image], *, top_k: int = 5, batch_size: int = 32) -> list[Prediction]:
        """Classify images.

        Args:
            images: one image or several: paths of files; encoded bytes, as bytes, bytearray, memoryview or files opened
                in binary mode; images of Pillow; uint8 arrays (H, W) or (H, W, 3); or uint8 tensors (1 or 3, H, W).
            top_k: number of classes per prediction.
            batch_size: images computed together.

        Returns:
            One prediction per image, in order; that of an unreadable image has an `error`.

        Raises:
            UserError: top_k or batch_size is below 1, or an element is not an image in one of these forms.
        """
        check_at_least_one(top_k=top_k, batch_size=batch_size)
        given = _as_list(images)
        predictions: list[Prediction] = []
        with ThreadPoolExecutor(num_cores()) as readers:
            for first in range(0, len(given), batch_size):
                batch = given[first : first + batch_size]
                names = [_name(image, index) for index, image in enumerate(batch, first)]
                predictions += self._classify(names, list(readers.map(self._prepare_or_error, batch, names)), top_k)
        return predictions

    def predict_paths(
        self,
        paths: Iterable[str | Path],
        *,
        top_k: int = 5,
        batch_size: int = 32,
        left_out: Counter[str] | None = None,
    ) -> Iterator[Prediction]:
        """Classify image files, and all images in folders and their subfolders, yielding one batch after the other.

        Args:
            paths: files and folders; folders are searched in natural order.
            top_k: number of classes per prediction.
            batch_size: images computed together.
            left_out: counts the files below folders that are no images, by the ending of their names.

        Returns:
            An iterator over predictions, in order. A path that is missing, unreadable or not an image yields a
            prediction with an `error`.

        Raises:
            UserError: top_k or batch_size is below 1.
        """
        check_at_least_one(top_k=top_k, batch_size=batch_size)
        return self._predict_paths(expand_paths(paths, left_out), top_k, batch_size)

    def _predict_paths(
        self, found: Iterator[tuple[Path, str | None]], top_k: int, batch_size: int
    ) -> Iterator[Prediction]:
        while batch := list(itertools.islice(found, batch_size)):
            readable = [path for path, error in batch if error is None]
            predictions = iter(self(readable, top_k=top_k, batch_size=batch_size))
            for path, error in batch:
                yield next(predictions) if error is None else Prediction(str(path), error=error)

    def prepare(self, image: Image, name: str = "image") -> NDArray[np.uint8]:
        """Decode, resize and crop one image, in any form, for the engine: uint8 (V, R, R, C). Thread-safe.

        Args:
            image: as in `__call__`.
            name: of the image in errors.

        Raises:
            BadImage: the image cannot be read or decoded.
            UserError: it is not an image in one of the forms.
        """
        return self.prepare_and_locate(image, name)[0]

    def prepare_and_locate(self, image: Image, name: str = "image") -> tuple[NDArray[np.uint8], Box]:
        """As `prepare`, with the part of the image that the first view shows, as in `Explanation`. Thread-safe."""
        encoded = _encoded(image, name)
        scale = self.scale
        if encoded is not None:
            pixels = read_pixels(encoded, name, scale)
        elif scale is not None:
            pixels = _to_levels(image, name, scale)
        elif isinstance(image, PIL.Image.Image):
            pixels = pixels_of(image, name)
        else:
            pixels = _to_pixels(image, name)
        return self.prepare_pixels(pixels), seen_box(pixels.shape[-2], pixels.shape[-1], self.bundle.preprocessing)

    def prepare_pixels(self, pixels: Tensor) -> NDArray:
        """Resize and crop decoded pixels, uint8 (3 or 1, H, W) or levels (C, H, W), as `prepare`. Thread-safe."""
        pixels = match_channels(pixels, self.bundle.preprocessing)
        views = augmented_views(pixels[None], self.bundle.preprocessing, self.views)  # (V, 1 or C, R, R)
        views = views.permute(0, 2, 3, 1)  # (V, R, R, 1 or C)
        return views.expand(self.image_shape).contiguous().numpy()  # (V, R, R, C)

    def probabilities(self, images: NDArray) -> NDArray[np.float32]:
        """Compute the probabilities of a batch, averaged over the views. Not thread-safe.

        Args:
            images: prepared images, uint8 (B, V, R, R, C), or of `pixel_type`.

        Returns:
            (B, K): a softmax, or K sigmoids for multi-label.
        """
        return self.scores(images).probabilities

    def scores(self, images: NDArray) -> BatchScores:
        """Compute probabilities and novelty of a batch, averaged over the views. Not thread-safe.

        Args:
            images: prepared images, uint8 (B, V, R, R, C).
        """
        views = images.reshape(-1, *self.image_shape[1:])  # (B * V, R, R, C)
        found = torch.from_numpy(self.engine.run(views))  # (B * V, K), or (B * V, K + 1) with the novelty
        probabilities = to_probabilities(found[:, : len(self.classes)], multilabel=self.multilabel)
        probabilities = probabilities.unflatten(0, (len(images), -1)).mean(dim=1).numpy()  # (B, K)
        if self.bundle.calibration is None:
            return BatchScores(probabilities, None)
        return BatchScores(probabilities, found[:, -1].unflatten(0, (len(images), -1)).mean(dim=1).numpy())

    def explain(
        self,
        images: Image | Iterable[Image],
        *,
        method: str = "layercam",
        target: str | None = None,
        stage: int | None = None,
        batch_size: int = 16,
    ) -> list[Explanation]:
        """Say what mattered in images for one class of each, as heat maps.

        The probability is that of the engine; the map is computed by torch in float32 on the first view, wherever the
        bundle's network is.

        Args:
            images: as in `__call__`.
            method: "layercam", "attention" or "occlusion", see `coatnet.inference.explanation`.
            target: name of the class to explain; by default the most probable one of each image.
            stage: for LayerCAM, 0 for the stem, 1, 2, ... for the stages; by default the last
                convolutional one.
            batch_size: images computed together.

        Returns:
            One explanation per image, in order; that of an unreadable image has an `error`.

        Raises:
            UserError: there is no such method, class or stage, or the network has no attention.
        """
        check_at_least_one(top_k=1, batch_size=batch_size)
        check_method(self.bundle.model, method, stage)
        index = None if target is None else self.class_index(target)
        given = _as_list(images)
        explanations: list[Explanation] = []
        for first in range(0, len(given), batch_size):
            batch = given[first : first + batch_size]
            names = [_name(image, number) for number, image in enumerate(batch, first)]
            explanations += self._explain(names, batch, index, method, stage)
        return explanations

    def _explain(
        self, names: Sequence[str], images: Sequence[Image], index: int | None, method: str, stage: int | None
    ) -> list[Explanation]:
        errors: dict[int, str] = {}
        located: dict[int, tuple[NDArray[np.uint8], Box]] = {}
        for number, (image, name) in enumerate(zip(images, names, strict=True)):
            try:
                located[number] = self.prepare_and_locate(image, name)
            except BadImage as error:
                errors[number] = error.reason
        explained: dict[int, Explanation] = {}
        if located:
            views = np.stack([prepared for prepared, _ in located.values()])
            rows = self.probabilities(views)
            targets = rows.argmax(1) if index is None else np.full(len(rows), index)
            maps = self.heat_maps(views, targets, method=method, stage=stage)
            for number, row, target, heat in zip(located, rows, targets, maps, strict=True):
                if error := why_no_answer(row):
                    errors[number] = error
                else:
                    box, one = located[number][1], self.classes[target]
                    explained[number] = Explanation(names[number], one, float(row[target]), heat, box)
        return [explained.get(k) or Explanation(name, error=errors[k]) for k, name in enumerate(names)]

    def heat_maps(
        self,
        images: NDArray,
        targets: NDArray[np.integer[Any]],
        *,
        method: str = "layercam",
        stage: int | None = None,
    ) -> NDArray[np.float32]:
        """What mattered in prepared images, uint8 (B, V, R, R, C), for classes (B,): (B, R, R), 0 to 1. Thread-safe.

        Raises UserError as `explain` does.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(images[:, 0])).permute(0, 3, 1, 2)  # (B, C, R, R)
        normalized = normalize(pixels, self.bundle.preprocessing)
        with self._explaining:
            return heat_maps(self.bundle, normalized, torch.from_numpy(targets), method=method, stage=stage).numpy()

    def class_index(self, name: str) -> int:
        """The index of a class. Raises UserError if the model has none of that name."""
        if name not in self.classes:
            raise UserError(f"the model has no class {name[:100]!r}{nearest(name[:100], self.classes, most=3)}")
        return self.classes.index(name)

    def is_unknown(self, novelty: float | None) -> bool:
        """Whether an image of this novelty is refused."""
        return self.reject is not None and novelty is not None and bool(is_refused(novelty, self.reject))

    def class_set(self, probabilities: NDArray[np.float32]) -> tuple[str, ...] | None:
        """Names of the classes in the set of one image (K,), most probable first; None if none were asked for."""
        if self._set_threshold is None:
            return None
        scores = set_scores(torch.from_numpy(probabilities)[None], self.set_method)[0].numpy()
        inside = scores <= self._set_threshold
        return tuple(self.classes[k] for k in np.argsort(-probabilities, kind="stable") if inside[k])

    def top(self, probabilities: NDArray[np.float32], k: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Names and probabilities of the `k` most probable classes of one image (K,), in descending order."""
        return most_probable(self.classes, probabilities, k)

    def _prepare_or_error(self, image: Image, name: str) -> NDArray[np.uint8] | str:
        try:
            return self.prepare(image, name)
        except BadImage as error:
            return error.reason

    def _classify(self, names: Sequence[str], prepared: Sequence[NDArray[np.uint8] | str], k: int) -> list[Prediction]:
        readable = [views for views in prepared if not isinstance(views, str)]
        rows = self.describe_all(np.stack(readable), k) if readable else iter(())
        return [
            Prediction(name, error=views) if isinstance(views, str) else replace(next(rows), name=name)
            for name, views in zip(names, prepared, strict=True)
        ]

    def describe_all(self, images: NDArray, top_k: int) -> Iterator[Prediction]:
        """What is said of each of some prepared images, uint8 (B, V, R, R, C); without names. Not thread-safe."""
        probabilities, novelty = self.scores(images)
        for index, row in enumerate(probabilities):
            yield self.describe(row, None if novelty is None else float(novelty[index]), top_k)

    def describe(self, probabilities: NDArray[np.float32], novelty: float | None, top_k: int) -> Prediction:
        """What is said of one image, without a name: probabilities (K,), and its novelty if the model is calibrated."""
        if error := why_no_answer(probabilities):
            return Prediction("", error=error)
        unknown, class_set = self.is_unknown(novelty), self.class_set(probabilities)
        if novelty is not None:
            novelty = round(novelty, 6)  # thousandths that come as float32: 0.904, not 0.9039999842643738
        return Prediction("", *self.top(probabilities, top_k), None, novelty, unknown, class_set)


def most_probable(
    classes: Sequence[str], probabilities: NDArray[np.float32], k: int
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names and probabilities of the `k` most probable classes of one image (K,), in descending order; of equals the
    first."""
    best = np.argsort(-probabilities, kind="stable")[:k]
    return tuple(classes[index] for index in best), tuple(probabilities[best].tolist())


def check_reject(bundle: Bundle, reject: float | None) -> float | None:
    """Return the rate. Raises UserError if it is out of bounds or the bundle is not calibrated."""
    if reject is None:
        return None
    if not 0 < reject < 1:
        raise UserError(f"reject is {reject}; it is a share of images between 0 and 1, such as 0.05")
    _require_calibration(bundle, "reject")
    return reject


def find_threshold(bundle: Bundle, coverage: float, method: str) -> float:
    """The largest score of a class in a set. Raises UserError if the bundle has none for this coverage or method."""
    column = threshold_index(coverage)
    if bundle.multilabel:
        raise UserError("sets of classes are for models of one label per image; this one gives several")
    if method not in METHODS:
        raise UserError(f"set_method is {method!r}; it is one of {', '.join(METHODS)}")
    return float(_require_calibration(bundle, "a set of classes").thresholds[method][0, column])


def _require_calibration(bundle: Bundle, what: str) -> Calibration:
    if bundle.calibration is None:
        raise UserError(
            f"{what} needs a calibrated model, and this one is not, or its raw answers were asked for: "
            "`coatnet calibrate BUNDLE --data DATA` calibrates it"
        )
    return bundle.calibration


def why_no_answer(probabilities: NDArray[np.float32]) -> str | None:
    """The error of an image whose probabilities are not all numbers; None if they are."""
    if np.isfinite(probabilities).all():
        return None
    return "model: its answer to this image is not finite (NaN or infinity); its weights are broken"


def check_at_least_one(*, top_k: int, batch_size: int) -> None:
    """Raise UserError if one of the numbers is below 1."""
    if top_k < 1 or batch_size < 1:
        raise UserError(f"top_k is {top_k} and batch_size {batch_size}; both must be at least 1")


def _as_list(images: Any) -> list[Any]:
    one = str | os.PathLike | bytes | bytearray | memoryview | PIL.Image.Image
    if isinstance(images, one) or hasattr(images, "read"):
        return [images]
    if isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # names of files, as from a table
        images = images.ravel().tolist()
    if isinstance(images, np.ndarray | Tensor) and images.ndim < 4:
        return [images]
    if not isinstance(images, Iterable):
        raise UserError(f"a {type(images).__name__} is not an image: {_FORMS}")
    return [*images]


def _encoded(image: object, name: str) -> bytes | None:
    """The bytes of an image file; None for what is decoded already."""
    if isinstance(image, str | os.PathLike):
        return read_image_file(os.fspath(image), name)
    if isinstance(image, bytes | bytearray) or (isinstance(image, memoryview) and image.ndim == 1):
        return bytes(image)
    if isinstance(image, PIL.Image.Image) or not callable(read := getattr(image, "read", None)):
        return None
    try:
        data = read(MAX_IMAGE_BYTES + 1)
    except (OSError, ValueError) as error:  # such as a file that is closed
        raise BadImage(name, f"unreadable: {first_line(error)}") from error
    if not isinstance(data, bytes | bytearray):
        raise UserError(f"{name} is a file that gives {type(data).__name__}: open it in binary mode, 'rb'")
    if len(data) > MAX_IMAGE_BYTES:
        raise BadImage(name, f"unreadable: more than the {MAX_IMAGE_BYTES:,} bytes that are read")
    return bytes(data)


def _name(image: Image, index: int) -> str:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {index}"


def _to_levels(image: object, name: str, scale: Scale) -> Tensor:
    """Values of an array (H, W) or (H, W, C), of a tensor (C, H, W) or of an image of Pillow to levels (C, H, W)."""
    if isinstance(image, PIL.Image.Image):
        image = values_of(image, name, scale.channels)
    if isinstance(image, Tensor):
        image = image.movedim(-3, -1).numpy(force=True) if image.ndim == 3 else image.numpy(force=True)
    values = image if isinstance(image, np.ndarray) else None
    if values is None or values.ndim not in (2, 3) or values.dtype.kind not in "biuf" or 0 in values.shape:
        given = "" if values is None else f" {values.dtype} of shape {values.shape}"
        raise UserError(
            f"{name} is a {type(image).__name__}{given}: give values (H, W, C) of {scale.channels} channels"
        )
    return to_levels(as_values(values), name, scale)


def _to_pixels(image: object, name: str) -> Tensor:
    """Check an array or tensor: uint8 (1 or 3, H, W)."""
    if not isinstance(image, np.ndarray | Tensor):
        raise UserError(f"{name} is a {type(image).__name__}: {_FORMS}")
    if str(image.dtype).removeprefix("torch.") != "uint8" or 0 in image.shape:
        raise UserError(f"{name} is {image.dtype} of shape {tuple(image.shape)}: give pixels from 0 to 255 as uint8")
    pixels = as_images(image) if image.ndim > 1 else torch.as_tensor(image)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise UserError(
            f"{name} has shape {tuple(image.shape)}: an array is (H, W) or (H, W, 3), a tensor (1, H, W) or (3, H, W)"
        )
    return pixels.cpu()
