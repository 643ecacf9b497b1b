"""Calibration of a finished model on held-out images: temperatures, novelty, thresholds of sets of classes.

Shapes: N images, K classes, D width of stem and stages together.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.bundle.calibration import (
    FOLDS,
    MAX_DIMENSIONS,
    MAX_MEANS,
    METHODS,
    NO_THRESHOLD,
    STEPS,
    Calibration,
    FeatureSummary,
    Novelty,
    class_means,
    may_describe_features,
    means_width,
    scale_classifier,
    set_scores,
)
from coatnet.data.datasets import ArrayDataset, Dataset, FileDataset, TableDataset, evenly_spaced, select
from coatnet.data.loader import BadImages, InspectImages
from coatnet.data.splits import Splits, choose_training
from coatnet.errors import UserError
from coatnet.evaluation.evaluate import (
    EVALUATED_TOGETHER,
    KEPT_IMAGES,
    SplitOutputs,
    choose_datasets,
    load_model,
    measure,
    no_progress,
    open_recorded,
)
from coatnet.evaluation.outputs import ImageOutputs, compute_outputs
from coatnet.evaluation.predictions import ImageProperties
from coatnet.evaluation.reliability import PROBABILITY_FIGURES
from coatnet.evaluation.report import Report
from coatnet.inference.graph import to_probabilities

MAX_TRAINING_IMAGES = 4_000  # chosen: more do not change the distances (docs/results)
MIN_IMAGES = 2 * FOLDS
MAX_SCALE = 100.0  # of logits; nearly separable images would ask for an infinite one
# Of the correlations of features towards none, times D / N, so that few images have an inverse as well.
_SHRINKAGE, _MAX_SHRINKAGE = 0.1, 0.5
# Parts of a report that belong to the probabilities of its calibration, beside some figures.
OF_PROBABILITIES = ("reliability", "calibration", "mistakes", "suspects")
_BATCH = 16


class Outputs(NamedTuple):
    """Logits (N, K), means of all feature maps (N, D), labels (N,) or (N, K), digests (N,), features (N, F)."""

    logits: Tensor
    pooled: Tensor
    labels: Tensor
    digests: Tensor
    features: Tensor

    @classmethod
    def of(cls, bundle: Bundle, batches: Iterable[ImageOutputs]) -> Self:
        """What a bundle makes of batches. Raises UserError if a logit is not finite."""
        found = [
            (
                each.logits(bundle),
                each.means(bundle),
                each.labels,
                each.digests,
                each.features[:, : bundle.model.num_features],
            )
            for each in batches
        ]
        if not found:
            empty = torch.zeros(0, dtype=torch.int64)
            return cls(
                torch.zeros(0, len(bundle.classes)), torch.zeros(0, means_width(bundle.model)), empty, empty, empty
            )
        outputs = cls(*(torch.cat(column) for column in zip(*found, strict=True)))
        if not torch.isfinite(outputs.logits).all():
            raise UserError("the model's output is not finite (NaN or infinity): its weights are broken")
        return outputs


def calibrate(
    bundle: Bundle | str | Path,
    data: str | Path | Dataset | Splits,
    *,
    split: Literal["validation", "training", "all"] = "validation",
    batch_size: int = EVALUATED_TOGETHER,
    num_workers: int | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] = no_progress,
) -> Bundle:
    """Fit temperatures, the score of novelty and the thresholds of sets of classes, and put them into a bundle.

    An earlier calibration is replaced. The most likely class of an image stays the same, if images have one label.

    Args:
        bundle: the model: a bundle, its folder, or its id on the hub.
        data: labeled images as `evaluate` takes them. The thresholds are fitted to those that the model was not trained
            on, at most 50,000, evenly spaced; distances to at most 4,000 of its training split, as many of each class,
            or to every second of the held-out images if there is no such split.
        split: which part of the data the thresholds are fitted to.
        batch_size: images per batch.
        num_workers: processes that decode; None as in `evaluate`.
        device: as in `evaluate`.
        progress: called with the number of images done and the number of all.

    Returns:
        The calibrated bundle; `save` writes it.

    Raises:
        UserError: there is no such model, data or split, a class is unknown to the model, or fewer than 10 images can
            be read.
    """
    bundle = load_model(bundle, device).uncalibrated()
    data = open_recorded(data, bundle)
    name, datasets, split_name = choose_datasets(data, split, bundle)
    training = data.training if isinstance(data, Splits) and split == "validation" else None
    num_held_out = min(KEPT_IMAGES, sum(map(len, datasets)))
    total = num_held_out + (min(MAX_TRAINING_IMAGES, len(training)) if training is not None else 0)

    def advance(done: int) -> None:
        progress(min(done, total), total)

    held_out, _ = sample_outputs(bundle, datasets, KEPT_IMAGES, num_workers, advance, batch_size=batch_size)
    if len(held_out.logits) < MIN_IMAGES:
        raise UserError(
            f"{name}: {len(held_out.logits)} images of the {split_name} split can be read; calibration needs "
            f"{MIN_IMAGES} that the model was not trained on"
        )
    reference = None
    if training is not None and len(training):
        reference, _ = sample_outputs(
            bundle,
            (training,),
            MAX_TRAINING_IMAGES,
            num_workers,
            lambda done: advance(num_held_out + done),
            batch_size=batch_size,
            balanced=True,
        )
    if reference is None or not len(reference.logits):  # or none of them can be read
        reference = Outputs(*(each[::2] for each in held_out))
        held_out = Outputs(*(each[1::2] for each in held_out))
    found = with_calibration(bundle, held_out, reference)
    return replace(found, record=_without_probabilities(found.record))


def _without_probabilities(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without those figures of its report that belong to the probabilities of another calibration."""
    report = record.get("report")
    if not isinstance(report, Mapping):
        return dict(record)
    kept = {name: value for name, value in report.items() if name not in OF_PROBABILITIES}
    for name in ("figures", "intervals"):
        if isinstance(values := kept.get(name), Mapping):
            kept[name] = {figure: value for figure, value in values.items() if figure not in PROBABILITY_FIGURES}
    return {**record, "report": kept}


