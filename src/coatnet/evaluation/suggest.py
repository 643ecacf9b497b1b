"""Which images to label next: those a model is unsure of, and not many of one kind.

Images are clustered by their features, as many clusters as images are asked for, and the one at the middle of each is
picked: those that stand for many others, and no two for the same ones (Hacohen et al., 2022, arXiv:2202.02794). In the
clustering an image weighs more the less sure the model is of it (Zhdanov, 2019, arXiv:1901.05954), but none weighs
nothing: the doubts of a model that has seen few labels say little. docs/results compares it with BADGE.
Shapes: N images, K classes, D features, C clusters.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.data.datasets import FileDataset
from coatnet.data.manifest import write_manifest
from coatnet.errors import UserError
from coatnet.evaluation.features import extract_features

COUNT = 100
SEED = 0
ITERATIONS = 10  # of k-means
NUMBERS_PER_STEP = 2**24  # chosen: distances of 64 MB


@dataclass(frozen=True)
class Suggestions:
    """Images in the order in which to label them.

    Attributes:
        paths: the files: those that were picked, then the others, of which the model is less and less unsure.
        predicted: the likeliest class of each; of a model for several labels those above one half, joined by `;`.
        scores: how sure the model is: the margin between the two likeliest classes; of several labels, the distance of
            the closest decision from one half, doubled.
        num_picked: how many of them were picked to differ from each other.
        bad_images: why each unreadable image was left out, by its name.
    """

    paths: tuple[Path, ...]
    predicted: tuple[str, ...]
    scores: tuple[float, ...]
    num_picked: int
    bad_images: dict[str, str]

    def write(self, path: str | Path) -> None:
        """Write a table of path, label (empty, to be filled in), suggested and score.

        Raises:
            UserError: as `write_manifest`: the images must lie below the folder of the table.
        """
        rows = list(zip(self.paths, [""] * len(self.paths), self.predicted, self.scores, strict=True))
        write_manifest(path, ("suggested", "score"), rows, multilabel=False)


def suggest(
    bundle: Bundle | str | Path,
    images: FileDataset,
    *,
    count: int = COUNT,
    batch_size: int = 64,
    device: str | None = None,
) -> Suggestions:
    """Rank images without labels by how much a label of theirs would teach the model.

    Args:
        bundle: the model: a bundle, its folder, or its id on the hub.
        images: from `open_images`.
        count: how many to pick, each for a group of images; the others follow by uncertainty alone.
        batch_size: images computed together.
        device: as in `evaluate`.

    Raises:
        UserError: as `extract_features`, or count is below 1.
    """
    if count < 1:
        raise UserError(f"count is {count}; it must be at least 1")
    extracted = extract_features(bundle, images, batch_size=batch_size, device=device)
    bundle = extracted.bundle
    features, _, names = extracted.gather()
    classifier = bundle.model.get_classifier()
    with torch.no_grad():
        logits = classifier(features.to(next(bundle.model.parameters()).device)).float().cpu()
    probabilities = logits.sigmoid() if bundle.multilabel else logits.softmax(dim=1)
    scores = certainty(probabilities, multilabel=bundle.multilabel)
    picked = pick(probabilities, features, count, multilabel=bundle.multilabel)
    rest = np.setdiff1d(np.argsort(scores, kind="stable"), picked, assume_unique=True)
    order = np.concatenate([picked, rest[np.argsort(scores[rest], kind="stable")]]).tolist()
    places = {images.describe(index): images.path(index) for index in range(len(images))}
    return Suggestions(
        paths=tuple(places[names[row]] for row in order),
        predicted=tuple(_decision(bundle, probabilities[row]) for row in order),
        scores=tuple(round(float(scores[row]), 6) for row in order),
        num_picked=len(picked),
        bad_images=extracted.bad_images,
    )


def certainty(probabilities: Tensor, *, multilabel: bool = False) -> NDArray[np.float32]:
    """How sure a model is of its decisions, (N,) from 0 to 1, by probabilities (N, K)."""
    if multilabel:
        return (2 * probabilities - 1).abs().min(dim=1).values.numpy()
    two = probabilities.topk(min(2, probabilities.shape[1]), dim=1).values
    return (two[:, 0] - two[:, 1:].sum(dim=1)).numpy()


def pick(
    probabilities: Tensor, features: Tensor, count: int, *, multilabel: bool = False, seed: int = SEED
) -> NDArray[np.int64]:
    """Pick up to `count` images (of N): their rows, those first that stand for the most images and doubts.

    Features (N, D) are standardized, as the linear probe has them. An image weighs 1, and 1 more for as much doubt as
    all images have on average.
    """
    features = (features - features.mean(dim=0)) / features.std(dim=0, correction=0).clamp(min=1e-6)
    doubt = 1 - torch.from_numpy(certainty(probabilities, multilabel=multilabel))
    weights = 1 + doubt / doubt.mean().clamp(min=1e-6)
    centers = features[first_centers(features, weights, count, seed)]
    for _ in range(ITERATIONS):
        clusters, _ = nearest_center(features, centers)
        total = torch.zeros(len(centers)).index_add_(0, clusters, weights)
        sums = torch.zeros_like(centers).index_add_(0, clusters, features * weights[:, None])
        centers = torch.where(total[:, None] > 0, sums / total[:, None].clamp(min=1e-9), centers)
    clusters, distances = nearest_center(features, centers)
    total = torch.zeros(len(centers)).index_add_(0, clusters, weights)
    by_distance = np.lexsort((distances.numpy(), clusters.numpy()))
    found, first = np.unique(clusters.numpy()[by_distance], return_index=True)
    return by_distance[first][np.argsort(-total.numpy()[found], kind="stable")]


def first_centers(features: Tensor, weights: Tensor, count: int, seed: int) -> list[int]:
    """Rows of up to `count` different images, drawn by weight and squared distance to those before: k-means++."""
    generator, rows = np.random.default_rng(seed), list[int]()
    squares, distances = features.square().sum(dim=1), torch.ones(len(features))
    while len(rows) < min(count, len(features)):
        chances = (weights * distances).double().numpy()
        if not chances.sum() > 0:  # what is left is the same as what was drawn
            break
        rows.append(int(generator.choice(len(chances), p=chances / chances.sum())))
        away = squares + squares[rows[-1]] - 2 * features @ features[rows[-1]]
        away = torch.where(away > 1e-6 * squares.mean(), away, 0.0)  # of equal images, rounding is left
        distances = torch.minimum(distances, away) if len(rows) > 1 else away
    return rows


def nearest_center(features: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the centers (C, D) to each image, (N,), and its squared distance."""
    found = [
        (centers.square().sum(dim=1) - 2 * part @ centers.T).min(dim=1)
        for part in features.split(max(1, NUMBERS_PER_STEP // len(centers)))
    ]
    distances = torch.cat([each.values for each in found]) + features.square().sum(dim=1)
    return torch.cat([each.indices for each in found]), distances


def _decision(bundle: Bundle, probabilities: Tensor) -> str:
    if bundle.multilabel:
        return ";".join(bundle.classes[k] for k in np.flatnonzero(probabilities.numpy() > 0.5))
    return bundle.classes[int(probabilities.argmax())]
