"""Which images to label next: those a model is unsure of, and not many of one kind.

The choice is that of BADGE (Ash et al., 2020, arXiv:1906.03671): an image stands for the gradient that it would give
the classifier if the likeliest class were right, the outer product of (probabilities - decision) and features. Its
length says how unsure the model is, its direction of what; k-means++ picks long ones, far from those already picked.
Shapes: N images, K classes, D features.
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
        count: how many to pick so that they differ from each other; the others follow by uncertainty alone.
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
    """Pick up to `count` images (of N) by k-means++ on the gradients of the classifier: their rows, in order.

    Features are standardized, as the linear probe has them: otherwise a quarter more mistakes remain on digits. The
    gradients (K x D each) are never formed: their products are those of (probabilities - decision), (N, K), times those
    of the features, (N, D).
    """
    decision = (probabilities > 0.5).float() if multilabel else torch.zeros_like(probabilities)
    if not multilabel:
        decision[torch.arange(len(probabilities)), probabilities.argmax(dim=1)] = 1
    errors = probabilities - decision
    features = (features - features.mean(dim=0)) / features.std(dim=0, correction=0).clamp(min=1e-6)
    lengths = errors.square().sum(dim=1) * features.square().sum(dim=1)
    generator = np.random.default_rng(seed)
    distances, picked = lengths.double(), [int(lengths.argmax())]
    while len(picked) < min(count, len(features)):
        last = picked[-1]
        products = (errors @ errors[last]) * (features @ features[last])
        away = (lengths + lengths[last] - 2 * products).clamp(min=0).double()
        distances = torch.minimum(distances, away) if len(picked) > 1 else away
        distances[picked] = 0
        weights = distances.numpy()
        if not weights.sum() > 0:  # what is left is the same as what was picked
            break
        picked.append(int(generator.choice(len(weights), p=weights / weights.sum())))
    return np.array(picked)


def _decision(bundle: Bundle, probabilities: Tensor) -> str:
    if bundle.multilabel:
        return ";".join(bundle.classes[k] for k in np.flatnonzero(probabilities.numpy() > 0.5))
    return bundle.classes[int(probabilities.argmax())]
