"""Evaluation of a finished model on labeled images. Shapes: B batch, K classes."""

import heapq
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from coatnet.bundle import Bundle, load
from coatnet.bundle.bundle import place_name, without_places
from coatnet.bundle.config import extensions
from coatnet.data.channels import to_rgb, with_scale
from coatnet.data.datasets import Dataset
from coatnet.data.decode import BadImage
from coatnet.data.folder import MANIFEST_SUFFIXES
from coatnet.data.hugging_face import SCHEME
from coatnet.data.loader import BadImages, read_image
from coatnet.data.open import data_path, open_dataset
from coatnet.data.splits import SplitRule, Splits
from coatnet.data.test_time_augmentation import check_crops, check_views
from coatnet.data.transforms import EvaluationTransform, Image, as_images, seen_box
from coatnet.errors import UserError
from coatnet.evaluation.metrics import Interval, Metrics
from coatnet.evaluation.outputs import ImageOutputs, compute_outputs
from coatnet.evaluation.predictions import (
    ImageProperties,
    Predictions,
    choose_examples,
    choose_properties,
    few_enough,
    find_duplicates,
    find_slices,
)
from coatnet.evaluation.reliability import PROBABILITY_FIGURES, ReliabilityCounts
from coatnet.evaluation.report import Mistake, Report
from coatnet.inference.explanation import Explanation, layercam
from coatnet.inference.logits import average_views
from coatnet.system.hardware import choose_device

NUM_MISTAKES = 24
EVALUATED_TOGETHER = 64  # images
KEPT_IMAGES = 50_000  # whose outputs are kept; chosen: the validation images of ImageNet; 450 MB of coatnet-0
THUMBNAIL_PIXELS, EXAMPLE_PIXELS = 160, 96  # of the longer side

# Probability of the wrong class, image (index of the dataset, index in it), true class, predicted class, its index.
_Wrong = tuple[float, tuple[int, int], str, str, int]


def evaluate(
    bundle: Bundle | str | Path,
    data: str | Path | Dataset | Splits,
    *,
    split: Literal["validation", "training", "test", "all"] = "validation",
    batch_size: int = EVALUATED_TOGETHER,
    num_workers: int | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    with_images: bool = True,
    views: str = "one",
) -> Report:
    """Evaluate a finished model: accuracy, log-likelihood, calibration and more, with 95 % intervals.

    An image that the model's calibration was fitted to counts with probabilities fitted without it.

    Classes of data and model are matched by name, in any order. Unreadable images are left out of the figures and
    named in the report. Outputs are computed in fp32, in evaluation mode.

    Args:
        bundle: the model: a bundle, its folder, or its id on the hub.
        data: a dataset, splits, or what `open_dataset` opens. Without a split of its own it is split as it was for the
            training of the bundle, so that no image of the training is among those held out.
        split: which part of data that has splits.
        batch_size: images per batch, or views, where there are several of an image; the figures do not depend on it.
        num_workers: processes that decode. By default, up to 2,000 images are decoded in this process, and more of
            them by one process per core, up to 8.
        device: "cpu", "cuda", "cuda:1" or "auto", the first GPU if there is one; the model is moved there. By default
            that of a given bundle's model, and "auto" for one that is loaded.
        progress: called after each batch with the number of images done and the number of all images.
        with_images: whether to collect what report.html shows beside the figures: up to 800 small images of the
            confusion matrix, and where the model looked in its worst mistakes.
        views: test-time augmentation, as in `Predictor`: "one" for none; or "flip", "five-crop", "ten-crop" or
            "ten-shift", whose probabilities are averaged.

    Returns:
        The report; `write_report` writes it to a folder.

    Raises:
        UserError: there is no such model, data, split or device, there are no such views, a class of the data is
            unknown to the model, or no image can be read.
    """
    check_views(views)
    bundle = load_model(bundle, device)
    images = SplitOutputs(bundle, data, split, batch_size=batch_size, num_workers=num_workers, views=views)
    return measure(bundle, images, progress=progress or no_progress, with_images=with_images)


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


