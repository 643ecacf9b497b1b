"""Quality of frozen features: a linear probe and k-NN, fitted on the training split, measured on the validation split.

Neighbors vote as in DINO (Caron et al., 2021, arXiv:2104.14294, section 4.1). Shapes: N training images, M validation
images, D features, K classes; labels (N,), or (N, K) of 0 and 1 for multi-label.
"""

import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.bundle.bundle import place_name
from coatnet.bundle.config import readable_json
from coatnet.bundle.timm.selection import is_auto, load_pretrained
from coatnet.data.near_duplicates import keep_copies_together
from coatnet.data.open import NAMES, data_path, open_dataset
from coatnet.data.splits import SplitRule, Splits, choose_validation
from coatnet.errors import UserError, cut, one_line
from coatnet.evaluation.calibrate import calibrate_and_evaluate
from coatnet.evaluation.evaluate import SplitOutputs, load_model, open_recorded, recorded_rule, was_trained_on
from coatnet.evaluation.features import extract_features
from coatnet.evaluation.metrics import FIGURES, Interval, Metrics, main_figure
from coatnet.evaluation.report_markdown import write_report
from coatnet.system.files import atomic_folder, output_path, require_outside, translate_write_errors, user_path
from coatnet.system.progress import ProgressBar, track
from coatnet.system.terminal import echo

NUM_NEIGHBORS = 20
TEMPERATURE = 0.07  # of the votes of neighbors; as in DINO
# chosen: from almost nothing to a tenth of the mean loss, on standardized features; strongest first.
L2_STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
HELD_OUT_FRACTION = 0.1  # of the training images, to choose the L2 strength
MAX_ITERATIONS = 1000
LOGIT_ROWS_PER_STEP = 16_384  # chosen: their logits of 1,000 classes are 128 MB
KNN_NUMBERS_PER_STEP = 2**25  # chosen: similarities and votes of 128 MB, or 256 MB where labels are counted


@dataclass(frozen=True)
class ProbeReport:
    """What `probe` returns: two figures as fractions, with their 95 % intervals.

    Attributes:
        data: name of the data.
        resolution: of the input, in pixels.
        num_features: D.
        num_classes: K.
        num_training: number of training images, N.
        n: number of validation images, M.
        figure: "top1", or "mean_average_precision" for multi-label.
        linear: the figure of the linear probe.
        linear_interval: its interval.
        l2: L2 strength of the linear probe, chosen on a held-out tenth of the training images.
        knn: the figure of k-NN.
        knn_interval: its interval.
        k: number of neighbors.
        bad_images: why each unreadable image was left out, by its name.
        out: the folder that the linear probe was written to as a model, if it was.
    """

    data: str
    resolution: int | str
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
    out: str | None = None

    def to_text(self) -> str:
        """The report in a few lines of text."""
        title = FIGURES[self.figure].title
        lines = [
            f"linear probe: {title} {_percent(self.linear, self.linear_interval)} (L2 {self.l2:g})",
            f"k-NN, k = {self.k}: {title} {_percent(self.knn, self.knn_interval)}",
            f"measured on {self.n:,} held-out images of {self.data}, learned from {self.num_training:,}: "
            f"{self.num_classes:,} classes, {self.num_features:,} features at {self.resolution} pixels",
        ]
        lines += [f"left out: {name}: {reason}" for name, reason in self.bad_images.items()]
        if self.out is None:
            lines.append("next: --out FOLDER writes the linear probe as a model, for predict, serve and fine-tuning")
        else:
            out = shlex.quote(self.out)
            lines.append(f"The whole report is {self.out}/report.md, the linear probe as a model {self.out}/bundle.")
            lines.append(
                f"next: coatnet predict {out} IMAGE ..., or train all of it from here: "
                f"coatnet train finetune --init {out} --data DATA --out RUN"
            )
        return "\n".join(cut(one_line(line)) for line in lines) + "\n"

    def to_json(self) -> str:
        """All fields as indented JSON."""
        return readable_json(asdict(self))


