"""How many wrong labels are found, and how much suggested labels are worth, on images of which the truth is known.

    python benchmarks/labels.py BUNDLE --data fashion-mnist-small --split all --seeds 5
    python benchmarks/labels.py BUNDLE --learn              # features of a network that learned from the wrong labels
    python benchmarks/labels.py BUNDLE --data digits --suggest --seeds 10

A twentieth of the labels is made wrong: to any other class at random, or to the class that looks most like the right
one. The features of the bundle are computed once. What the bundle was trained on decides how honest the figures are: it
must not have learned from the right labels of these images.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from idx import write_idx

from coatnet.bundle import load
from coatnet.data import open_dataset
from coatnet.evaluation import extract_features
from coatnet.evaluation.label_check import confident_suspects, judge, out_of_fold
from coatnet.evaluation.probe import fit_linear
from coatnet.evaluation.suggest import certainty, pick
from coatnet.training.recipes import named_recipe
from coatnet.training.run import train

WRONG = 0.05
ROUNDS, FIRST_LABELS = 4, 20


def confused_with(features: torch.Tensor, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """For each class the one that a probe takes most of its images for: (K,)."""
    predicted = out_of_fold(features, torch.from_numpy(labels), num_classes).numpy().argmax(axis=1)
    table = np.zeros((num_classes, num_classes), int)
    np.add.at(table, (labels, predicted), 1)
    np.fill_diagonal(table, -1)
    return table.argmax(axis=1)


def with_wrong_labels(labels: np.ndarray, num_classes: int, alike: np.ndarray | None, seed: int) -> np.ndarray:
    """The labels with a twentieth of them wrong: at random, or as the class that looks alike."""
    generator = np.random.default_rng(seed)
    rows = generator.choice(len(labels), round(WRONG * len(labels)), replace=False)
    given = labels.copy()
    others = (labels[rows] + generator.integers(1, num_classes, len(rows))) % num_classes
    given[rows] = others if alike is None else alike[labels[rows]]
    return given


def find_wrong_labels(features: torch.Tensor, labels: np.ndarray, num_classes: int, seeds: int, *, learn: bool) -> None:
    """Print precision and recall at the number of wrong labels, and those of the suspects."""
    for name, alike in (("at random", None), ("as a similar class", confused_with(features, labels, num_classes))):
        found = []
        for seed in range(seeds):
            given = with_wrong_labels(labels, num_classes, alike, seed)
            wrong = given != labels
            if learn:
                with TemporaryDirectory() as folder:
                    run = learn_wrong_labels(given, Path(folder))
                    features = extract_features(run, "fashion-mnist-small", split="training").gather()[0]
            probabilities = judge(features, torch.from_numpy(given), num_classes)[1].numpy()
            suspected, suggested, scores = confident_suspects(probabilities, given)
            first = np.argsort(scores, kind="stable")[: wrong.sum()]
            right = (suggested[suspected & wrong] == labels[suspected & wrong]).mean()
            found.append((wrong[first].mean(), wrong[suspected].mean(), suspected[wrong].mean(), right))
        columns = [f"{np.mean(column):.3f} (sd {np.std(column):.3f})" for column in zip(*found, strict=True)]
        print(
            f"{WRONG:.0%} wrong {name}, n = {len(labels):,}, seeds: {seeds}: precision = recall at their number "
            f"{columns[0]}; suspects: precision {columns[1]}, recall {columns[2]}, suggestion right {columns[3]}"
        )


def learn_wrong_labels(given: np.ndarray, folder: Path) -> Path:
    """Train on fashion-mnist-small with other labels, written as IDX files; return the run folder."""
    splits = open_dataset("fashion-mnist-small")
    data = folder / "data"
    data.mkdir()
    for name, part, labels in (
        ("train", splits.training, given),
        ("t10k", splits.validation, splits.validation.labels),
    ):
        write_idx(data, name, np.stack([part.read(row)[0] for row in range(len(part))]), labels)
    train(named_recipe("fashion-mnist", {"data": str(data), "model": "coatnet-femto-64", "epochs": 6}), folder / "run")
    return folder / "run"


def label_by_suggestion(
    features: torch.Tensor, labels: np.ndarray, others: torch.Tensor, truth: np.ndarray, num_classes: int, seeds: int
) -> None:
    """Print accuracy on the held-out images after each round that doubles the labels, suggested or at random."""
    given, errors = torch.from_numpy(labels), {"suggested": [], "at random": []}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(labels))
        for how, found in errors.items():
            known, accuracies = order[:FIRST_LABELS], []
            for _ in range(ROUNDS + 1):
                fitted = fit_linear(features[known], given[known], num_classes, l2=1e-2)
                accuracies.append(float((fitted.scores(others).argmax(dim=1).numpy() == truth).mean()))
                rest = np.setdiff1d(order, known)
                if how == "suggested":
                    probabilities = fitted.scores(features[rest]).softmax(dim=1)
                    picked = pick(probabilities, features[rest], len(known), seed=seed)
                    others_by_doubt = np.setdiff1d(certainty(probabilities).argsort(), picked, assume_unique=True)
                    chosen = rest[np.concatenate([picked, others_by_doubt])[: len(known)]]
                else:
                    chosen = order[len(known) : 2 * len(known)]
                known = np.concatenate([known, chosen])
            found.append(accuracies)
    for number in range(ROUNDS + 1):
        one, other = (100 * np.array(errors[how])[:, number] for how in errors)
        print(
            f"{FIRST_LABELS * 2**number} labels: suggested {one.mean():.1f} %, random {other.mean():.1f} %, difference "
            f"{(one - other).mean():.1f} (sd {(one - other).std(ddof=1):.1f}, {seeds} seeds, n = {len(truth):,})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--data", default="fashion-mnist-small")
    parser.add_argument("--split", choices=("training", "validation", "all"), help="whose labels (all)")
    parser.add_argument("--suggest", action="store_true", help="measure suggestions instead, on the validation split")
    parser.add_argument("--learn", action="store_true", help="train on the wrong labels of fashion-mnist-small")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    if given.learn and (given.data != "fashion-mnist-small" or given.split or given.suggest):
        parser.error("--learn is for the training images of fashion-mnist-small: no other --data, --split or --suggest")
    if given.suggest and given.split not in (None, "training"):
        parser.error("--suggest labels images of the training split: leave --split out")
    bundle = load(given.bundle)
    split = "training" if given.suggest or given.learn else given.split or "all"
    extracted = extract_features(bundle, given.data, split=split)
    features, labels, _ = extracted.gather()
    num_classes = len(extracted.classes)
    if not given.suggest:
        find_wrong_labels(features, labels.numpy(), num_classes, given.seeds, learn=given.learn)
        return
    others, truth, _ = extract_features(bundle, given.data, split="validation").gather()
    label_by_suggestion(features, labels.numpy(), others, truth.numpy(), num_classes, given.seeds)


if __name__ == "__main__":
    main()
