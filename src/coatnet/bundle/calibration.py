"""What held-out images say about a model's answers: temperatures, a score of novelty, thresholds for sets of classes.

All of it is fitted by `evaluation.calibrate` and kept in the bundle, so that every engine and export gives the same.

- **Temperature** (Guo et al., 2017, arXiv:1706.04599): logits are divided by T, for several labels by one T a class. It
  is part of the classifier's weights: the model of a calibrated bundle gives calibrated logits.
- **Novelty**: the share of the held-out images that look more like the training images than this one, 0 to 1. It ranks
  by `standardized log(1 - largest probability) + 2 * standardized log(squared distance)`, the distance being
  Mahalanobis' to the nearest class mean, in the space of the means of all feature maps (Lee et al., 2018,
  arXiv:1807.03888). docs/results compares it with others.
- **Sets of classes** (split conformal prediction): LAC (Sadinle et al., 2019), APS (Romano et al., 2020) and RAPS
  (Angelopoulos et al., 2021, arXiv:2009.14193), the latter two without randomization, which makes them conservative.

- **Features of the training images**: mean of each class and their common covariance, from which `coatnet extend` draws
  features of the classes that are there already.

Each threshold exists six times: fitted to all held-out images, and to all but those of one of five folds. Evaluation of
an image to which they were fitted takes those of its fold, so that nothing is measured on what it was fitted to.

Shapes: B batch, K classes, D width of stem and stages together, M class means, R dimensions of the distance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from coatnet.bundle.weights import read_shapes, read_tensors
from coatnet.errors import UserError
from coatnet.model.layers import mean_over_cells
from coatnet.model.network import CoAtNet

if TYPE_CHECKING:
    from coatnet.bundle.bundle import Bundle

FOLDS = 5
STEPS = 1000  # of novelty and coverage: they are multiples of a thousandth
NO_THRESHOLD = 1e6  # above every score: with too few images the set holds all classes
METHODS = ("lac", "aps", "raps")
RAPS_PENALTY, RAPS_FREE = 0.01, 5  # lambda and k_reg of the reference implementation for ImageNet
MAX_IMAGES, MAX_DIMENSIONS, MAX_MEANS = 1_000_000, 512, 1000
MAX_FEATURES = 1024  # chosen: their covariance is 4 MB
DISTANCE_WEIGHT = 2  # chosen by measurement: more finds foreign images better, less finds mistakes better
_MIN_REST = 1e-4  # probabilities nearer to 1 are equal: in float32 their distance from it is rounding
_NOVELTY = ("mean", "projection", "class_means", "location", "scale", "quantiles")


class Novelty(nn.Module):
    """The score of novelty as a module, so that graphs contain it.

    Args:
        tensors: `mean` (D,), `projection` (D, R) to coordinates in which training images have unit covariance,
            `class_means` (M, R), `location` and `scale` (2,) of the two parts, `quantiles` (1 + FOLDS, STEPS) of the
            score over held-out images.
    """

    mean: Tensor
    projection: Tensor
    class_means: Tensor
    location: Tensor
    scale: Tensor
    quantiles: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in _NOVELTY:
            self.register_buffer(name, tensors[name])

    def forward(self, probabilities: Tensor, pooled: Tensor) -> Tensor:
        """Probabilities (B, K) and means of all feature maps (B, D) to the novelty (B,)."""
        return self.rank(self.score(probabilities, pooled))

    def parts(self, probabilities: Tensor, pooled: Tensor) -> Tensor:
        """The two parts of the score before they are standardized, (B, 2)."""
        rest = (1 - probabilities.amax(1)).clamp(min=_MIN_REST)
        place = (pooled.float() - self.mean) @ self.projection  # (B, R)
        # |p - c|^2 = |p|^2 - 2 pc + |c|^2: no (B, M, R) tensor.
        distances = place.square().sum(1, keepdim=True) - 2 * place @ self.class_means.mT
        distances = distances + self.class_means.square().sum(1)  # (B, M)
        return torch.stack([rest.log(), distances.amin(1).clamp(min=1e-9).log()], dim=1)

    def score(self, probabilities: Tensor, pooled: Tensor) -> Tensor:
        """The score, unbounded, (B,)."""
        standardized = (self.parts(probabilities, pooled) - self.location) / self.scale
        return standardized[:, 0] + DISTANCE_WEIGHT * standardized[:, 1]

    def rank(self, scores: Tensor, folds: Tensor | int = 0) -> Tensor:
        """Scores (B,) to the share of held-out images with a smaller one, by one row of `quantiles` or one each."""
        return (scores[:, None] > self.quantiles[folds]).float().mean(1)


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Means (K, F) of features (N, F) by class, 0 for a class without any, and what is left of each feature, (N, F)."""
    features = features.double()
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64).index_add_(0, labels, features)
    means = sums / labels.bincount(minlength=num_classes).clamp(min=1)[:, None]
    return means, features - means[labels]