def probe(
    bundle: Bundle | str | Path,
    data: str | Path | Splits,
    *,
    k: int | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str | None = None,
    out: str | Path | None = None,
) -> ProbeReport:
    """Measure how well the frozen features of a model separate classes, with a linear probe and with k-NN.

    With `out` the linear probe becomes a model: a bundle of the frozen network with the classifier that was fitted, and
    its evaluation on the validation split, whose figure is then that of the report.

    The classes of the data need not be the model's. The result is deterministic. For multi-label the probe is one
    logistic regression per class, and the figure is mean average precision. Memory holds the features three times.

    Args:
        bundle: the model: a bundle, its folder, or its id on the hub; "auto" is the published one that suits the images
            and the machine.
        data: splits, or what `open_dataset` opens, with a training and a validation split.
        k: number of nearest neighbors; 20 if None, or all training images if there are fewer.
        batch_size: images per batch.
        num_workers: processes that decode, as in `extract_features`.
        device: as in `evaluate`.
        out: a new folder for the model, in `out/bundle`, and its report, as a training leaves them: all or nothing.

    Raises:
        UserError: there is no such model, data or device, a split is missing or empty, fewer than two classes have
            training images, k is not in 1..N, or `out` exists, lies among the images or cannot be written (then
            a `ProbeNotWritten`, which holds the figures).
    """
    if out is None:
        opened = open_for_probe(bundle, data, device)
        return _measure(opened.bundle, opened.splits, k, batch_size, num_workers)[0]
    target = output_path(out)
    if target.exists():
        raise UserError(f"{out} exists already: give a new folder for the model and its report")
    if isinstance(data, str | Path) and str(data) not in NAMES:
        require_outside(target, str(user_path(data).absolute()))
    with ExitStack() as written:
        with translate_write_errors(out):  # before the work
            staged = written.enter_context(atomic_folder(target))
        source, bundle, splits, rule = open_for_probe(bundle, data, device)
        found, linear = _measure(bundle, splits, k, batch_size, num_workers)
        with ProgressBar("evaluating") as bar:
            fitted = linear.replace_classifier(bundle, splits)
            images = SplitOutputs(fitted, splits, batch_size=batch_size, num_workers=num_workers, keep=True)
            fitted, report = calibrate_and_evaluate(fitted, images, progress=bar.update)
        report = replace(report, bad_images=found.bad_images)
        about = {
            "model": source,
            "data": splits.name if isinstance(data, Splits) else place_name(data_path(str(data))),
            "num_training": found.num_training,
            "l2": found.l2,
            **{name: value for name, value in asdict(rule).items() if value},
        }
        found = replace(found, linear=report.figures[found.figure], linear_interval=report.intervals[found.figure])
        try:
            with translate_write_errors(out):
                replace(fitted, record={"probe": about, "report": report.to_dict()}).save(staged / "bundle")
                write_report(report, staged)
                written.close()
        except UserError as error:
            text, reason = str(error), error.__cause__
            if isinstance(reason, OSError):  # its path is that of the temporary folder
                text = f"{out} could not be written: {reason.strerror or reason}"
            raise ProbeNotWritten(text, found) from error
    return replace(found, out=str(out))


class ProbeNotWritten(UserError):
    """The model of a probe cannot be written, such as to a full disk.

    Attributes:
        report: what was measured.
    """

    def __init__(self, message: object, report: ProbeReport) -> None:
        super().__init__(message)
        self.report = report


class Opened(NamedTuple):
    """What a probe is given, opened: where the model is from, the model on its device, the images, their division."""

    source: str
    bundle: Bundle
    splits: Splits
    rule: SplitRule


def open_for_probe(bundle: Bundle | str | Path, data: str | Path | Splits, device: str | None) -> Opened:
    """Open a model (`auto` is chosen) and images: those of its training divided as they were then.

    Others are divided as a new training does, which may start from the probe: with copies on one side.
    """
    source = bundle.model.variant.name if isinstance(bundle, Bundle) else str(bundle)
    given = data
    if is_auto(bundle):
        data = data if isinstance(data, Splits) else open_dataset(data, evaluation=True)
        device = device or "auto"
        source, bundle = load_pretrained(data, device, _say)
    bundle = load_model(bundle, device)
    is_new = isinstance(given, str | Path) and not was_trained_on(bundle, given)
    rule = SplitRule() if is_new else recorded_rule(bundle)
    if is_new and isinstance(data, str | Path):
        data = open_dataset(data, evaluation=True)
    opened = open_recorded(data, bundle)
    if not isinstance(opened, Splits):
        raise UserError(f"{opened.name} is one dataset; a probe is fitted on one split and measured on another")
    if is_new:
        if recorded_rule(bundle) != SplitRule():
            _say(f"{opened.name} is not the name of what the model was trained on, so it is divided anew")
        opened, groups = keep_copies_together(opened, rule, _say)
        rule = replace(rule, kept_together=[list(group) for group in groups])
    return Opened(place_name(source), bundle, opened, rule)