def calibrate_and_evaluate(
    bundle: Bundle,
    images: SplitOutputs,
    *,
    reference: Outputs | None = None,
    progress: Callable[[int, int], None] = no_progress,
) -> tuple[Bundle, Report]:
    """Calibrate a bundle on held-out images and evaluate it there, from what its network computed for them.

    A bundle is left as it is if fewer than 20 images are held out (some of them may be unreadable), or no image is
    there that it was trained on.

    Args:
        bundle: not calibrated; it differs from that of the images at most in its classifier.
        images: the validation split, with outputs kept.
        reference: of images that it was trained on; by default computed, of at most 4,000.
        progress: called with the number of images done and the number of all.

    Raises:
        UserError: as `calibrate` and `evaluate`.
    """
    training, num_workers, batch_size = images.training, images.num_workers, images.batch_size
    if len(images) < 2 * MIN_IMAGES or training is None or not len(training):
        return bundle, measure(bundle, images, progress=progress)
    total = len(images) + (min(MAX_TRAINING_IMAGES, len(training)) if reference is None else 0)

    def advance(done: int) -> None:
        progress(min(done, total), total)

    if images.keeps:
        held_out = Outputs.of(bundle, images.batches(advance))
    else:
        held_out, _ = sample_outputs(bundle, images.datasets, KEPT_IMAGES, num_workers, advance, batch_size=batch_size)
    if len(held_out.logits) >= MIN_IMAGES:
        if reference is None:
            began = len(images)
            reference, images.training_properties = sample_outputs(
                bundle,
                (training,),
                MAX_TRAINING_IMAGES,
                num_workers,
                lambda done: advance(began + done),
                images.inspect,
                batch_size=batch_size,
                balanced=True,
            )
        bundle = with_calibration(bundle, held_out, reference)
    return bundle, measure(bundle, images, progress=progress)


