"""How much frozen features tell: a linear probe and k nearest neighbours, learned on training, measured on validation.

Neighbours vote as in DINO (Caron et al., 2021, arXiv:2104.14294). Shapes: N training images, M others,
D features, K classes; labels (N,), or (N, K) of 0 and 1 where an image has several.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.bundle.config import readable_json
from coatnet.data.splits import Splits, choose_validation
from coatnet.errors import UserError
from coatnet.evaluation.evaluate import choose_datasets
from coatnet.evaluation.features import extract_features
from coatnet.evaluation.intervals import Interval
from coatnet.evaluation.metrics import FIGURES, Metrics
from coatnet.system.progress import track

TEMPERATURE = 0.07
# chosen: from next to nothing to a tenth of the mean loss, on standardised features; strongest first.
L2_STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
HELD_OUT = 0.1
MOST_ITERATIONS = 1000
ROWS_AT_ONCE = 16_384  # chosen: their logits of 1,000 classes are 128 MB
NUMBERS_AT_ONCE = 2**25  # chosen: similarities and votes of 128 MB, or 256 MB where labels are counted


@dataclass(frozen=True)
class ProbeReport:
    """Two figures of frozen features as fractions, each with its 95 % interval on `n` images.

    `figure` is "top1", or "mean_average_precision" where an image has several labels. `l2` is the strength that was
    chosen on a held-out tenth of the training images.
    """

    data: str
    resolution: int
    num_features: int
    num_classes: int
    num_training: int
    n: int
    figure: str
    linear: float
    linear_interval: Interval | None
    l2: float
    knn: float
    knn_interval: Interval | None
    k: int
    bad_images: Mapping[str, str]

    def to_text(self) -> str:
        """A few lines for people."""
        title = FIGURES[self.figure].title
        lines = [
            f"linear probe: {title} {_percent(self.linear, self.linear_interval)} (L2 {self.l2:g})",
            f"k-NN, k = {self.k}: {title} {_percent(self.knn, self.knn_interval)}",
            f"measured on {self.n:,} held-out images of {self.data}, learned from {self.num_training:,}: "
            f"{self.num_classes:,} classes, {self.num_features:,} features at {self.resolution} pixels",
        ]
        lines += [f"left out: {name}: {reason}" for name, reason in self.bad_images.items()]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """The same as numbers for a program."""
        return readable_json(asdict(self))


def probe(
    bundle: Bundle,
    data: str | Path | Splits,
    *,
    k: int = 20,
    batch_size: int = 64,
    num_workers: int | None = None,
) -> ProbeReport:
    """Both figures for the classes of the data, which need not be the model's; the same every time.

    Holds the features in memory three times. Several labels an image: one logistic regression a class, and mean
    average precision.

    Raises:
        UserError: a split is missing or empty, fewer than two classes can be learned, or k is not in 1..N.
    """
    name, datasets, _ = choose_datasets(data, "all", bundle)
    if len(datasets) != 2:
        raise UserError(f"{name} is one dataset; a probe learns from one split and is measured on another")
    splits, num_classes = Splits(name, datasets[0], datasets[1]), len(datasets[0].classes)
    # Before the features are computed, and again without the images that cannot be read.
    _check(name, torch.from_numpy(splits.training.labels), num_classes, k)
    training, validation = (
        extract_features(bundle, splits, split=split, batch_size=batch_size, num_workers=num_workers)
        for split in ("training", "validation")
    )
    others, truth, _ = validation.gather()
    features, labels, _ = training.gather()
    _check(name, labels, num_classes, k)
    device = next(bundle.model.parameters()).device
    features, labels, others = features.to(device), labels.to(device), others.to(device)

    figure = _figure(labels)
    knn = _judge(knn_scores(features, labels, others, num_classes, k=k), truth)
    scores, l2 = linear_scores(features, labels, others, num_classes)
    linear = _judge(scores, truth)
    return ProbeReport(
        data=name,
        resolution=bundle.preprocessing.resolution,
        num_features=training.num_features,
        num_classes=num_classes,
        num_training=len(features),
        n=len(others),
        figure=figure,
        linear=linear.compute()[figure],
        linear_interval=linear.intervals()[figure],
        l2=l2,
        knn=knn.compute()[figure],
        knn_interval=knn.intervals()[figure],
        k=k,
        bad_images=training.bad_images | validation.bad_images,
    )


def linear_scores(features: Tensor, labels: Tensor, others: Tensor, num_classes: int) -> tuple[Tensor, float]:
    """Logits (M, K) of the logistic regression on features (N, D), and the L2 strength it was given.

    The strength is the strongest of those that do best on a held-out tenth of the features; then all are used.

    Raises:
        UserError: no class has two images, so none can be held out.
    """
    spread, mean = torch.std_mean(features, dim=0, correction=0)
    # A feature that does not vary is left as it is: dividing would blow up its rounding errors.
    spread = torch.where(spread > 1e-5 * mean.abs(), spread, 1.0)
    features, others = (features - mean) / spread, (others - mean) / spread

    held_out = _hold_out(labels)
    known, known_labels, figures = features[~held_out], labels[~held_out], {}
    for l2 in track(L2_STRENGTHS, "linear probe", len(L2_STRENGTHS)):
        weight, bias = fit_logistic(known, known_labels, num_classes, l2=l2)
        scores = F.linear(features[held_out], weight, bias)
        figures[l2] = _judge(scores, labels[held_out]).compute()[_figure(labels)]
    best = max(figures, key=lambda l2: figures[l2])  # the first, so the strongest, of equals
    weight, bias = fit_logistic(features, labels, num_classes, l2=best)
    return F.linear(others, weight, bias), best


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, *, l2: float) -> tuple[Tensor, Tensor]:
    """Weights W (K, D) and biases (K,) that minimise mean loss + l2 / 2 |W|^2, by L-BFGS over all images at once.

    The loss of an image is the cross-entropy, or the binary ones of the K classes added up if labels are (N, K).
    """
    # Double precision outside of the products: the line search compares losses that differ in their last digits.
    weight, bias = (
        torch.zeros(*shape, dtype=torch.float64, device=features.device, requires_grad=True)
        for shape in ((num_classes, features.shape[1]), (num_classes,))
    )
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MOST_ITERATIONS, tolerance_grad=1e-6, history_size=20, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = l2 / 2 * weight.square().sum()
        value.backward()
        for first in range(0, len(features), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            logits = F.linear(features[rows], weight.float(), bias.float()).double()
            part = _loss(logits, labels[rows]) / len(features)
            part.backward()
            value = value.detach() + part.detach()
        return value

    optimizer.step(objective)
    return weight.detach().float(), bias.detach().float()


def knn_scores(features: Tensor, labels: Tensor, others: Tensor, num_classes: int, *, k: int) -> Tensor:
    """Votes (M, K), from 0 to 1, of the k nearest of the features (N, D) by cosine similarity.

    A vote weighs exp(similarity / 0.07); an image of several labels votes for each of them.
    """
    features = F.normalize(features, dim=1)
    votes = []
    rows = max(1, NUMBERS_AT_ONCE // (len(features) + k * num_classes))
    for part in F.normalize(others, dim=1).split(rows):
        similarity, nearest = (part @ features.T).topk(k, dim=1)  # (B, k)
        weights = (similarity / TEMPERATURE).softmax(dim=1)
        chosen = labels[nearest] if labels.ndim == 2 else F.one_hot(labels[nearest], num_classes)  # (B, k, K)
        votes.append(torch.einsum("bk,bkc->bc", weights, chosen.to(weights.dtype)))
    return torch.cat(votes)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")


def _check(name: str, labels: Tensor, num_classes: int, k: int) -> None:
    """Raises UserError if training images of these labels do not make a probe."""
    num_found = len(labels.unique() if labels.ndim == 1 else labels.any(dim=0).nonzero())
    if num_found < 2:
        raise UserError(f"{name}: {num_found} of {num_classes} classes with training images; a probe needs two")
    if not 1 <= k <= len(labels):
        raise UserError(f"k is {k}; it must be 1 to {len(labels):,}, the training images of {name}")


def _hold_out(labels: Tensor) -> Tensor:
    """Marks (N,) a tenth of the images, class by class, the same whatever the machine and the names of files."""
    rows = [f"probe[{row}]" for row in range(len(labels))]
    held_out = torch.from_numpy(choose_validation(rows, labels.cpu().numpy(), HELD_OUT))
    if not held_out.any():
        raise UserError("no class has two training images, so none can be held out to choose the L2 strength")
    return held_out.to(labels.device)


def _figure(labels: Tensor) -> str:
    return "top1" if labels.ndim == 1 else "mean_average_precision"


def _judge(scores: Tensor, labels: Tensor) -> Metrics:
    """Counts scores (M, K), of which only the order matters here."""
    metrics = Metrics(scores.shape[1], multilabel=labels.ndim == 2)
    metrics.update(scores, labels)
    return metrics


def _percent(value: float, interval: Interval | None) -> str:
    bounds = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else "unknown"
    return f"{100 * value:.1f} % (95 % interval {bounds})"