def _say(line: str) -> None:
    echo(f"coatnet: {line}", error=True)


def _measure(
    bundle: Bundle, splits: Splits, k: int | None, batch_size: int, num_workers: int | None
) -> tuple[ProbeReport, "LinearProbe"]:
    """Fit both classifiers to the training split and measure them on the validation split."""
    name, num_classes = splits.name, len(splits.classes)
    # Checked before the features are computed, and again without the unreadable images.
    _check(name, torch.from_numpy(splits.training.labels), num_classes, k)
    if not len(splits.validation):
        raise UserError(f"{name}: the validation split holds no images, on which a probe is measured")
    training, validation = (
        extract_features(bundle, splits, split=split, batch_size=batch_size, num_workers=num_workers)
        for split in ("training", "validation")
    )
    validation_features, validation_labels, _ = validation.gather()
    features, labels, _ = training.gather()
    _check(name, labels, num_classes, k)
    k = min(NUM_NEIGHBORS, len(labels)) if k is None else k
    where = next(bundle.model.parameters()).device
    features, labels, validation_features = features.to(where), labels.to(where), validation_features.to(where)

    figure = main_figure(labels.ndim == 2)
    knn = _metrics(knn_scores(features, labels, validation_features, num_classes, k=k), validation_labels)
    probe = fit_linear(features, labels, num_classes)
    linear = _metrics(probe.scores(validation_features), validation_labels)
    report = ProbeReport(
        data=name,
        resolution=bundle.preprocessing.shown_size,
        num_features=training.num_features,
        num_classes=num_classes,
        num_training=len(features),
        n=len(validation_features),
        figure=figure,
        linear=linear.compute()[figure],
        linear_interval=linear.intervals()[figure],
        l2=probe.l2,
        knn=knn.compute()[figure],
        knn_interval=knn.intervals()[figure],
        k=k,
        bad_images=training.bad_images | validation.bad_images,
    )
    return report, probe


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A logistic regression on standardized features.

    Attributes:
        mean, spread: of the features, (D,).
        weight, bias: of the regression, (K, D) and (K,).
        l2: its L2 strength.
    """

    mean: Tensor
    spread: Tensor
    weight: Tensor
    bias: Tensor
    l2: float

    def scores(self, features: Tensor) -> Tensor:
        """Logits (M, K) of features (M, D)."""
        return F.linear((features - self.mean) / self.spread, self.weight, self.bias)

    @torch.no_grad()
    def replace_classifier(self, bundle: Bundle, splits: Splits) -> Bundle:
        """A copy of a bundle for the classes of the images: its network with this classifier, on features as they are.

        W (x - mean) / spread + b = (W / spread) x + (b - W mean / spread), in double precision until the end.
        """
        weight = self.weight.double() / self.spread.double()
        bias = self.bias.double() - weight @ self.mean.double()
        return bundle.with_classifier(splits.classes, weight, bias, multilabel=splits.multilabel)


def fit_linear(features: Tensor, labels: Tensor, num_classes: int, *, l2: float | None = None) -> LinearProbe:
    """Fit a logistic regression to standardized features.

    The L2 strength is the one with the best figure on a held-out tenth of the features, the strongest of equals; the
    regression is then fitted to all features.

    Args:
        features: (N, D).
        labels: (N,) or (N, K).
        num_classes: K.
        l2: the strength, if it is known.

    Raises:
        UserError: no class has two images, so none can be held out.
    """
    spread, mean = torch.std_mean(features, dim=0, correction=0)
    # A constant feature is not scaled: that would amplify its rounding errors.
    spread = torch.where(spread > 1e-5 * mean.abs(), spread, 1.0)
    features = (features - mean) / spread
    if l2 is not None:
        return LinearProbe(mean, spread, *fit_logistic(features, labels, num_classes, l2=l2), l2)

    held_out = _hold_out(labels)
    fitted, fitted_labels, figures = features[~held_out], labels[~held_out], {}
    for l2 in track(L2_STRENGTHS, "linear probe", len(L2_STRENGTHS)):
        weight, bias = fit_logistic(fitted, fitted_labels, num_classes, l2=l2)
        scores = F.linear(features[held_out], weight, bias)
        figures[l2] = _metrics(scores, labels[held_out]).compute()[main_figure(labels.ndim == 2)]
    best = max(figures, key=lambda l2: figures[l2])  # of equals the first, which is the strongest
    weight, bias = fit_logistic(features, labels, num_classes, l2=best)
    return LinearProbe(mean, spread, weight, bias, best)


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, *, l2: float) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression by L-BFGS, full batch: minimize mean loss + l2 / 2 |W|^2.

    The loss of an image is the cross-entropy; for labels (N, K) the sum of the binary cross-entropies of the classes.

    Args:
        features: (N, D).
        labels: (N,) or (N, K).
        num_classes: K.
        l2: strength of the penalty.

    Returns:
        Weights (K, D) and biases (K,).
    """
    # Double precision except in the matrix products: the line search compares losses that differ in their last digits.
    weight, bias = (
        torch.zeros(*shape, dtype=torch.float64, device=features.device, requires_grad=True)
        for shape in ((num_classes, features.shape[1]), (num_classes,))
    )
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_ITERATIONS, tolerance_grad=1e-6, history_size=20, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = l2 / 2 * weight.square().sum()
        value.backward()
        for first in range(0, len(features), LOGIT_ROWS_PER_STEP):
            rows = slice(first, first + LOGIT_ROWS_PER_STEP)
            logits = F.linear(features[rows], weight.float(), bias.float()).double()
            part = _loss(logits, labels[rows]) / len(features)
            part.backward()
            value = value.detach() + part.detach()
        return value

    optimizer.step(objective)
    return weight.detach().float(), bias.detach().float()