class SplitOutputs:
    """The images of a split, and what a network computes for them, batch by batch, whatever its classifier.

    Args:
        bundle: the network, and the classes of the labels.
        data: as `evaluate` takes it.
        split: which part of data that has splits.
        batch_size: images computed together, or views, where there are several of an image: at least those of one.
        num_workers: processes that decode; None as in `evaluate`.
        views: as in `evaluate`.
        keep: compute once, with what a calibration needs, and keep the outputs if they are few enough.

    Attributes:
        name: of the data.
        split: name of the split, or `all`.
        datasets: in order.
        training: the images of the training, among which copies are looked for; None for no search.
        training_properties: what these look like, as far as it is known.
        bad_images: those that could not be read.
        seconds: that computing took, the last time.

    Raises:
        UserError: there is no such data or split, or there are no such views.
    """

    def __init__(
        self,
        bundle: Bundle,
        data: str | Path | Dataset | Splits,
        split: str = "validation",
        *,
        batch_size: int = EVALUATED_TOGETHER,
        num_workers: int | None = None,
        views: str = "one",
        keep: bool = False,
    ) -> None:
        check_crops(views, bundle.preprocessing)
        data = open_recorded(data, bundle)
        self.name, self.datasets, self.split = choose_datasets(data, split, bundle)
        self.training = data.training if isinstance(data, Splits) and self.split in ("validation", "test") else None
        self.training_properties: Sequence[ImageProperties] = ()
        self.inspect = choose_properties(self.datasets, self.training)
        self.batch_size, self.num_workers, self.views = batch_size, num_workers, views
        self.bad_images = BadImages(len(self))
        self.seconds = 0.0
        self.keeps = keep and len(self) <= KEPT_IMAGES
        self._bundle, self._means = bundle, keep or bundle.calibration is not None
        self._kept: list[ImageOutputs] | None = None

    def __len__(self) -> int:
        """Number of images, including those that may turn out to be unreadable."""
        return sum(map(len, self.datasets))

    def batches(self, progress: Callable[[int], None] = lambda done: None) -> Generator[ImageOutputs, None, None]:
        """Yield each batch, computed now unless it is kept; `progress` is called with the number of images done.

        Raises:
            UserError: no image could be read, or as `compute_outputs`.
        """
        if self._kept is not None:
            yield from self._kept
            return
        started, kept, found_any = time.perf_counter(), list[ImageOutputs](), False
        self.seconds = 0.0
        batches = compute_outputs(
            self._bundle,
            self.datasets,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            bad_images=self.bad_images,
            means=self._means,
            inspect=self.inspect,
            views=self.views,
            progress=progress,
        )
        with closing(batches):
            for batch in batches:
                self.seconds += time.perf_counter() - started
                found_any = True
                if self.keeps:
                    kept.append(batch)
                yield batch
                started = time.perf_counter()
        if not found_any:
            raise UserError(
                f"{self.name}: none of the {len(self):,} images of the {self.split} split could be read, "
                f"the last one {self.bad_images.last}"
            )
        if self.keeps:
            self._kept = kept


def measure(
    bundle: Bundle,
    images: SplitOutputs,
    *,
    progress: Callable[[int, int], None] = no_progress,
    with_images: bool = True,
) -> Report:
    """The report on a bundle by what its network computed for images.

    Args:
        bundle: differs from that of the images at most in classifier and calibration.
        images: with outputs kept, or computed for a calibrated bundle, if this one is calibrated.
        progress: as in `evaluate`.
        with_images: as in `evaluate`.

    Raises:
        UserError: no image could be read.
    """
    num_classes, several, datasets = len(bundle.classes), bundle.multilabel, images.datasets
    metrics = Metrics(num_classes, several)
    # Ranks over images want one temperature for all; probabilities one that was not fitted to the image. With one label
    # an image, ranks are those of the classes of an image, and the same for both (of several views, nearly).
    fitted = Metrics(num_classes, several) if several and bundle.calibration else metrics
    worst: list[_Wrong] = []
    reliability = ReliabilityCounts(bundle) if bundle.calibration is not None else None
    places: list[tuple[int, int]] = []  # of each image: the dataset, and the index in it
    properties: list[ImageProperties] = []
    total = len(images)
    with closing(images.batches(lambda done: progress(done, total))) as outputs:
        for batch in outputs:
            answered = batch.logits(bundle)
            own = logits = average_views(answered, len(batch.labels), multilabel=several)
            if reliability is not None and batch.digests is not None:
                logits = reliability.update(answered, batch.means(bundle), batch.labels, batch.digests)
                if fitted is not metrics:
                    metrics.update(own, batch.labels)
            fitted.update(logits, batch.labels)
            places += batch.places
            properties += batch.properties or []
            wrong = _find_mistakes(logits, batch.labels, batch.places, bundle)
            worst = heapq.nsmallest(NUM_MISTAKES, [*worst, *wrong], key=lambda each: (-each[0], each[1]))

    predictions = _predictions(metrics, fitted, bundle, [datasets[number].describe(index) for number, index in places])
    thumbnails, heat_maps = [], []
    for _, (number, index), _, _, decision in worst:
        image = _read_again(datasets[number], index)
        thumbnails.append(thumbnail(image))
        if with_images:
            heat_maps.append(thumbnails[-1] if image is None else _heat_map(bundle, image, decision, thumbnails[-1]))
    shown = choose_examples(predictions) if with_images and not several else []
    confusion, (figures, intervals) = metrics.confusion(), combine_figures(metrics, fitted)
    return Report(
        data=images.name,
        split=images.split,
        model=bundle.model.variant.name,
        resolution=bundle.preprocessing.shown_size,
        views=images.views,
        num_parameters=sum(parameter.numel() for parameter in bundle.model.parameters()),
        classes=bundle.classes,
        multilabel=several,
        figures=figures,
        intervals=intervals,
        per_class=tuple(metrics.per_class()),
        confusion=None if confusion is None else tuple(map(tuple, confusion.tolist())),
        confused_pairs=tuple(
            (bundle.classes[truth], bundle.classes[predicted], count)
            for truth, predicted, count in metrics.confused_pairs()
        ),
        calibration=fitted.calibration(),
        mistakes=tuple(
            Mistake(datasets[number].describe(index), truth, predicted, probability)
            for probability, (number, index), truth, predicted, _ in worst
        ),
        bad_images=dict(images.bad_images.records),
        seconds=images.seconds,
        reliability=None if reliability is None else reliability.compute(),
        duplicates=(
            find_duplicates(predictions.correct, properties, images.training, images.training_properties)
            if properties and images.training is not None and few_enough(*datasets, images.training)
            else None
        ),
        slices=find_slices(predictions, properties) if properties else (),
        training=bundle.record.get("training") or {},
        recipe=without_places(bundle.record).get("recipe") or {},
        thumbnails=tuple(thumbnails),
        predictions=predictions,
        metrics=(metrics, fitted),
        heat_maps=tuple(heat_maps),
        examples=tuple(
            (row, thumbnail(_read_again(datasets[number], index), EXAMPLE_PIXELS))
            for row, (number, index) in ((row, places[row]) for row in shown)
        ),
    )


