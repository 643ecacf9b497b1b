"""How well scores of novelty tell foreign images from those that a model was trained for: AUROC by source.

    python benchmarks/novelty.py runs/clothes --data fashion-mnist-small --foreign digits noise path/to/clip-art

Every score is fitted to the training split (at most 4,000 images) and ranked on the validation split against all images
of each foreign source (at most 2,000): largest probability (Hendrycks and Gimpel, 2017), largest logit, energy (Liu et
al., 2020), k-NN on normalized features (Sun et al., 2022), residual outside the principal subspace of the features (the
first part of ViM, Wang et al., 2022), Mahalanobis' distance in the space of the features, of the means of the last
feature map and of those of all maps (Lee et al., 2018), and the package's score. Logits are calibrated: their
temperature, and location and scale of the two parts of the package's score, come from the validation split. `mistakes`
is the AUROC of the score for images of the validation split that the model gets wrong. The last column is the mean over
the foreign sources.
"""

import argparse
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from coatnet.bundle import Bundle, load
from coatnet.bundle.calibration import Novelty
from coatnet.data.datasets import ArrayDataset, Dataset
from coatnet.data.loader import BadImages
from coatnet.data.open import open_dataset
from coatnet.data.splits import Splits
from coatnet.evaluation import calibrate
from coatnet.evaluation.calibrate import fit_distances
from coatnet.evaluation.evaluate import recorded_rule
from coatnet.evaluation.outputs import label_translation
from coatnet.inference.logits import infer

NEIGHBORS = 10
MOST_TRAINING, MOST_FOREIGN = 4_000, 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--data", required=True, help="what the model was trained on")
    parser.add_argument("--foreign", nargs="+", default=["digits", "noise"], help="noise, black, or data sources")
    given = parser.parse_args()
    bundle = load(given.bundle)
    splits = open_dataset(given.data, rule=recorded_rule(bundle), evaluation=True)
    assert isinstance(splits, Splits)
    bundle = calibrate(bundle, splits)
    training = Views(bundle, splits.training, MOST_TRAINING, labeled=True)
    known = Views(bundle, splits.validation, MOST_FOREIGN, labeled=True)
    foreign = {name: Views(bundle, dataset, MOST_FOREIGN) for name, dataset in sources(given.foreign, bundle).items()}
    wrong = known.logits.argmax(1) != known.labels
    print(
        f"{given.bundle}: {len(training.labels):,} training, {len(known.labels):,} held-out images, {wrong.sum()} wrong"
    )
    print(f"{'':24}", *(f"{name[-10:]:>10}" for name in foreign), f"{'mistakes':>10}{'mean':>8}")
    for name, score in scores(bundle, training).items():
        familiar = score(known)
        found = [auroc(familiar, score(each)) for each in foreign.values()]
        mistakes = auroc(familiar[~wrong], familiar[wrong])
        print(f"{name:24}", *(f"{each:10.3f}" for each in found), f"{mistakes:10.3f}{np.mean(found):8.3f}", flush=True)


class Views:
    """Logits, features and means of feature maps of the images of a dataset; labels in the order of the bundle."""

    def __init__(self, bundle: Bundle, dataset: Dataset, most: int, *, labeled: bool = False) -> None:
        one = outputs(bundle, dataset, most)
        self.features, self.means = one[0][:, : bundle.model.num_features], one[0][:, bundle.model.num_features :]
        self.logits = bundle.model.get_classifier()(self.features).detach()
        self.labels = label_translation(dataset, bundle)(one[1]) if labeled else one[1]
        self.last = self.means[:, -bundle.model.num_features :]


def outputs(bundle: Bundle, dataset: Dataset, most: int) -> tuple[Tensor, Tensor]:
    """Features and means of feature maps, and labels, of at most `most` images, evenly spaced batches."""
    batches = infer(
        bundle.model,
        dataset,
        preprocessing=bundle.preprocessing,
        batch_size=16,
        num_workers=0,
        bad_images=BadImages(len(dataset)),
        output="features and means",
        every=max(1, -(-len(dataset) // most)),
    )
    with closing(batches):
        columns = [(found, labels) for found, labels, *_ in batches]
    values, labels = zip(*columns, strict=True)
    return torch.cat(values).detach(), torch.cat(labels)


def sources(names: list[str], bundle: Bundle) -> dict[str, Dataset]:
    """The foreign images by name."""
    side = bundle.preprocessing.resolution
    shape = (500, side, side, 3) if bundle.preprocessing.channels == 3 else (500, side, side)
    made = {
        "noise": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
        "black": np.zeros(shape, np.uint8),
    }
    found: dict[str, Dataset] = {}
    for name in names:
        if name in made:
            found[name] = ArrayDataset(name, ("foreign",), made[name], np.zeros(len(made[name]), np.int64))
            continue
        opened = open_dataset(name, evaluation=True)
        found[name] = opened.training if isinstance(opened, Splits) else opened
    return found


def scores(bundle: Bundle, training: Views) -> dict[str, object]:
    """Each score as a function of `Views`, larger for foreign images."""
    assert bundle.calibration is not None
    novelty = bundle.calibration.novelty
    near = torch.nn.functional.normalize(training.features)
    center = training.features.mean(0)
    basis = torch.linalg.svd(training.features - center, full_matrices=False)[2]
    principal = basis[: min(2 * len(bundle.classes), basis.shape[1] // 2)]

    def residual(views: Views) -> np.ndarray:
        apart = views.features - center
        return (apart - apart @ principal.mT @ principal).norm(dim=1).numpy()

    def neighbor(views: Views) -> np.ndarray:
        similar = torch.nn.functional.normalize(views.features) @ near.mT
        return -similar.topk(min(NEIGHBORS, len(near)), dim=1).values[:, -1].numpy()

    def distance(kind: str):
        fitted = fit_distances(getattr(training, kind), training.labels, bundle)
        return lambda views: fitted.parts(views.logits.softmax(1), getattr(views, kind))[:, 1].numpy()

    def ours(novelty: Novelty):
        return lambda views: novelty.score(views.logits.softmax(1), views.means).numpy()

    return {
        "largest probability": lambda views: -views.logits.softmax(1).amax(1).numpy(),
        "largest logit": lambda views: -views.logits.amax(1).numpy(),
        "energy": lambda views: -views.logits.logsumexp(1).numpy(),
        "k-NN, features": neighbor,
        "residual, features": residual,
        "distance, features": distance("features"),
        "distance, last map": distance("last"),
        "distance, all maps": distance("means"),
        "novelty of the package": ours(novelty),
    }


def auroc(known: np.ndarray, foreign: np.ndarray) -> float:
    """The chance that a foreign image has the larger score; ties count half."""
    values, counts = np.unique(known, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    left, right = np.searchsorted(values, foreign, "left"), np.searchsorted(values, foreign, "right")
    return float((below[left] + below[right]).mean() / 2 / len(known))


if __name__ == "__main__":
    main()