def with_calibration(bundle: Bundle, held_out: Outputs, reference: Outputs) -> Bundle:
    """The bundle calibrated by held-out images, with distances to reference images; see `calibrate`."""
    several = bundle.multilabel
    folds = held_out.digests % FOLDS + 1
    rows = [torch.ones(len(folds), dtype=torch.bool), *(folds != fold for fold in range(1, FOLDS + 1))]
    rows = [row if row.any() else rows[0] for row in rows]  # all images may be equal
    temperatures = torch.stack(
        [fit_temperature(held_out.logits[row], held_out.labels[row], multilabel=several) for row in rows]
    )
    # Thresholds of a fold belong to the probabilities that its images are given, by the temperature of the fold.
    tables = [to_probabilities(held_out.logits / each, multilabel=several) for each in temperatures]
    thresholds = {}
    for method in () if several else METHODS:
        truth = [set_scores(table, method).gather(1, held_out.labels[:, None])[:, 0] for table in tables]
        thresholds[method] = torch.stack(
            [coverage_thresholds(each[row]) for each, row in zip(truth, rows, strict=True)]
        )
    novelty = fit_distances(reference.pooled, reference.labels, bundle)
    parts = [novelty.parts(table, held_out.pooled) for table in tables]
    novelty.location.copy_(parts[0].median(0).values)
    novelty.scale.copy_(parts[0].std(0).clamp(min=1e-3))
    if several:
        novelty.scale[0] = 1e9  # the largest of independent probabilities says nothing of the others
    levels = (torch.arange(STEPS, dtype=torch.float64) + 0.5) / STEPS
    scores = [novelty.score(table, held_out.pooled)[row].double() for table, row in zip(tables, rows, strict=True)]
    novelty.quantiles.copy_(torch.stack([torch.quantile(each, levels) for each in scores]).float())
    summary = None
    if may_describe_features(bundle):
        summary = FeatureSummary.of(reference.features, reference.labels, len(bundle.classes))
    calibration = Calibration(temperatures, held_out.digests.unique(), thresholds, novelty, summary)
    model = copy.deepcopy(bundle.model)
    scale_classifier(model, (1 / temperatures[0]).to(next(model.parameters()).device))
    return replace(bundle, model=model, calibration=calibration)


def fit_temperature(logits: Tensor, labels: Tensor, *, multilabel: bool) -> Tensor:
    """The temperature of least negative log-likelihood: (1,), or (K,) for several labels.

    In 1 / T the likelihood is concave, so the root of its derivative is found by bisection. Labels are smoothed by
    1 / (N + 2) (Platt, 1999), without which images that are all classified right would ask for T = 0. A class of
    several that no image or every image has keeps T = 1.

    Args:
        logits: (N, K).
        labels: class indices (N,), or 0 and 1 per class (N, K).
    """
    scores = logits.double()
    count = len(scores)
    if multilabel:
        targets = (labels.double() * count + 1) / (count + 2)
    else:
        ones = torch.zeros_like(scores).scatter_(1, labels[:, None], 1.0)
        targets = (ones * count + 2 / scores.shape[1]) / (count + 2)
    low = torch.full((scores.shape[1] if multilabel else 1,), 1 / MAX_SCALE, dtype=torch.float64)
    high = torch.full_like(low, MAX_SCALE)
    for _ in range(60):
        scale = (low * high).sqrt()
        excess = (to_probabilities(scores * scale, multilabel=multilabel) - targets) * scores
        too_large = (excess.mean(0) if multilabel else excess.sum(1).mean(0, keepdim=True)) > 0
        low, high = torch.where(too_large, low, scale), torch.where(too_large, scale, high)
    temperature = 1 / (low * high).sqrt()
    if multilabel:
        both = (labels > 0).any(0) & (labels == 0).any(0)
        temperature = torch.where(both, temperature, 1.0)
    return temperature.float()


