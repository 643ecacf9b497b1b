"""Measuring a finished model on images whose classes are known. Shapes: B batch, K classes."""

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coatnet.bundle import Bundle, load
from coatnet.data.datasets import Dataset
from coatnet.data.loader import BadImages, read_image
from coatnet.data.open import open_dataset
from coatnet.data.splits import Splits
from coatnet.data.transforms import as_images
from coatnet.errors import UserError
from coatnet.evaluation.metrics import Metrics
from coatnet.evaluation.report import Mistake, Report
from coatnet.inference.logits import infer, workers_for
from coatnet.system.hardware import choose_device

NUM_MISTAKES = 24
THUMBNAIL_PIXELS = 160  # of the longer side

# Probability of the wrong answer, image (place in the list of datasets, index), truth, wrong answer.
_Wrong = tuple[float, tuple[int, int], str, str]


def evaluate(
    bundle: Bundle | str | Path,
    data: str | Path | Dataset | Splits,
    *,
    split: Literal["validation", "training", "all"] = "validation",
    batch_size: int = 64,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Every figure of a model on a dataset or a split of it; classes are matched by name, in any order.

    `bundle` is one, its folder, or the id of one on the hub. A bundle is measured on the device on which its model
    lies, what is loaded here on the GPU if there is one.

    `progress` is called after each batch with the images done and the images in all. Images that cannot
    be read are left out of the figures and named in the report. Without `num_workers`, up to 2,000 images
    are read in this process, and more of them by a worker process a core.

    Raises:
        UserError: there is no such model, a class of the data is unknown to it, or not a single image can be read.
    """
    if not isinstance(bundle, Bundle):
        bundle = load(bundle)
        bundle.model.to(choose_device())
    started = time.perf_counter()
    name, datasets, split_name = choose_datasets(data, split, bundle)
    metrics = Metrics(len(bundle.classes), bundle.multilabel)
    total, done = sum(map(len, datasets)), 0
    bad_images = BadImages(total, budget=1.0)
    worst: list[_Wrong] = []
    for number, dataset in enumerate(datasets):
        translate = label_translation(dataset, bundle)
        batches = infer(
            bundle.model,
            dataset,
            preprocessing=bundle.preprocessing,
            batch_size=batch_size,
            num_workers=workers_for(dataset, num_workers),
            bad_images=bad_images,
        )
        with closing(batches):
            for logits, labels, indices in batches:
                labels = translate(labels)
                metrics.update(logits, labels)
                wrong = _find_mistakes(logits, labels, [(number, int(i)) for i in indices], bundle)
                worst = heapq.nsmallest(NUM_MISTAKES, [*worst, *wrong], key=lambda each: (-each[0], each[1]))
                done += len(indices)
                if progress is not None:
                    progress(done, total)
    if done == 0:
        raise UserError(f"{name}: none of the {total:,} images of the {split_name} split could be read")
    seconds = time.perf_counter() - started

    confusion = metrics.confusion()
    return Report(
        data=name,
        split=split_name,
        model=bundle.model.variant.name,
        resolution=bundle.preprocessing.resolution,
        num_parameters=sum(parameter.numel() for parameter in bundle.model.parameters()),
        classes=bundle.classes,
        multilabel=bundle.multilabel,
        figures=metrics.compute(),
        intervals=metrics.intervals(),
        per_class=tuple(metrics.per_class()),
        confusion=None if confusion is None else tuple(map(tuple, confusion.tolist())),
        confused_pairs=tuple(
            (bundle.classes[truth], bundle.classes[predicted], count)
            for truth, predicted, count in metrics.confused_pairs()
        ),
        calibration=metrics.calibration(),
        mistakes=tuple(
            Mistake(datasets[number].describe(index), truth, predicted, probability)
            for probability, (number, index), truth, predicted in worst
        ),
        bad_images=dict(bad_images.records),
        seconds=seconds,
        thumbnails=tuple(_thumbnail(datasets[number], index) for _, (number, index), _, _ in worst),
    )


def choose_datasets(
    data: str | Path | Dataset | Splits, split: str, bundle: Bundle
) -> tuple[str, Sequence[Dataset], str]:
    """The name of the data, the datasets to go through, and what to call the split.

    Data without a split of its own is split as it was for the training of the bundle, or images that the model
    has learned would be among those held out.
    """
    if isinstance(data, str | Path):
        fraction = bundle.record.get("recipe", {}).get("validation_fraction", 0.1)
        data = open_dataset(data, validation_fraction=fraction)
    if not isinstance(data, Splits):
        return data.name, (data,), "all"
    if split not in ("validation", "training", "all"):
        raise UserError(f"split {split!r} is unknown; it is validation, training or all")
    datasets = (data.training, data.validation) if split == "all" else (getattr(data, split),)
    return data.name, datasets, split


def label_translation(dataset: Dataset, bundle: Bundle) -> Callable[[Tensor], Tensor]:
    """From the dataset's labels to the model's outputs, by the names of the classes."""
    place = {name: index for index, name in enumerate(bundle.classes)}
    unknown = [name for name in dataset.classes if name not in place]
    if unknown:
        known = ", ".join(bundle.classes[:5]) + (", ..." if len(bundle.classes) > 5 else "")
        raise UserError(
            f"{dataset.name}: {len(unknown)} of {len(dataset.classes)} classes are unknown to the model, "
            f"first {unknown[0]!r}; it knows {known}"
        )
    if dataset.multilabel and not bundle.multilabel:
        raise UserError(f"{dataset.name} has several labels an image, the model gives only one")
    places = torch.tensor([place[name] for name in dataset.classes])

    def translate(labels: Tensor) -> Tensor:
        if not bundle.multilabel:
            return places[labels]
        widened = torch.zeros(len(labels), len(place), dtype=torch.uint8)
        if not dataset.multilabel:
            return widened.scatter_(1, places[labels][:, None], 1)
        widened[:, places] = labels.to(torch.uint8)
        return widened

    return translate


def _find_mistakes(
    logits: Tensor, labels: Tensor, images: Sequence[tuple[int, int]], bundle: Bundle
) -> Iterator[_Wrong]:
    """The wrong answers of a batch; of several labels an image's worst decision, claimed or missed."""
    if bundle.multilabel:
        gaps = (logits.sigmoid() - labels).abs()
        probabilities, decisions = gaps.max(dim=1)
        for row in np.flatnonzero(probabilities.numpy() > 0.5).tolist():
            decision = int(decisions[row])
            truth = ", ".join(bundle.classes[k] for k in np.flatnonzero(labels[row].numpy())) or "nothing"
            predicted = ("not " if labels[row, decision] else "") + bundle.classes[decision]
            yield float(probabilities[row]), images[row], truth, predicted
        return
    predictions = logits.numpy().argmax(axis=1)  # numpy's, as the figures have it: ties go to the lower class
    probabilities = logits.softmax(dim=1)
    for row in np.flatnonzero(predictions != labels.numpy()).tolist():
        truth, predicted = bundle.classes[int(labels[row])], bundle.classes[predictions[row]]
        yield float(probabilities[row, predictions[row]]), images[row], truth, predicted


def _thumbnail(dataset: Dataset, index: int) -> np.ndarray:
    """Image number `index`, whole, at most 160 pixels a side: uint8 (H, W, 3)."""
    pixels = as_images(read_image(dataset, index)[0])  # (3 or 1, H, W)
    scale = THUMBNAIL_PIXELS / max(pixels.shape[1:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in pixels.shape[1:]]
        pixels = F.interpolate(pixels[None].float(), size=size, mode="bilinear", antialias=True)[0]
        pixels = pixels.round().clamp(0, 255).byte()
    return pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
