"""What a network computes for the images of a measurement: once, for calibration and report alike.

Shapes: B images of a batch, V views of each, N images, K classes, F features, D width of stem and stages together.
"""

import unicodedata
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.loader import BadImages, InspectImages
from coatnet.errors import UserError
from coatnet.evaluation.predictions import ImageProperties
from coatnet.inference.logits import infer, workers_for


class ImageOutputs(NamedTuple):
    """A batch of images as a network sees them, whatever its classifier.

    Attributes:
        features: input of the classifier, (B * V, F), or (B * V, F + D) with the means of all feature maps; the views
            of an image are neighbors.
        labels: (B,) or (B, K), in the order of the bundle's classes.
        places: of each image: the number of its dataset, and its index in it.
        digests: with means, a hash of each image as the network sees it, of several views the first, (B,).
        properties: what is seen of each image without a network; None unless asked for.
    """

    features: Tensor
    labels: Tensor
    places: list[tuple[int, int]]
    digests: Tensor | None
    properties: list[ImageProperties] | None

    def logits(self, bundle: Bundle) -> Tensor:
        """What the classifier of a bundle makes of the features, (B * V, K) in float32."""
        model = bundle.model
        with torch.inference_mode():
            features = self.features[:, : model.num_features].contiguous().to(next(model.parameters()).device)
            return model.get_classifier()(features).float().cpu()

    def means(self, bundle: Bundle) -> Tensor:
        """The means of all feature maps, (B * V, D)."""
        return self.features[:, bundle.model.num_features :]


def compute_outputs(
    bundle: Bundle,
    datasets: Sequence[Dataset],
    *,
    batch_size: int,
    num_workers: int | None,
    bad_images: BadImages,
    means: bool,
    inspect: InspectImages | None = None,
    every: int = 1,
    views: str = "one",
    progress: Callable[[int], None] = lambda done: None,
) -> Generator[ImageOutputs, None, None]:
    """Run a bundle's network over datasets, in order, batch by batch.

    Args:
        means: whether the means of all feature maps, and digests, are wanted, as calibration does.
        inspect: called with decoded images, where they are decoded.
        every: compute every n-th batch of each dataset.
        views: test-time augmentation, as in `augmented_views`.
        progress: called after each batch with the number of images done.

    Raises:
        UserError: a class is unknown to the model, or as `infer`.
    """
    done = 0
    for number, dataset in enumerate(datasets):
        if not len(dataset):
            continue
        translate = label_translation(dataset, bundle)
        batches = infer(
            bundle.model,
            dataset,
            preprocessing=bundle.preprocessing,
            batch_size=batch_size,
            num_workers=workers_for(dataset, num_workers),
            bad_images=bad_images,
            output="features and means" if means else "features",
            every=every,
            inspect=inspect,
            views=views,
        )
        with closing(batches):
            for features, labels, indices, digests, properties in batches:
                places = [(number, index) for index in indices.tolist()]
                yield ImageOutputs(features, translate(labels), places, digests, properties)
                progress(done := done + len(places))


def match_names(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """The number of each class among known ones, None if it is not, by its name, or else by its composed name (NFC)."""
    composed = partial(unicodedata.normalize, "NFC")  # tables keep accents as they are written, folders compose them
    numbers = {name: index for index, name in enumerate(known)}
    outputs = {composed(name): index for name, index in numbers.items()} | numbers  # the name as it is goes first
    return [outputs.get(name, outputs.get(composed(name))) for name in names]


def label_translation(dataset: Dataset, bundle: Bundle) -> Callable[[Tensor], Tensor]:
    """A function from labels of a dataset to labels of a model, matched by the names of the classes.

    It maps (B,) to (B,), or for a multi-label model (B,) or (B, K of the dataset) to (B, K of the model).

    Raises:
        UserError: a class is unknown to the model, or only the dataset is multi-label.
    """
    found = match_names(dataset.classes, bundle.classes)
    if unknown := [name for name, index in zip(dataset.classes, found, strict=True) if index is None]:
        known = ", ".join(bundle.classes[:5]) + (", ..." if len(bundle.classes) > 5 else "")
        raise UserError(
            f"{dataset.name}: {len(unknown)} of {len(dataset.classes)} classes are unknown to the model, "
            f"first {unknown[0]!r}; its classes are {known}"
        )
    if dataset.multilabel and not bundle.multilabel:
        raise UserError(f"{dataset.name} has several labels per image, the model gives only one")
    columns = torch.tensor(found)

    def translate(labels: Tensor) -> Tensor:
        if not bundle.multilabel:
            return columns[labels]
        translated = torch.zeros(len(labels), len(bundle.classes), dtype=torch.uint8)  # (B, K)
        if not dataset.multilabel:
            return translated.scatter_(1, columns[labels][:, None], 1)
        translated[:, columns] = labels.to(torch.uint8)
        return translated

    return translate