def coverage_thresholds(scores: Tensor) -> Tensor:
    """For each coverage 0, 0.001, ..., 0.999 the score that holds the truth so often, (STEPS,): split conformal."""
    ordered = scores.double().sort().values
    # ceil((n + 1) * coverage) of n scores, in whole numbers; beyond n the set holds every class.
    rank = -(-(len(ordered) + 1) * torch.arange(STEPS) // STEPS)
    found = ordered[(rank - 1).clamp(0, len(ordered) - 1)]
    return torch.where(rank > len(ordered), NO_THRESHOLD, found).float()


def fit_distances(pooled: Tensor, labels: Tensor, bundle: Bundle) -> Novelty:
    """Mahalanobis' distance to the nearest class mean, from the means of feature maps (N, D); the rest is still open.

    One covariance is shared by the classes. Above 512 features the 512 directions of least variance among training
    images are kept, in which foreign images stand out most (Wang et al., 2022, arXiv:2203.10807). Several labels and
    more than 1,000 classes have one mean.
    """
    features = pooled.double()
    if bundle.multilabel or len(bundle.classes) > MAX_MEANS:
        labels = torch.zeros(len(features), dtype=torch.int64)
    present, numbers = labels.unique(return_inverse=True)
    means, apart = class_means(features, numbers, len(present))
    deviation = apart.square().mean(0).sqrt().clamp(min=1e-6)
    scaled = apart / deviation
    shrinkage = min(_MAX_SHRINKAGE, _SHRINKAGE * features.shape[1] / len(features))
    correlation = (1 - shrinkage) * (scaled.mT @ scaled) / len(scaled)
    correlation.diagonal().add_(shrinkage)
    values, vectors = torch.linalg.eigh(correlation)
    values, vectors = values[:MAX_DIMENSIONS], vectors[:, :MAX_DIMENSIONS]
    projection = vectors / values.clamp(min=1e-6).sqrt() / deviation[:, None]
    center = features.mean(0)
    tensors = {
        "mean": center,
        "projection": projection,
        "class_means": (means - center) @ projection,
        "location": torch.zeros(2),
        "scale": torch.ones(2),
        "quantiles": torch.zeros(1 + FOLDS, STEPS),
    }
    return Novelty({name: each.float().contiguous() for name, each in tensors.items()})


def sample_outputs(
    bundle: Bundle,
    datasets: Sequence[Dataset],
    most: int,
    num_workers: int | None,
    advance: Callable[[int], None],
    inspect: InspectImages | None = None,
    *,
    batch_size: int = EVALUATED_TOGETHER,
    balanced: bool = False,
) -> tuple[Outputs, list[ImageProperties]]:
    """Run a bundle over at most `most` images, all of them if they are no more. Only then, they are looked at.

    Of more, evenly spaced ones are taken, or if `balanced` as many of each class as there are; of shards, and of other
    datasets that are read in order, evenly spaced batches of at most 16.
    """
    num_images, every = sum(map(len, datasets)), 1
    complete = num_images <= most
    if not complete and all(isinstance(each, ArrayDataset | FileDataset | TableDataset) for each in datasets):
        datasets = [_sample(each, max(1, most * len(each) // num_images), balanced) for each in datasets if len(each)]
    elif not complete:
        every = -(-num_images // most)
    batches = compute_outputs(
        bundle,
        datasets,
        batch_size=batch_size if every == 1 else min(batch_size, _BATCH),
        num_workers=num_workers,
        bad_images=BadImages(num_images),
        means=True,
        inspect=inspect if complete else None,
        every=every,
        progress=advance,
    )
    with closing(batches):
        found = list(batches)
    return Outputs.of(bundle, found), [each for batch in found for each in batch.properties or []]


def _sample(dataset: Dataset, count: int, balanced: bool) -> Dataset:
    chosen = np.zeros(len(dataset), bool)
    chosen[choose_training(dataset.labels, 0)[:count] if balanced else evenly_spaced(len(dataset), count)] = True
    return select((dataset,), chosen)
