"""Images whose labels look wrong, images unlike all others, and classes that look the same: from features of a model.

Labels are judged by confident learning (Northcutt et al., 2021, arXiv:1911.00068) on probabilities that linear probes
give to images they were not fitted to. Shapes: N images, D features, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.data.splits import Splits, assign_folds
from coatnet.errors import UserError, counted, cut, one_line
from coatnet.evaluation.features import extract_features
from coatnet.evaluation.metrics import wilson_interval
from coatnet.evaluation.probe import Opened, fit_linear, open_for_probe
from coatnet.system.progress import track

NUM_FOLDS = 5
NUM_NEIGHBORS = 10
MAX_REFERENCES = 20_000  # chosen: as many images are the possible neighbors of each; 512 features take a minute
FAR_OUT = 3.0  # times the distance of the quartiles, above the upper one: Tukey's rule, on logarithms
LOOK_SAME = 0.1  # least share of two classes' images that are taken for the other one to call them alike
MAX_LISTED = 20


@dataclass(frozen=True)
class Suspect:
    """An image whose label looks wrong.

    Attributes:
        name: of the image.
        split: training or validation.
        label: name of its class.
        suggested: name of the class that is likelier.
        score: the probability of the label; 0 is certainly wrong.
    """

    name: str
    split: str
    label: str
    suggested: str
    score: float


@dataclass(frozen=True, eq=False)
class LabelCheck:
    """What `check_labels` found.

    Attributes:
        model: where the features are from.
        num_images: that were judged.
        accuracy: of the linear probe on images it was not fitted to, against the labels as they are.
        suspects: worst first.
        outliers: name of each image unlike all others, and its distance in units of the median; farthest first.
        alike: pairs of classes, and the share of their images that are taken for the other class; highest first.
        scores: of every image that was judged, by split and name.
    """

    model: str
    num_images: int
    accuracy: float
    suspects: tuple[Suspect, ...]
    outliers: tuple[tuple[str, str, float], ...]
    alike: tuple[tuple[str, str, float], ...]
    scores: Mapping[tuple[str, str], float]

    def describe(self) -> str:
        """The findings in lines, worst first."""
        lines = [
            f"labels of {counted(self.num_images, 'image')} by a linear probe on features of {self.model}, which is "
            f"right for {100 * self.accuracy:.1f} % of images it was not fitted to"
        ]
        lines += _section(
            "whose label looks wrong",
            [f"{each.name}: {each.label}, rather {each.suggested} ({each.score:.3f})" for each in self.suspects],
        )
        lines += _section(
            "unlike all others", [f"{name}: {far:.1f} times as far as usual" for _, name, far in self.outliers]
        )
        lines += [
            f"classes that look the same: {one} and {other}, {100 * share:.0f} % of both taken for the other"
            for one, other, share in self.alike
        ]
        lines.append(
            "  training takes all of these as they are: look at them (--html), and correct the column label of --write"
        )
        return "\n".join(cut(one_line(line)) for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it but the scores of images that are not suspected, as plain values."""
        return {
            "model": self.model,
            "images": self.num_images,
            "accuracy": self.accuracy,
            "suspects": [vars(each) for each in self.suspects],
            "outliers": [{"name": name, "split": split, "distance": far} for split, name, far in self.outliers],
            "alike": [{"classes": [one, other], "share": share} for one, other, share in self.alike],
        }


def check_labels(
    bundle: Bundle | str | Path, splits: Splits, *, device: str | None = None, batch_size: int = 64
) -> LabelCheck:
    """Look for wrong labels in both splits together.

    Args:
        bundle: whose features are used: a bundle, its folder, its id on the hub, or "auto".
        splits: the images, one label each; their classes need not be the model's.
        device: as in `evaluate`.
        batch_size: images computed together.

    Raises:
        UserError: images have several labels, fewer than two classes have enough images, or as `extract_features`.
    """
    return check_opened(open_for_labels(bundle, splits, device), batch_size=batch_size)


def open_for_labels(bundle: Bundle | str | Path, splits: Splits, device: str | None) -> Opened:
    """Open the model for `check_labels`, which refuses these images or this model before any image is read."""
    if splits.multilabel:
        raise UserError(f"{splits.name}: images have several labels; labels are checked where each image has one")
    return open_for_probe(bundle, splits, device)