def combine_figures(ranks: Metrics, probabilities: Metrics) -> tuple[dict[str, float], dict[str, Interval | None]]:
    """Figures and intervals, of which those of probabilities are of other metrics than the rest, or of the same."""
    figures, intervals = ranks.compute(), ranks.intervals()
    if probabilities is not ranks:
        fitted, their_intervals = probabilities.compute(), probabilities.intervals()
        figures |= {name: fitted[name] for name in PROBABILITY_FIGURES}
        intervals |= {name: their_intervals[name] for name in PROBABILITY_FIGURES}
    return figures, intervals


def load_model(bundle: Bundle | str | Path, device: str | None) -> Bundle:
    """Load a bundle unless it is one, and move its model to a device; None is its own device, or "auto" if loaded."""
    if isinstance(bundle, Bundle) and device is None:
        return bundle
    target = choose_device(device or "auto")
    bundle = bundle if isinstance(bundle, Bundle) else load(bundle)
    bundle.model.to(target)
    return bundle


def choose_datasets(
    data: str | Path | Dataset | Splits, split: str, bundle: Bundle
) -> tuple[str, Sequence[Dataset], str]:
    """Open data and choose a split of it: name of the data, datasets in order, name of the split.

    Data without a split of its own is split as it was for the training of the bundle, so that no image of the training
    is among those held out.
    """
    data = open_recorded(data, bundle)
    if not isinstance(data, Splits):
        return data.name, (data,), "all"
    if split not in ("validation", "training", "test", "all"):
        raise UserError(f"split {split!r} is unknown; it is validation, training, test or all")
    if split == "test" and data.test is None:
        raise UserError(f"{data.name}: there is no test split beside training and validation")
    datasets = (data.training, data.validation) if split == "all" else (getattr(data, split),)
    # The test split of a training is measured once, at its end; of other images none are left out.
    if split == "all" and data.test is not None and data.by_name and not was_trained_on(bundle, data.name):
        datasets += (data.test,)
    if not any(map(len, datasets)):
        advice = "; --split all takes those of training and validation" if split != "all" else ""
        raise UserError(f"{data.name}: the {split} split holds no images{advice}")
    return data.name, datasets, split


def open_recorded(data: str | Path | Dataset | Splits, bundle: Bundle) -> Dataset | Splits:
    """The data, opened unless it is, and divided as it was when the model was made."""
    if isinstance(data, str | Path):
        data = open_dataset(data, rule=recorded_rule(bundle, data), evaluation=True, multilabel=bundle.multilabel)
    scale = bundle.preprocessing.scale
    return data.with_scale(scale) if isinstance(data, Splits) else with_scale(data, scale)


def recorded_rule(bundle: Bundle, data: str | Path | None = None) -> SplitRule:
    """How images were held out when the model was made; a tenth by their names if its record does not say.

    Of `data` that `extend` has learned classes from, none were left out as a test split.
    """
    rule = SplitRule.of(_recorded_values(bundle) or {})
    if data is not None and _is_among(data, _extended_by(bundle)) and not _is_among(data, _trained_on(bundle)):
        rule = replace(rule, test_fraction=0.0)
    # 0 is for images without a rule, such as those of `CoAtNetClassifier.fit`.
    return rule if rule.validation_fraction else replace(rule, validation_fraction=SplitRule.validation_fraction)


