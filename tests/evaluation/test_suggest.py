"""What is suggested for labeling is what the model is unsure of, without repeating itself, as a table for training."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.bundle import Bundle
from coatnet.cli.main import main
from coatnet.data.builtin import open_digits
from coatnet.data.open import open_dataset
from coatnet.data.transforms import Preprocessing
from coatnet.evaluation.probe import fit_linear
from coatnet.evaluation.suggest import certainty, pick
from coatnet.model.network import create_model


def test_one_image_at_the_middle_of_each_group_is_picked_the_most_doubtful_group_first() -> None:
    """Groups of unlike size far from each other: k-means finds them, whatever the seed."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(4), (40, 10, 30, 20))
    features = torch.from_numpy(100 * np.eye(4)[groups] + generator.normal(size=(100, 4))).float()
    sure = torch.tensor([0.99, 0.99, 0.99, 0.5])[groups]  # the last group is half as large as the first
    probabilities = torch.stack([sure, 1 - sure], dim=1)
    for seed in range(5):
        picked = pick(probabilities, features, 4, seed=seed)
        assert groups[picked].tolist() == [3, 0, 2, 1]
        for row in picked.tolist():  # of a group that is evenly unsure, the middle is the mean
            members = features[groups == groups[row]]
            spread = features.std(dim=0, correction=0)
            apart = ((members - members.mean(dim=0)) / spread).square().sum(dim=1)
            assert ((features[row] - members.mean(dim=0)) / spread).square().sum() <= apart.min() + 1e-4


def test_doubt_draws_the_middle_of_a_group_towards_it() -> None:
    features = torch.arange(5.0)[:, None]
    picked = [
        pick(torch.tensor([[p, 1 - p] for p in chances]), features, 1).item()
        for chances in ([0.8] * 5, [1.0, 1.0, 1.0, 1.0, 0.5])
    ]
    assert picked == [2, 3]


def test_copies_are_not_picked_twice_and_a_sure_image_is_not_the_first() -> None:
    probabilities = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.55, 0.45], [1.0, 0.0]])
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for seed in range(10):
        picked = pick(probabilities, features, 4, seed=seed).tolist()
        assert len(picked) == 3 and not {0, 1} <= set(picked) and picked[0] != 3
    np.testing.assert_allclose(certainty(probabilities), [0, 0, 0.1, 1], atol=1e-6)
    assert certainty(torch.tensor([[0.9, 0.4]]), multilabel=True) == pytest.approx(0.2)


def test_labels_that_are_suggested_beat_random_ones_on_digits() -> None:
    """On plain pixels: 30 labels, then 60 more, suggested or at random; errors on 600 other images, mean of 8 seeds."""
    dataset = open_digits(0.1).training
    features = torch.from_numpy(dataset.images.reshape(len(dataset), -1)).float() / 16
    labels, errors = torch.from_numpy(dataset.labels), {"suggested": [], "random": []}
    for seed in range(8):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
        pool, others = order[:1000], order[1000:]
        known = pool[:30]
        fitted = fit_linear(features[known], labels[known], 10, l2=1e-2)
        chosen = pick(fitted.scores(features[pool[30:]]).softmax(dim=1), features[pool[30:]], 60, seed=seed)
        for name, more in (("suggested", pool[30:][torch.from_numpy(chosen)]), ("random", pool[30:90])):
            learned = torch.cat([known, more])
            again = fit_linear(features[learned], labels[learned], 10, l2=1e-2)
            errors[name].append(float((again.scores(features[others]).argmax(dim=1) != labels[others]).float().mean()))
    assert np.mean(errors["suggested"]) < 0.8 * np.mean(errors["random"])  # 10.2 and 14.4 %


def test_the_table_names_each_image_once_and_training_takes_it_back(tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=2, in_channels=1, resolution=16)
    Bundle(model.eval(), ("one", "two"), Preprocessing(resolution=16, mean=(0.5,), std=(0.5,))).save(
        tmp_path / "bundle"
    )
    (tmp_path / "unlabeled").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"unlabeled/{number}.png")
    (tmp_path / "unlabeled/broken.png").write_bytes(b"")
    out = tmp_path / "ranked.csv"
    arguments = ["suggest", str(tmp_path / "bundle"), "--images", str(tmp_path / "unlabeled"), "--out", str(out)]
    assert main([*arguments, "--count", "4"]) == 1  # one cannot be read, and is named
    shown = capsys.readouterr()
    assert "12 images; the first 4 are those to label next" in shown.out and "broken.png" in shown.err
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["path"] for row in rows} == {f"unlabeled/{number}.png" for number in range(12)}
    assert list(rows[0]) == ["path", "label", "suggested", "score"] and {row["label"] for row in rows} == {""}
    assert {row["suggested"] for row in rows} <= {"one", "two"}
    scores = [float(row["score"]) for row in rows]
    assert scores[4:] == sorted(scores[4:]) and all(0 <= score <= 1 for score in scores)
    with out.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({**row, "label": ("cat", "dog")[number % 2]} for number, row in enumerate(rows))
    labeled = open_dataset(out)
    assert labeled.classes == ("cat", "dog") and len(labeled.training) + len(labeled.validation) == 12

    assert main(arguments) == 2 and "is there already" in capsys.readouterr().err