def knn_scores(features: Tensor, labels: Tensor, others: Tensor, num_classes: int, *, k: int) -> Tensor:
    """Classify by the k nearest neighbors in cosine similarity, whose votes weigh exp(similarity / 0.07).

    Args:
        features: of the neighbors, (N, D).
        labels: of the neighbors, (N,) or (N, K); a multi-label neighbor votes for each of its labels.
        others: features to be classified, (M, D).
        num_classes: K.
        k: number of neighbors.

    Returns:
        Votes (M, K), from 0 to 1.
    """
    features = F.normalize(features, dim=1)
    votes = []
    rows = max(1, KNN_NUMBERS_PER_STEP // (len(features) + k * num_classes))
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


def _check(name: str, labels: Tensor, num_classes: int, k: int | None) -> None:
    """Raise UserError if a probe cannot be fitted to these labels."""
    num_found = len(labels.unique() if labels.ndim == 1 else labels.any(dim=0).nonzero())
    if num_found < 2:
        raise UserError(f"{name}: {num_found} of {num_classes} classes with training images; a probe needs two")
    if k is not None and not 1 <= k <= len(labels):
        raise UserError(f"k is {k}; it must be 1 to {len(labels):,}, the training images of {name}")


def _hold_out(labels: Tensor) -> Tensor:
    """A mask (N,) of a tenth of each class, the same on every machine and for all names of files."""
    rows = [f"probe[{row}]" for row in range(len(labels))]
    held_out = torch.from_numpy(choose_validation(rows, labels.cpu().numpy(), HELD_OUT_FRACTION))
    if not held_out.any():
        raise UserError("no class has two training images, so none can be held out to choose the L2 strength")
    return held_out.to(labels.device)


def _metrics(scores: Tensor, labels: Tensor) -> Metrics:
    """Metrics of scores (M, K), of which only the order is used here."""
    metrics = Metrics(scores.shape[1], multilabel=labels.ndim == 2)
    metrics.update(scores, labels)
    return metrics


def _percent(value: float, interval: Interval | None) -> str:
    bounds = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else "unknown"
    return f"{100 * value:.1f} % (95 % interval {bounds})"
