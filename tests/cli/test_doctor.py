"""`coatnet doctor`: tables that training takes back, a page with images, and JSON."""

import csv
import importlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.bundle import Bundle
from coatnet.cli.main import main
from coatnet.data.open import open_dataset
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError
from coatnet.evaluation import findings
from coatnet.model.network import create_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=2, in_channels=1, resolution=16)
    folder = tmp_path_factory.mktemp("model") / "bundle"
    Bundle(model.eval(), ("one", "two"), Preprocessing(resolution=16, mean=(0.5,), std=(0.5,))).save(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 dark and 40 light images, of which two are in the wrong folder and one has a name that is markup."""
    root = tmp_path / "images"
    for number in range(80):
        light = number % 2
        place = root / ("light" if light != (number in (4, 7)) else "dark")
        place.mkdir(parents=True, exist_ok=True)
        pixels = 40 + 150 * light + np.random.default_rng(number).integers(0, 40, (16, 16))
        name = f"{number}<script>alert(1)<!--.png" if number == 4 else f"{number}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(place / name)
    return root


def test_suspects_go_to_a_table_that_training_takes_back_and_to_a_page(folder, bundle, tmp_path, capsys) -> None:
    table, page = tmp_path / "fixed.csv", tmp_path / "page.html"
    arguments = [str(folder), "--labels", "--model", str(bundle), "--write", str(table), "--html", str(page)]
    assert main(["doctor", *arguments]) == 0
    shown = capsys.readouterr().out
    assert (
        "2 images whose label looks wrong\n" in shown and "light/4<script>alert(1)<!--.png: light, rather dark" in shown
    )

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "suggested", "score", "split"] and len(rows) == 80
    assert {row["path"] for row in rows[:2]} == {"images/light/4<script>alert(1)<!--.png", "images/dark/7.png"}
    assert [row["suggested"] for row in rows] == [rows[0]["suggested"], rows[1]["suggested"], *[""] * 78]
    before, after = open_dataset(folder), open_dataset(table)
    for split in ("training", "validation"):
        names = [
            {getattr(each, split).path(index) for index in range(len(getattr(each, split)))} for each in (before, after)
        ]
        assert names[0] == names[1]
    assert "columns that are not used: suggested, score" in after.describe()
    for row in rows[:2]:
        row["label"] = row["suggested"]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    corrected = open_dataset(table)
    assert np.bincount(np.r_[corrected.training.labels, corrected.validation.labels]).tolist() == [40, 40]

    text = page.read_text()
    assert "<script" not in text and "4&lt;script&gt;" in text and "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'; img-src data:" in text
    assert text.index("light, rather dark") and text.count("data:image/webp;base64,") >= 2


def test_a_model_that_cannot_judge_is_refused_before_images_are_read(folder, bundle, monkeypatch, capsys) -> None:
    monkeypatch.setattr("coatnet.data.inspection.inspect", lambda *_, **__: pytest.fail("images were read"))
    assert main(["doctor", str(folder), "--labels", "--model", str(bundle.parent / "bundel")]) == 2
    assert "bundel" in capsys.readouterr().err
    table = folder / "several.csv"
    table.write_text("path,labels\n" + "".join(f"light/{number}.png,a;b\n" for number in range(1, 4, 2)))
    assert main(["doctor", str(table), "--labels", "--model", str(bundle)]) == 2
    assert "images have several labels" in capsys.readouterr().err


def test_findings_are_printed_where_labels_cannot_be_judged(make_images, bundle, capsys) -> None:
    root = make_images({"a": 3, "b": 1})
    assert main(["doctor", str(root), "--labels", "--model", str(bundle)]) == 2
    out, err = capsys.readouterr()
    assert "4 images" in out and "coatnet: error: " in err


def test_labels_of_a_test_split_have_no_score(folder, bundle, tmp_path, capsys) -> None:
    rows = [
        (path.relative_to(folder), path.parent.name, number) for number, path in enumerate(sorted(folder.glob("*/*")))
    ]
    table = folder / "given.csv"
    table.write_text(
        "path,label,split\n"
        + "".join(f"{name},{label},{('test', 'val', 'train', 'train')[number % 4]}\n" for name, label, number in rows)
    )
    fixed = folder / "fixed.csv"
    assert main(["doctor", str(table), "--labels", "--model", str(bundle), "--write", str(fixed)]) in (0, 1)
    with fixed.open() as file:
        written = list(csv.DictReader(file))
    assert {row["split"] for row in written if row["score"] == ""} == {"test"}
    assert not any(row["score"] for row in written if row["split"] == "test")


def test_json_has_all_findings(folder, bundle, capsys) -> None:
    assert main(["doctor", str(folder), "--labels", "--model", str(bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] and found["sizes"]["num_sampled"] == 80 and found["sizes"]["complete"]
    assert {each["name"].split("/")[1][0] for each in found["labels"]["suspects"]} == {"4", "7"}
    assert {each["property"] for each in found["shortcuts"]} == {"brightness"}


def test_a_clean_table_is_without_copies_leaks_and_unreadable_images(make_images, tmp_path, capsys) -> None:
    root = make_images({"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    (root / "train/a/again.png").write_bytes((root / "train/a/0.png").read_bytes())
    (root / "val/b/leak.png").write_bytes((root / "train/b/1.png").read_bytes())
    (root / "train/b/wrong.png").write_bytes((root / "train/a/1.png").read_bytes())
    (root / "val/a/broken.png").write_bytes(b"")
    assert main(["doctor", str(root), "--write", str(tmp_path / "clean.csv")]) == 1
    assert "2 a copy under another label" in capsys.readouterr().out
    splits = open_dataset(tmp_path / "clean.csv")
    names = [splits.training.describe(index) for index in range(len(splits.training))]
    assert names == [f"images/train/{name}.png" for name in ("a/0", "a/2", "b/0", "b/2")]
    names = [splits.validation.describe(index) for index in range(len(splits.validation))]
    assert names == [f"images/val/{name}.png" for name in ("a/0", "a/1", "b/0", "b/1", "b/leak")]


@pytest.fixture
def make_images(tmp_path):
    def make_images(counts: dict[str, int]) -> Path:
        for number, (name, count) in enumerate(counts.items()):
            (tmp_path / "images" / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng((number, index)).integers(0, 256, (12, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
        return tmp_path / "images"

    return make_images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--labels"], "--labels needs --model: a bundle of your own"),
        (["digits", "--model", "runs/mine"], "--model is for --labels"),
        (["digits", "--write", "all.parquet"], "--write all.parquet is no .csv"),
        (["digits", "--html", "all.csv"], "--html all.csv is no .html"),
        (["digits", "--write", "all.csv"], "digits: --write names files of images, and these have none of their own"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys) -> None:
    assert main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_table_names_only_images_that_it_can_give_back(make_images, tmp_path, capsys) -> None:
    root = make_images({"a|b": 2, "c": 2})
    assert main(["doctor", str(root), "--write", str(tmp_path / "clean.csv")]) == 2
    assert "would be read as" in capsys.readouterr().err
    (root / "a|b").rename(root / "a")
    (tmp_path / "elsewhere").mkdir()
    assert main(["doctor", str(root), "--write", str(tmp_path / "elsewhere/clean.csv")]) == 2
    assert f"these lie in {root}" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.csv"))
    (tmp_path / "mine.csv").write_text("path,label,note\na.png,a,mine\n")
    assert main(["doctor", str(root), "--write", str(tmp_path / "mine.csv")]) == 2
    assert "mine.csv is there already" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text().endswith("mine\n")


def test_where_a_table_cannot_be_written_is_told_before_images_are_read(
    make_images, tmp_path, monkeypatch, capsys
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("images were read")

    root = make_images({"a": 2, "b": 2})
    (tmp_path / "elsewhere").mkdir()
    for name, function in (("data.inspection", "inspect"), ("evaluation.suggest", "suggest")):
        monkeypatch.setattr(importlib.import_module(f"coatnet.{name}"), function, refuse)
    table = str(tmp_path / "elsewhere" / "table.csv")
    assert main(["doctor", str(root), "--write", table]) == 2
    assert main(["suggest", "a-bundle", "--images", str(root), "--out", table]) == 2

    capsys.readouterr()
    table = str(tmp_path / "table.csv")
    odd = root / "a" / os.fsdecode(b"caf\xe9.png")
    (root / "a/0.png").rename(odd)
    for command in (["doctor", str(root), "--write"], ["suggest", "a-bundle", "--images", str(root), "--out"]):
        assert main([*command, table]) == 2
        assert r"the name 'images/a/caf\\xe9.png' is not UTF-8, as a table is" in capsys.readouterr().err
    odd.rename(root / "a/ 0.png")
    assert main(["suggest", "a-bundle", "--images", str(root / "a"), "--out", str(root / "a/table.csv")]) == 2
    assert "' 0.png' would be read as '0.png': rename it first" in capsys.readouterr().err
    for name, message in (
        ("a;b", "the class 'a;b' would be read as 'a' and 'b': rename it first"),
        ("nan", "the class 'nan' would be read as a missing value: rename it first"),
        (" a", "the class ' a' would be read as 'a': rename it first"),
    ):
        (root / "a").rename(root / name)
        assert main(["doctor", str(root), "--write", table]) == 2
        assert message in capsys.readouterr().err
        (root / name).rename(root / "a")


def test_what_was_found_is_told_where_it_cannot_be_written(make_images, tmp_path, monkeypatch, capsys) -> None:
    def refuse(*_: object) -> None:
        raise UserError("no space left")

    root = make_images({"a": 2, "b": 2})
    monkeypatch.setattr("coatnet.evaluation.findings.write_table", refuse)
    assert main(["doctor", str(root), "--write", str(tmp_path / "table.csv")]) == 2
    shown = capsys.readouterr()
    assert shown.out.endswith("healthy\n") and "no space left" in shown.err


def test_pairs_of_any_two_splits_are_shown_apart(tmp_path, monkeypatch) -> None:
    for number, name in enumerate(("train/a/0", "train/a/1", "train/b/0", "val/a/0", "val/b/0", "test/a/0")):
        seed = 1 if name == "test/a/0" else number
        pixels = np.random.default_rng(seed).integers(20, 230, (4, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + np.uint8(seed != number)).save(tmp_path / f"{name}.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["doctor", str(tmp_path), "--html", "~/page.html"]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<h2>Nearly the same, in two splits (1)</h2>" in text and "test/a/0.png (test: a)" in text


def test_a_page_of_very_many_images_stays_below_ten_megabytes(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    entries = (findings.Entry([noise], ["a" * 200]) for _ in range(5000))
    findings.write_image_page(tmp_path / "page.html", "<b>many", [findings.Section("all", 5000, entries)])
    text = (tmp_path / "page.html").read_text()
    shown = text.count("<li><img")
    assert 5_000_000 < len(text) < 10_000_000
    assert int(re.search(r"<p>([\d,]+) more are not shown here", text)[1].replace(",", "")) == 5000 - shown
    assert "&lt;b&gt;many" in text
