"""Classes that arrive later: a classifier for the old and the new ones, on the features of the network as it is.

Each way to a classifier is fitted to features of both: those of the new images, and for the old classes features drawn
from what a calibrated bundle knows of its training images, or those of images that are given. Every class weighs the
same, however few its images are. Shapes: N images, F features, K old classes, K' all classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.bundle.bundle import place_name
from coatnet.bundle.calibration import class_means
from coatnet.data.datasets import JoinedDataset
from coatnet.data.splits import Splits, assign_folds
from coatnet.errors import UserError, counted, cut, one_line, shorten
from coatnet.evaluation.calibrate import calibrate_and_evaluate
from coatnet.evaluation.evaluate import Measured, load_model, open_recorded
from coatnet.evaluation.features import extract_features
from coatnet.evaluation.metrics import Interval, paired_difference, wilson_interval
from coatnet.evaluation.report import Report
from coatnet.system.progress import ProgressBar

DRAWN_FEATURES, MIN_DRAWN = 4_000, 20  # chosen: of all classes together, and of each; more change nothing
NUM_FOLDS = 5  # of the new images, to choose a method
# Strengths relative to the mean variance of a feature; as in `probe`, strongest first.
SHRINKAGES, RIDGES, L2_STRENGTHS = (0.5, 0.1, 0.02), (1.0, 0.1, 0.01), (1e-2, 1e-3)

Classifier = tuple[Tensor, Tensor]  # weight (K', F) and bias (K',)
Fit = Callable[[Tensor, Tensor, int], Classifier]  # of features (N, F), labels (N,) and K'


@dataclass(frozen=True)
class Accuracy:
    """Images that are classified right among all K' classes: `correct` of `n`."""

    correct: int
    n: int

    def __str__(self) -> str:
        low, high = wilson_interval(self.correct, self.n)
        return f"{100 * self.correct / self.n:.1f} % ({100 * low:.1f} to {100 * high:.1f}, n = {self.n:,})"


@dataclass(frozen=True)
class Extension:
    """What `extend` returns.

    Attributes:
        bundle: the model of all classes; its record holds what follows.
        added: names of the new classes.
        method: how its classifier was found.
        methods: accuracy of each method, the mean over classes, by folds of the new images.
        new: accuracy on held-out images of the new classes; None without any.
        before: accuracy of the old model on held-out images of the old classes; None without any.
        after: that of the new model on the same images.
        lost: interval (95 %) of the difference, after - before.
        report: evaluation of the new model on all held-out images; None without those of the old classes.
    """

    bundle: Bundle
    added: tuple[str, ...]
    method: str
    methods: dict[str, float]
    new: Accuracy | None
    before: Accuracy | None
    after: Accuracy | None
    lost: Interval | None
    report: Report | None

    def to_text(self) -> str:
        """What was added and what it cost, in a few lines of text."""
        lines = [f"added {counted(len(self.added), 'class')}: {shorten(self.added)}"]
        tried = ", ".join(f"{name} {100 * value:.1f} %" for name, value in self.methods.items())
        lines.append(
            f"method: {self.method} (right by {NUM_FOLDS} folds of the new images, mean over classes: {tried})"
        )
        if self.new is not None:
            lines.append(f"new classes: {self.new}")
        else:
            lines.append("new classes: not measured, no images of them are held out")
        if self.before is not None and self.after is not None and self.lost is not None:
            change = 100 * (self.after.correct - self.before.correct) / self.before.n
            low, high = (100 * bound for bound in self.lost)
            lines.append(f"old classes: {self.before} before, {self.after} after")
            lines.append(f"change: {change:+.1f} points ({low:+.1f} to {high:+.1f})")
        else:
            lines.append("old classes: not measured; --old DATA gives their images")
        if self.bundle.calibration is None:
            lines.append("The model is not calibrated, which needs held-out images of all classes.")
        return "\n".join(cut(one_line(line)) for line in lines) + "\n"