def check_opened(opened: Opened, *, batch_size: int = 64) -> LabelCheck:
    """`check_labels` with a model that is open."""
    source, bundle, splits, _ = opened
    parts = []
    for split in ("training", "validation"):
        if len(getattr(splits, split)):
            found = extract_features(bundle, splits, split=split, batch_size=batch_size).gather()
            parts.append((*found, split))
    where = next(bundle.model.parameters()).device
    features = torch.cat([part[0] for part in parts]).to(where)
    labels = torch.cat([part[1] for part in parts]).to(where)
    names = [(part[3], name) for part in parts for name in part[2]]
    probabilities, judged = (each.cpu().numpy() for each in judge(features, labels, len(splits.classes)))
    distances = neighbor_distances(features).cpu().numpy()
    labels = labels.cpu().numpy()
    suspected, suggested, scores = confident_suspects(judged, labels)

    worst = [row for row in np.argsort(scores, kind="stable").tolist() if suspected[row]]
    far = np.flatnonzero(far_out(distances))
    return LabelCheck(
        model=source,
        num_images=len(names),
        accuracy=float((probabilities.argmax(axis=1) == labels).mean()),
        suspects=tuple(
            Suspect(
                names[row][1],
                names[row][0],
                splits.classes[labels[row]],
                splits.classes[suggested[row]],
                round(float(scores[row]), 6),
            )
            for row in worst
        ),
        outliers=tuple(
            (*names[row], round(float(distances[row] / max(np.median(distances), 1e-6)), 3))
            for row in far[np.argsort(-distances[far], kind="stable")].tolist()
        ),
        alike=tuple(_alike(probabilities, labels, splits.classes)),
        scores=dict(zip(names, scores.tolist(), strict=True)),
    )