def was_trained_on(bundle: Bundle, data: str | Path) -> bool:
    """Whether a model learned from images of this name, or at this place, and held out others, by its record."""
    return _is_among(data, _trained_on(bundle))


def _trained_on(bundle: Bundle) -> list[str]:
    data = (_recorded_values(bundle) or {}).get("data")
    return [data] if isinstance(data, str) else []


def _extended_by(bundle: Bundle) -> list[str]:
    return [each["data"] for each in extensions(bundle.record) if each["data"]]


def _is_among(data: str | Path, recorded: Sequence[str]) -> bool:
    """Whether data are called as one of the recorded ones, each by its place or as `Splits.name` has it."""
    return not _names(data_path(str(data))).isdisjoint(name for each in recorded for name in _names(each))


def _names(data: str) -> set[str]:
    place = place_name(data)
    is_manifest = Path(place).suffix.lower() in MANIFEST_SUFFIXES
    return {place, Path(place).stem if is_manifest else place.removeprefix(SCHEME)}


def _recorded_values(bundle: Bundle) -> Mapping[str, Any] | None:
    recorded = (bundle.record.get(name) or {} for name in ("recipe", "probe"))
    return next((each for each in recorded if "validation_fraction" in each), None)


def _predictions(metrics: Metrics, fitted: Metrics, bundle: Bundle, images: Sequence[str]) -> Predictions:
    """The prediction for each image; its likelihood is that of probabilities that were not fitted to it."""
    labels, predicted, probability, *_ = metrics.per_image()
    nll = fitted.per_image()[4]

    def named(column: np.ndarray) -> tuple[str, ...]:
        if bundle.multilabel:
            return tuple(";".join(bundle.classes[k] for k in np.flatnonzero(row)) for row in column)
        return tuple(bundle.classes[k] for k in column)

    return Predictions(tuple(images), named(labels), named(predicted), probability, nll, metrics.probabilities())


def _find_mistakes(
    logits: Tensor, labels: Tensor, images: Sequence[tuple[int, int]], bundle: Bundle
) -> Iterator[_Wrong]:
    """Yield the misclassified images of a batch; for multi-label, the most confident wrong decision of an image."""
    if bundle.multilabel:
        gaps = (logits.sigmoid() - labels).abs()
        probabilities, decisions = gaps.max(dim=1)
        for row in np.flatnonzero(probabilities.numpy() > 0.5).tolist():
            decision = int(decisions[row])
            truth = ", ".join(bundle.classes[k] for k in np.flatnonzero(labels[row].numpy())) or "nothing"
            predicted = ("not " if labels[row, decision] else "") + bundle.classes[decision]
            yield float(probabilities[row]), images[row], truth, predicted, decision
        return
    predictions = logits.numpy().argmax(axis=1)  # numpy's, as in the figures: ties go to the lower class
    probabilities = logits.softmax(dim=1)
    for row in np.flatnonzero(predictions != labels.numpy()).tolist():
        truth, predicted = bundle.classes[int(labels[row])], bundle.classes[predictions[row]]
        yield float(probabilities[row, predictions[row]]), images[row], truth, predicted, int(predictions[row])


def _heat_map(bundle: Bundle, image: Image, decision: int, small: np.ndarray) -> np.ndarray:
    """A thumbnail with what mattered to the decision laid over: uint8 (H, W, 3)."""
    heat = layercam(bundle, EvaluationTransform(bundle.preprocessing)(image)[None], torch.tensor([decision]))[0].numpy()
    height, width = as_images(image).shape[1:]
    box = seen_box(height, width, bundle.preprocessing)
    return np.array(Explanation("", heat=heat, box=box).overlay(PIL.Image.fromarray(small)))


def _read_again(dataset: Dataset, index: int) -> Image | None:
    """An image that was measured, to show it; None if it cannot be read any more, which costs no figure."""
    try:
        return read_image(dataset, index)[0]
    except BadImage:
        return None


def thumbnail(image: Image | None, side: int = THUMBNAIL_PIXELS) -> np.ndarray:
    """An image, uncropped, with so many pixels a side at most: uint8 (H, W, 3); for None a gray square."""
    if image is None:
        return np.full((side, side, 3), 128, np.uint8)
    pixels = to_rgb(as_images(image))  # (3, H, W)
    scale = side / max(pixels.shape[1:])
    if scale < 1:
        size = [max(1, round(length * scale)) for length in pixels.shape[1:]]
        pixels = F.interpolate(pixels[None].float(), size=size, mode="bilinear", antialias=True)[0]
        pixels = pixels.round().clamp(0, 255).byte()
    return pixels.permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)