def extend(
    bundle: Bundle | str | Path,
    data: str | Path | Splits,
    *,
    old: str | Path | Splits | None = None,
    num_workers: int | None = None,
    device: str | None = None,
) -> Extension:
    """Add classes to a model from a few images each, without training its network.

    Args:
        bundle: the model: a bundle, its folder, or its id on the hub.
        data: images of the new classes; images of old classes among them are learned from too.
        old: the images that the model was trained on, or others of its classes. The model is measured on their
            validation split before and after, and calibrated. A bundle that is not calibrated needs them to learn from.
        num_workers: processes that decode; None as in `evaluate`.
        device: as in `evaluate`.

    Raises:
        UserError: no class is new, an image has several labels, or nothing is known of the old classes.
    """
    source = bundle.model.variant.name if isinstance(bundle, Bundle) else place_name(str(bundle))
    bundle = load_model(bundle, device)
    if bundle.multilabel:
        raise UserError("this model gives several labels an image; classes are added to models that give one")
    summary = bundle.calibration.features if bundle.calibration is not None else None
    bundle = bundle.uncalibrated()
    arriving = _open(data, bundle)
    known = None if old is None else _open(old, bundle)
    added = tuple(name for name in arriving.classes if name not in bundle.classes)
    if not added:
        raise UserError(f"{arriving.name}: the model has all of its classes already: {shorten(arriving.classes)}")
    if known is not None and (unknown := [name for name in known.classes if name not in bundle.classes]):
        raise UserError(f"{known.name}: the model has no class {unknown[0]!r}; old images are of its own classes")
    if known is None and summary is None:
        raise UserError(
            "nothing is known of the old classes: give images of them (--old DATA), or calibrate the model first: "
            "`coatnet calibrate BUNDLE --data DATA`"
        )
    classes = (*bundle.classes, *added)

    def features(splits: Splits) -> tuple[Tensor, Tensor]:
        places = torch.tensor([classes.index(name) for name in splits.classes])
        table, labels, _ = extract_features(bundle, splits.training, num_workers=num_workers).gather()
        return table, places[labels]

    new_features, new_labels = features(arriving)
    if summary is not None:
        old_features, old_labels = summary.draw(max(MIN_DRAWN, DRAWN_FEATURES // len(bundle.classes)))
    else:
        assert known is not None
        old_features, old_labels = features(known)

    weights = bundle.classifier()
    methods = _methods(weights)
    found = {
        name: _by_folds(fit, old_features, old_labels, new_features, new_labels, len(classes))
        for name, fit in methods.items()
    }
    method = max(found, key=lambda name: found[name])  # of equals the first
    weight, bias = methods[method](
        torch.cat([old_features, new_features]), torch.cat([old_labels, new_labels]), len(classes)
    )
    extended = bundle.with_classifier(classes, weight, bias)

    new = before = after = lost = report = None
    num_old = 0 if known is None else len(known.validation)
    if num_old or len(arriving.validation):
        training, validation = (
            JoinedDataset(arriving.name, classes, [getattr(each, split) for each in (known, arriving) if each])
            for split in ("training", "validation")
        )
        name = arriving.name if known is None else f"{known.name} and {arriving.name}"
        images = Measured(extended, Splits(name, training, validation), num_workers=num_workers, keep=True)
        with ProgressBar("evaluating") as bar:
            was, now, labels, is_old = _decisions(images, [weights, (weight, bias)], num_old, bar)
            if num_old:
                extended, report = calibrate_and_evaluate(extended, images, progress=bar.update)
        is_new = ~is_old & (labels >= len(bundle.classes))
        if is_new.any():
            new = Accuracy(int((now == labels)[is_new].sum()), int(is_new.sum()))
        if is_old.any():
            right_before, right_after = (each[is_old] == labels[is_old] for each in (was, now))
            before, after = (Accuracy(int(each.sum()), len(each)) for each in (right_before, right_after))
            lost = paired_difference(right_after, right_before)
    result = Extension(extended, added, method, found, new, before, after, lost, report)
    about = {
        "model": source,
        "data": arriving.name,
        "added": list(added),
        "method": method,
        "methods": found,
        **{name: asdict(each) for name, each in (("new", new), ("before", before), ("after", after)) if each},
        **({"lost": list(lost)} if lost else {}),
    }
    record = {
        **{name: value for name, value in bundle.record.items() if name in ("recipe", "probe")},
        "extension": about,
        **({} if report is None else {"report": report.to_dict()}),
    }
    return replace(result, bundle=replace(extended, record=record))


def _open(data: str | Path | Splits, bundle: Bundle) -> Splits:
    opened = open_recorded(data, bundle)
    assert isinstance(opened, Splits)
    if opened.multilabel:
        raise UserError(f"{opened.name} has several labels an image, the model gives one")
    return opened


def _decisions(
    images: Measured, classifiers: Sequence[Classifier], num_old: int, bar: ProgressBar
) -> tuple[np.ndarray, ...]:
    """Of each image (N,): the class by each classifier, its label, and whether it is one of the first `num_old`."""
    rows = []
    for batch in images.outputs(lambda done: bar.update(done, len(images))):
        features = batch.features[:, : classifiers[0][0].shape[1]]
        found = (F.linear(features, *each).argmax(1) for each in classifiers)
        is_old = torch.tensor([index < num_old for _, index in batch.places])
        rows.append([*found, batch.labels, is_old])
    return tuple(torch.cat(column).numpy() for column in zip(*rows, strict=True))


def _methods(old: Classifier) -> dict[str, Fit]:
    """Each way to a classifier by its name: from features (N, F), labels (N,) and K'."""
    return {
        **{f"new rows {l2:g}": partial(fit_new_rows, old=old, l2=l2) for l2 in L2_STRENGTHS},
        **{f"nearest mean {each:g}": partial(fit_means, shrinkage=each) for each in SHRINKAGES},
        **{f"ridge {each:g}": partial(fit_ridge, strength=each) for each in RIDGES},
    }


def _by_folds(
    fit: Fit,
    old_features: Tensor,
    old_labels: Tensor,
    new_features: Tensor,
    new_labels: Tensor,
    num_classes: int,
) -> float:
    """The share of images that are right, mean over classes; new ones are classified without their fold."""
    folds = assign_folds([f"extend[{row}]" for row in range(len(new_labels))], new_labels.numpy(), NUM_FOLDS)
    old_folds = torch.arange(len(old_labels)) % NUM_FOLDS
    right, total = torch.zeros(num_classes), torch.zeros(num_classes)
    for fold in range(NUM_FOLDS):
        out = torch.from_numpy(folds == fold)
        old_out = old_folds == fold
        seen = torch.cat([old_labels[~old_out], new_labels[~out]])
        classifier = fit(torch.cat([old_features[~old_out], new_features[~out]]), seen, num_classes)
        for features, labels in ((old_features[old_out], old_labels[old_out]), (new_features[out], new_labels[out])):
            correct = (F.linear(features, *classifier).argmax(1) == labels).float()
            right.index_add_(0, labels, correct)
            total.index_add_(0, labels, torch.ones(len(labels)))
    return float((right / total.clamp(min=1))[total > 0].mean())


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """A weight for each image, (N,), so that every class weighs the same; their mean is 1."""
    counts = labels.bincount(minlength=num_classes)
    return (len(labels) / (counts > 0).sum() / counts.clamp(min=1))[labels]


def fit_means(features: Tensor, labels: Tensor, num_classes: int, *, shrinkage: float) -> Classifier:
    """Nearest class mean by Mahalanobis' distance, one covariance for all classes: linear discriminant analysis.

    Args:
        features: (N, F).
        labels: (N,).
        num_classes: K'.
        shrinkage: of the covariance towards the mean variance, 0 to 1.
    """
    weights = class_weights(labels, num_classes).double()
    means, apart = class_means(features, labels, num_classes)
    covariance = (weights[:, None] * apart).mT @ apart / weights.sum()
    variance = covariance.diagonal().mean()
    covariance = (1 - shrinkage) * covariance
    covariance.diagonal().add_(shrinkage * variance + 1e-9)
    weight = torch.linalg.solve(covariance, means.mT).mT  # (K', F)
    bias = -0.5 * (weight * means).sum(1)
    return _without_absent(weight.float(), bias.float(), labels)


def fit_ridge(features: Tensor, labels: Tensor, num_classes: int, *, strength: float) -> Classifier:
    """Ridge regression on 1 for the class of an image and 0 for all others.

    Args:
        features: (N, F).
        labels: (N,).
        num_classes: K'.
        strength: of the penalty, in mean variances of a feature.
    """
    x, weights = features.double(), class_weights(labels, num_classes).double()[:, None]
    mean = (weights * x).sum(0) / weights.sum()
    centered = x - mean
    gram = (weights * centered).mT @ centered / weights.sum()
    gram.diagonal().add_(strength * gram.diagonal().mean() + 1e-9)
    targets = F.one_hot(labels, num_classes).double()
    share = (weights * targets).sum(0) / weights.sum()
    weight = torch.linalg.solve(gram, (weights * centered).mT @ (targets - share) / weights.sum()).mT  # (K', F)
    # Scaled so that probabilities are neither all alike nor 0 and 1; calibration does the rest.
    scale = 4.0 / (F.linear(centered.float(), weight.float()).double().std() + 1e-9)
    bias = share - weight @ mean
    return _without_absent((scale * weight).float(), (scale * bias).float(), labels)


def fit_new_rows(features: Tensor, labels: Tensor, num_classes: int, *, old: Classifier, l2: float) -> Classifier:
    """Logistic regression of the new classes alone: the rows of the old ones stay as they are.

    Args:
        features: (N, F).
        labels: (N,).
        num_classes: K'.
        old: the classifier of the first K classes.
        l2: strength of the penalty on weights of standardized features.
    """
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-6)
    weights = class_weights(labels, num_classes)
    kept = F.linear(features, *old)  # (N, K)
    x = (features - mean) / spread
    count = num_classes - kept.shape[1]
    # Of the offset of the old logits, which have no common zero, each new row begins with the mean.
    weight = torch.zeros(count, x.shape[1], requires_grad=True)
    bias = torch.full((count,), float(kept.mean()), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = torch.cat([kept, F.linear(x, weight, bias)], dim=1)
        loss = (weights * F.cross_entropy(logits, labels, reduction="none")).mean() + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss.detach()

    optimizer.step(objective)
    new_weight = weight.detach() / spread
    new_bias = bias.detach() - new_weight @ mean
    return torch.cat([old[0], new_weight]), torch.cat([old[1], new_bias])


def _without_absent(weight: Tensor, bias: Tensor, labels: Tensor) -> Classifier:
    """A classifier that never gives a class of which it has seen no image."""
    absent = labels.bincount(minlength=len(bias)) == 0
    return weight.masked_fill(absent[:, None], 0.0), bias.masked_fill(absent, float(bias.min()) - 1e4)