def judge(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Probabilities of two linear probes, each for images that it was not fitted to.

    The first learns from all labels, the second from those that the first does not suspect: a probe that has learned
    wrong labels believes others of their kind, most of all where classes look alike.

    Args:
        features: (N, D).
        labels: (N,).
        num_classes: K.

    Returns:
        Those of the first, and the geometric mean of both, (N, K) each.

    Raises:
        UserError: fewer than two classes have two images.
    """
    l2 = choose_l2(features, labels, num_classes)
    first = out_of_fold(features, labels, num_classes, l2=l2)
    suspected = torch.from_numpy(confident_suspects(first.cpu().numpy(), labels.cpu().numpy())[0]).to(labels.device)
    # A class of which most is suspected would be lost.
    counts, doubted = (each.bincount(minlength=num_classes) for each in (labels, labels[suspected]))
    left_out = suspected & (2 * doubted <= counts)[labels]
    second = out_of_fold(features, labels, num_classes, l2=l2, left_out=left_out)
    return first, ((first.clamp(min=1e-12).log() + second.clamp(min=1e-12).log()) / 2).softmax(dim=1)


def choose_l2(features: Tensor, labels: Tensor, num_classes: int) -> float:
    """The L2 strength of probes, chosen with all images, which tells nothing of one label.

    Raises:
        UserError: fewer than two classes have two images.
    """
    if (labels.bincount(minlength=num_classes) >= 2).sum() < 2:
        raise UserError("labels are checked with two classes of two images or more; there are fewer")
    return fit_linear(features, labels, num_classes).l2


def out_of_fold(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    l2: float | None = None,
    left_out: Tensor | None = None,
) -> Tensor:
    """Probabilities (N, K), for each image from a linear probe that is fitted to the other folds.

    Classes are spread evenly over the folds.

    Args:
        features: (N, D).
        labels: (N,).
        num_classes: K.
        l2: strength of the probes; None is that of `choose_l2`.
        left_out: images that no probe is fitted to, a mask (N,).

    Raises:
        UserError: fewer than two classes have two images.
    """
    l2 = choose_l2(features, labels, num_classes) if l2 is None else l2
    rows = [f"fold[{row}]" for row in range(len(labels))]
    folds = torch.from_numpy(assign_folds(rows, labels.cpu().numpy(), NUM_FOLDS)).to(labels.device)
    learned = torch.ones_like(labels, dtype=torch.bool) if left_out is None else ~left_out
    probabilities = torch.empty(len(labels), num_classes, device=features.device)
    for fold in track(range(NUM_FOLDS), "judging labels", NUM_FOLDS):
        held_out = folds == fold
        if held_out.any():
            rows = learned & ~held_out
            fitted = fit_linear(features[rows], labels[rows], num_classes, l2=l2)
            probabilities[held_out] = fitted.scores(features[held_out]).softmax(dim=1)
    return probabilities


def confident_suspects(
    probabilities: NDArray[np.floating], labels: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.floating]]:
    """Find the labels that are confidently another class: off the diagonal of the confident joint.

    An image counts for a class if its probability reaches the mean of the images that have this label. Of several
    such classes the likeliest is taken; images whose label is the likeliest class of all are never suspected.

    Args:
        probabilities: of each class for images that were not learned from, (N, K).
        labels: (N,).

    Returns:
        A mask of the suspects, the class that each image is rather of, and its score, all (N,): the probability of its
        label, cleanlab's self-confidence.
    """
    rows, num_classes = np.arange(len(labels)), probabilities.shape[1]
    given = probabilities[rows, labels]
    counts = np.bincount(labels, minlength=num_classes)
    means = np.bincount(labels, weights=given, minlength=num_classes) / np.maximum(counts, 1)
    thresholds = np.where(counts > 0, means, 2.0)  # no image is of a class that has none
    confident = probabilities >= thresholds - 1e-6  # as cleanlab compares
    likeliest = probabilities.argmax(axis=1)
    suggested = np.where(confident.sum(axis=1) > 1, likeliest, confident.argmax(axis=1))
    suspected = confident.any(axis=1) & (suggested != labels) & (likeliest != labels)
    return suspected, suggested, given


def neighbor_distances(features: Tensor, k: int = NUM_NEIGHBORS) -> Tensor:
    """Mean cosine distance (N,) of images to their k nearest others; of many images, a sample is the others."""
    features = F.normalize(features, dim=1)
    step = -(-len(features) // MAX_REFERENCES)
    references = features[::step]
    k = min(k, len(references) - 1)
    distances = []
    for first, part in zip(range(0, len(features), 1024), features.split(1024), strict=True):
        similarity = part @ references.T
        rows = torch.arange(first, first + len(part), device=part.device)
        own = rows % step == 0
        similarity[own.nonzero().flatten(), rows[own] // step] = -2.0  # an image is not its own neighbor
        distances.append((1 - similarity.topk(k, dim=1).values).mean(dim=1))
    return torch.cat(distances).clamp(min=0)


def far_out(distances: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which distances (N,) are far above the others, by Tukey's rule on their logarithms."""
    logarithms = np.log(distances + 1e-6)
    lower, upper = np.quantile(logarithms, (0.25, 0.75))
    return logarithms > upper + FAR_OUT * (upper - lower)


def _alike(
    probabilities: NDArray[np.floating], labels: NDArray[np.int64], classes: Sequence[str]
) -> list[tuple[str, str, float]]:
    """Pairs of classes of which at least a tenth of the images is taken for the other, beyond doubt."""
    predicted = probabilities.argmax(axis=1)
    wrong, counts = predicted != labels, np.bincount(labels, minlength=len(classes))
    ends = np.sort(np.stack([labels[wrong], predicted[wrong]], axis=1), axis=1)
    found = []
    for (one, other), number in zip(*np.unique(ends, axis=0, return_counts=True), strict=True):
        total = int(counts[one] + counts[other])
        if wilson_interval(int(number), total)[0] > LOOK_SAME:
            found.append((classes[one], classes[other], round(number / total, 4)))
    return sorted(found, key=lambda pair: -pair[2])


def _section(what: str, entries: list[str]) -> list[str]:
    more = [f"  and {len(entries) - MAX_LISTED:,} more"] if len(entries) > MAX_LISTED else []
    return [f"{counted(len(entries), 'image')} {what}", *(f"  {each}" for each in entries[:MAX_LISTED]), *more]
