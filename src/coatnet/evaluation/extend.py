"""Classes that arrive later: a classifier for the old and the new ones, on the features of the network as it is.

Each way to a classifier is fitted to features of both: those of the new images, and for the old classes features those
of images that are given, or drawn from what a calibrated bundle knows of its training images. Every class weighs the
same, however few its images are. Shapes: N images, F features, K old classes, K' all classes.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.bundle.bundle import place_name
from coatnet.bundle.calibration import FeatureSummary, class_means, may_describe_features
from coatnet.bundle.config import extensions, provenance
from coatnet.data.datasets import JoinedDataset
from coatnet.data.open import data_path, open_dataset
from coatnet.data.splits import Splits, assign_folds
from coatnet.errors import UserError, counted, cut, one_line, shorten
from coatnet.evaluation.calibrate import MAX_TRAINING_IMAGES, Outputs, calibrate_and_evaluate, sample_outputs
from coatnet.evaluation.evaluate import (
    EVALUATED_TOGETHER,
    KEPT_IMAGES,
    SplitOutputs,
    load_model,
    open_recorded,
    recorded_rule,
    was_trained_on,
)
from coatnet.evaluation.metrics import Interval, paired_difference, wilson_interval
from coatnet.evaluation.outputs import match_names
from coatnet.evaluation.report import Report
from coatnet.system.progress import ProgressBar

NEW_ROWS = "new rows"  # the ways that leave those of the old classes as they are
DRAWN_FEATURES, MIN_DRAWN = 4_000, 20  # chosen: of all classes together, and of each; more change nothing
NUM_FOLDS = 5  # of the images, to choose a method
MAX_DROP = 0.01  # of the accuracy of the old classes
# chosen by measurement: of images that the network has learned from, half as many are lost as of others (docs/results)
LEARNED_DROP = 0.5
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
        methods: accuracy of each method, the mean over classes, by folds of the images.
        lowered: what was subtracted from the logits of the new classes, so that the old ones lose little.
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
    lowered: float
    new: Accuracy | None
    before: Accuracy | None
    after: Accuracy | None
    lost: Interval | None
    report: Report | None

    def to_text(self) -> str:
        """What was added and what it cost, in a few lines of text."""
        lines = [f"added {counted(len(self.added), 'class')}: {shorten(self.added)}"]
        tried = ", ".join(f"{name} {100 * value:.1f} %" for name, value in self.methods.items())
        lines.append(f"method: {self.method} (right by {NUM_FOLDS} folds of the images, mean over classes: {tried})")
        if self.lowered:
            lines.append(f"logits of the new classes lowered by {self.lowered:.2g}, to keep the old ones")
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
    max_drop: float = MAX_DROP,
    batch_size: int = EVALUATED_TOGETHER,
    num_workers: int | None = None,
    device: str | None = None,
) -> Extension:
    """Add classes to a model from a few images each, without training its network.

    Args:
        bundle: the model: a bundle, its folder, or its id on the hub.
        data: images of the new classes; images of old classes among them are learned from too.
        old: the images that the model was trained on, or others of its classes. The classifier is fitted to at most
            4,000 of their training split, measured on their validation split before and after, and calibrated. A bundle
            that is not calibrated needs them.
        max_drop: accuracy that the old classes may lose, as far as their training images tell; 0.01 is one point.
        batch_size: images per batch.
        num_workers: processes that decode; None as in `evaluate`.
        device: as in `evaluate`.

    Raises:
        UserError: no class is new, or one has no training image, an image has several labels, max_drop is not in 0 to
            1, or nothing is known of the old classes.
    """
    if not 0 <= max_drop <= 1:
        raise UserError(f"max-drop is a share of accuracy, 0 to 1, such as {MAX_DROP}, got {max_drop:g}")
    source = bundle.model.variant.name if isinstance(bundle, Bundle) else place_name(str(bundle))
    bundle = load_model(bundle, device)
    if bundle.multilabel:
        raise UserError("this model gives several labels per image; classes are added to models that give one")
    summary = bundle.calibration.features if bundle.calibration is not None else None
    bundle = bundle.uncalibrated()
    arriving = _open(data, bundle, arrives=True)
    known = None if old is None else _open(old, bundle)
    added = tuple(name for name in arriving.classes if name not in bundle.classes)
    if not added:
        raise UserError(f"{arriving.name}: the model has all of its classes already: {shorten(arriving.classes)}")
    if known is not None and (unknown := [name for name in known.classes if name not in bundle.classes]):
        raise UserError(f"{known.name}: the model has no class {unknown[0]!r}; old images are of its own classes")
    if known is None and summary is None:
        calibrate = ", or calibrate the model first: `coatnet calibrate BUNDLE --data DATA`"
        raise UserError(
            "nothing is known of the old classes: give images of them (--old DATA)"
            + calibrate * may_describe_features(bundle)
        )
    classes = (*bundle.classes, *added)

    weights = bundle.classifier()
    blank = bundle.with_classifier(classes, torch.zeros(len(classes), weights[0].shape[1]), torch.zeros(len(classes)))
    training, validation = (
        JoinedDataset(arriving.name, classes, [getattr(each, split) for each in (known, arriving) if each])
        for split in ("training", "validation")
    )
    numbers = set(np.asarray(training.labels).tolist())
    if rare := [name for index, name in enumerate(classes) if name in added and index not in numbers]:
        raise UserError(
            f"{arriving.name}: no training image of the new class {rare[0]!r}; ten are enough to begin with"
        )
    images, num_old = None, 0 if known is None else len(known.validation)
    if len(validation):
        name = arriving.name if known is None else f"{known.name} and {arriving.name}"
        joined = Splits(name, training, validation)
        images = SplitOutputs(blank, joined, batch_size=batch_size, num_workers=num_workers, keep=True)
    learned = _learned(blank, known, arriving, images, batch_size, num_workers)
    seen = set(learned.labels.tolist())
    if unread := [name for index, name in enumerate(classes) if name in added and index not in seen]:
        raise UserError(
            f"{arriving.name}: no training image of the new class {unread[0]!r} can be read; `coatnet doctor` says why"
        )
    features, labels = _with_drawn(learned, summary, len(bundle.classes))

    methods = _methods(weights)
    if not labels.bincount(minlength=len(classes))[: len(bundle.classes)].all():
        # Of an old class without any features only the row that it has is known.
        methods = {name: fit for name, fit in methods.items() if name.startswith(NEW_ROWS)}
    before_logits, is_new = F.linear(features, *weights), torch.arange(len(classes)) >= len(bundle.classes)
    found, lowered = dict[str, float](), dict[str, float]()
    for name, fit in methods.items():
        logits = _by_folds(fit, features, labels, len(classes))
        lower = lower_new(logits, before_logits, labels, LEARNED_DROP * max_drop)
        if lower is not None:  # as for new rows always
            found[name], lowered[name] = _accuracy(logits - lower * is_new, labels), lower
    if not found:
        raise UserError(
            f"no way of adding the classes keeps the accuracy on the old ones within --max-drop {max_drop:g}: give "
            "more old images, or allow more"
        )
    method = max(found, key=lambda name: found[name])  # of equals the first
    weight, bias = methods[method](features, labels, len(classes))
    bias = bias - lowered[method] * is_new
    extended = bundle.with_classifier(classes, weight, bias)

    new = before = after = lost = report = None
    if images is not None:
        with ProgressBar("evaluating") as bar:
            was, now, labels, is_old = _decisions(images, [bundle, extended], num_old, bar)
            if num_old:
                extended, report = calibrate_and_evaluate(extended, images, reference=learned, progress=bar.update)
        arrived = ~is_old & (labels >= len(bundle.classes))
        if arrived.any():
            new = Accuracy(int((now == labels)[arrived].sum()), int(arrived.sum()))
        if is_old.any():
            right_before, right_after = (each[is_old] == labels[is_old] for each in (was, now))
            before, after = (Accuracy(int(each.sum()), len(each)) for each in (right_before, right_after))
            lost = paired_difference(right_after, right_before)
    result = Extension(extended, added, method, found, lowered[method], new, before, after, lost, report)
    earlier = extensions(bundle.record)
    about = {
        "model": source,
        "data": arriving.name if isinstance(data, Splits) else place_name(data_path(str(data))),
        "added": list(added),
        "method": method,
        "methods": found,
        "lowered": lowered[method],
        **{name: asdict(each) for name, each in (("new", new), ("before", before), ("after", after)) if each},
        **({"lost": list(lost)} if lost else {}),
        **({"earlier": earlier} if earlier else {}),
    }
    record = {
        **provenance(bundle.record),
        "extension": about,
        **({} if report is None else {"report": report.to_dict()}),
    }
    return replace(result, bundle=replace(extended, record=record))


def _open(data: str | Path | Splits, bundle: Bundle, *, arrives: bool = False) -> Splits:
    """Open images; their classes that the model has are spelled as its own.

    Of those that arrive none are left out as a test split, which is one of the training.
    """
    if arrives and not isinstance(data, Splits) and not was_trained_on(bundle, data):
        data = open_dataset(data, rule=replace(recorded_rule(bundle), test_fraction=0.0), evaluation=True)
    opened = open_recorded(data, bundle)
    assert isinstance(opened, Splits)
    if opened.multilabel:
        raise UserError(f"{opened.name} has several labels per image, the model gives one")
    numbers = match_names(opened.classes, bundle.classes)
    classes = tuple(
        name if number is None else bundle.classes[number] for name, number in zip(opened.classes, numbers, strict=True)
    )
    if classes == opened.classes:
        return opened
    parts: dict[str, Any] = {name: copy.copy(part) for name, part in opened.parts.items()}
    for part in parts.values():
        part.classes = classes
    return replace(opened, **parts)


def _learned(
    bundle: Bundle,
    known: Splits | None,
    arriving: Splits,
    images: SplitOutputs | None,
    batch_size: int,
    num_workers: int | None,
) -> Outputs:
    """What the network makes of the training images: at most 4,000 old ones, and all that arrive."""
    parts, properties, complete = list[Outputs](), [], True
    for splits, most in ((known, MAX_TRAINING_IMAGES), (arriving, KEPT_IMAGES)):
        if splits is None or not len(splits.training):
            continue
        inspect, total = images.inspect if images else None, min(most, len(splits.training))
        with ProgressBar(f"features of {splits.name}") as bar:
            advance = lambda done: bar.update(min(done, total), total)  # noqa: B023, E731
            found, seen = sample_outputs(
                bundle,
                (splits.training,),
                most,
                num_workers,
                advance,
                inspect,
                batch_size=batch_size,
                balanced=True,
            )
        parts.append(found)
        properties += seen
        complete = complete and len(splits.training) <= most
    if images is not None and complete:
        images.training_properties = properties
    return Outputs(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _with_drawn(learned: Outputs, summary: FeatureSummary | None, num_old: int) -> tuple[Tensor, Tensor]:
    """Features (N, F) and labels (N,) of images, and drawn ones of old classes that have fewer than 20."""
    features, labels = learned.features, learned.labels
    if summary is None:
        return features, labels
    drawn, numbers = summary.draw(max(MIN_DRAWN, DRAWN_FEATURES // num_old))
    rare = labels.bincount(minlength=num_old)[numbers] < MIN_DRAWN
    return torch.cat([features, drawn[rare]]), torch.cat([labels, numbers[rare]])


def _decisions(
    images: SplitOutputs, bundles: Sequence[Bundle], num_old: int, bar: ProgressBar
) -> tuple[np.ndarray, ...]:
    """Of each image (N,): the class by each classifier, its label, and whether it is one of the first `num_old`."""
    rows = []
    for batch in images.batches(lambda done: bar.update(done, len(images))):
        found = (batch.logits(each).argmax(1) for each in bundles)
        is_old = torch.tensor([index < num_old for _, index in batch.places])
        rows.append([*found, batch.labels, is_old])
    return tuple(torch.cat(column).numpy() for column in zip(*rows, strict=True))


def _methods(old: Classifier) -> dict[str, Fit]:
    """Each way to a classifier by its name: from features (N, F), labels (N,) and K'."""
    return {
        **{f"{NEW_ROWS} {l2:g}": partial(fit_new_rows, old=old, l2=l2) for l2 in L2_STRENGTHS},
        **{f"nearest mean {each:g}": partial(fit_means, shrinkage=each) for each in SHRINKAGES},
        **{f"ridge {each:g}": partial(fit_ridge, strength=each) for each in RIDGES},
    }