def may_describe_features(bundle: "Bundle") -> bool:
    """Whether a calibration of this model holds a `FeatureSummary`: of one label, up to 1,000 classes and 1,024
    features."""
    few = len(bundle.classes) <= MAX_MEANS and bundle.model.num_features <= MAX_FEATURES
    return few and not bundle.multilabel


@dataclass(frozen=True, eq=False)
class FeatureSummary:
    """The input of the classifier, (F,) an image, over training images.

    Attributes:
        counts: images of each class, (K,); a class without any has no mean.
        means: of each class, (K, F).
        covariance: within the classes, (F, F).
    """

    counts: Tensor
    means: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> Self:
        """The summary of features (N, F) with labels (N,)."""
        means, apart = class_means(features, labels, num_classes)
        covariance = apart.mT @ apart / len(apart)
        return cls(labels.bincount(minlength=num_classes), means.float(), covariance.float())

    def draw(self, per_class: int) -> tuple[Tensor, Tensor]:
        """Features (N, F) of normal distributions around the means, and labels (N,): the same ones at every call."""
        known = self.counts.nonzero()[:, 0]
        labels = known.repeat_interleave(per_class)
        values, vectors = torch.linalg.eigh(self.covariance.double())
        root = vectors * values.clamp(min=0).sqrt()  # (F, F)
        noise = torch.randn(len(labels), len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return (self.means[labels].double() + noise @ root.mT).float(), labels


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was fitted to held-out images.

    Attributes:
        temperature: (1 + FOLDS, 1), or (1 + FOLDS, K) for several labels. The classifier's weights are those of
            training divided by the first row.
        images: digests of the held-out images, sorted, int64 (N,).
        thresholds: `lac`, `aps` and `raps`: the largest score of a class in a set, (1 + FOLDS, STEPS) by coverage;
            empty for several labels.
        novelty: the score of novelty, on the CPU.
        features: of training images; None for several labels, more than 1,000 classes or 1,024 features, and in bundles
            of earlier releases.
    """

    temperature: Tensor
    images: Tensor
    thresholds: Mapping[str, Tensor]
    novelty: Novelty
    features: FeatureSummary | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names of the file."""
        sets = {f"sets.{method}": each for method, each in self.thresholds.items()}
        novelty = {f"novelty.{name}": getattr(self.novelty, name) for name in _NOVELTY}
        features = (
            {} if self.features is None else {f"features.{name}": each for name, each in vars(self.features).items()}
        )
        return {"temperature": self.temperature, "images": self.images, **sets, **novelty, **features}

    def folds(self, digests: Tensor) -> Tensor:
        """For each image (B,) the row of thresholds that was not fitted to it: 0 if none was, else 1 to FOLDS."""
        place = torch.searchsorted(self.images, digests).clamp(max=len(self.images) - 1)
        return torch.where(self.images[place] == digests, digests % FOLDS + 1, 0)

    def without_own(self, logits: Tensor, folds: Tensor) -> Tensor:
        """Logits (B, K) of the calibrated model, at temperatures that were not fitted to the image."""
        return logits * (self.temperature[0] / self.temperature[folds])


def read_calibration(path: Path, model: CoAtNet, multilabel: bool) -> Calibration:
    """Read calibration.safetensors. Raises UserError if it is damaged or not of this model."""
    shapes = read_shapes(path)

    def length(name: str, axis: int, most: int) -> int:
        shape = shapes.get(name, ())
        if len(shape) <= axis or not 1 <= shape[axis] <= most:
            raise UserError(f"{path}: {name} is {list(shape)}; axis {axis} must be 1 to {most:,}")
        return shape[axis]

    dimensions, width, rows = length("novelty.projection", 1, MAX_DIMENSIONS), means_width(model), 1 + FOLDS
    expected = {
        "temperature": (rows, model.num_classes if multilabel else 1),
        "novelty.mean": (width,),
        "novelty.projection": (width, dimensions),
        "novelty.class_means": (length("novelty.class_means", 0, MAX_MEANS), dimensions),
        "novelty.location": (2,),
        "novelty.scale": (2,),
        "novelty.quantiles": (rows, STEPS),
        **({} if multilabel else {f"sets.{method}": (rows, STEPS) for method in METHODS}),
    }
    if has_features := "features.means" in shapes:
        features = length("features.means", 1, MAX_FEATURES)
        expected |= {"features.means": (model.num_classes, features), "features.covariance": (features, features)}
    empty = {name: torch.empty(shape, device="meta") for name, shape in expected.items()}
    empty["images"] = torch.empty(length("images", 0, MAX_IMAGES), dtype=torch.int64, device="meta")
    if has_features:
        empty["features.counts"] = torch.empty(model.num_classes, dtype=torch.int64, device="meta")
    found = read_tensors(path, empty)
    for name in ("temperature", "novelty.scale"):
        if (found[name] <= 0).any():
            raise UserError(f"{path}: {name} holds a number that is not positive; the file is damaged")
    novelty = Novelty({name: found[f"novelty.{name}"] for name in _NOVELTY})
    thresholds = {method: found[f"sets.{method}"] for method in METHODS if not multilabel}
    names = ("counts", "means", "covariance")
    summary = FeatureSummary(*(found[f"features.{name}"] for name in names)) if has_features else None
    return Calibration(found["temperature"], found["images"].sort().values, thresholds, novelty, summary)


def logits_and_means(model: CoAtNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Normalized images to logits (B, K) and the means of all feature maps, (B, D) in float32."""
    last, maps = model.forward_intermediates(images)
    return model.forward_head(last), means_of(maps)


def means_of(maps: Sequence[Tensor]) -> Tensor:
    """The means of feature maps (B, C, H, W) side by side, (B, D) in float32."""
    return torch.cat([mean_over_cells(each) for each in maps], dim=1).float()


def means_width(model: CoAtNet) -> int:
    """D."""
    return model.variant.stem_width + sum(stage.width for stage in model.variant.stages)


@torch.no_grad()
def scale_classifier(model: CoAtNet, factor: Tensor) -> None:
    """Multiply all logits of a model by a factor, (1,) or one for each class (K,), in place."""
    classifier = model.get_classifier()
    assert isinstance(classifier, nn.Linear)
    classifier.weight.mul_(factor[:, None])
    classifier.bias.mul_(factor)


def is_refused(novelty: Any, rate: float) -> Any:
    """Whether `--reject rate` refuses images of this novelty, a number or an array."""
    return novelty > 1 - rate + 1e-6  # novelties are whole numbers of thousandths, in float32


def set_scores(probabilities: Tensor, method: str) -> Tensor:
    """The score of each class, (B, K) to (B, K): a set holds those whose score is at most the threshold."""
    if method == "lac":
        return 1 - probabilities
    ordered, order = probabilities.sort(dim=1, descending=True)
    scores = ordered.cumsum(1)
    if method == "raps":
        ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device)
        scores = scores + RAPS_PENALTY * (ranks - RAPS_FREE).clamp(min=0)
    return torch.empty_like(scores).scatter_(1, order, scores)


def threshold_index(coverage: float) -> int:
    """The column of thresholds for a coverage, rounded up to a thousandth. Raises UserError if there is none."""
    if not 0 < coverage <= (STEPS - 1) / STEPS:
        raise UserError(
            f"the coverage of a set is {coverage}; it must be above 0 and at most {(STEPS - 1) / STEPS}, such as 0.9"
        )
    return max(1, -int(-round(coverage * STEPS, 6) // 1))