def _by_folds(fit: Fit, features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Logits (N, K'), of each image by a classifier that was fitted to the other folds."""
    folds = torch.from_numpy(assign_folds([f"extend[{row}]" for row in range(len(labels))], labels.numpy(), NUM_FOLDS))
    logits = torch.zeros(len(labels), num_classes)
    for fold in range(NUM_FOLDS):
        out = folds == fold
        logits[out] = F.linear(features[out], *fit(features[~out], labels[~out], num_classes))
    return logits


def lower_new(logits: Tensor, before: Tensor, labels: Tensor, max_drop: float) -> float | None:
    """The least number to subtract from the logits of new classes so that the old ones lose no more than that.

    Args:
        logits: of all classes, (N, K').
        before: of the old ones, (N, K), by the old classifier.
        labels: (N,); images of new classes do not count.
        max_drop: share of the images of old classes that may be lost.

    Returns:
        The number, 0 or above; None if the logits of the old classes alone lose more.
    """
    num_old = before.shape[1]
    of_old = labels < num_old
    logits, before, labels = logits[of_old], before[of_old], labels[of_old]
    right = logits[:, :num_old].argmax(1) == labels
    spare = math.floor(max_drop * len(labels)) + int(right.sum()) - int((before.argmax(1) == labels).sum())
    if spare < 0:
        return None
    excess = (logits[:, num_old:].amax(1) - logits[:, :num_old].amax(1))[right].sort(descending=True).values
    return max(0.0, float(excess[spare]) + 1e-4) if spare < len(excess) else 0.0


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images that are right, mean over classes."""
    right = (logits.argmax(1) == labels).double()
    return float(torch.stack([right[labels == label].mean() for label in labels.unique()]).mean())


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
