"""Runs on the same images: paired intervals, disagreements, runs of earlier releases, the list of runs."""

import io
import json
import math
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tests.evaluation.test_report import report_of
from tests.training.trainers import RecordingConsole

from coatnet.cli.main import main
from coatnet.data.datasets import ArrayDataset
from coatnet.data.open import open_dataset
from coatnet.errors import UserError
from coatnet.evaluation.compare import compare, describe, open_run
from coatnet.evaluation.metrics import mcnemar, wilson_interval
from coatnet.evaluation.predictions import (
    Predictions,
    find_duplicates,
    find_slices,
    read_array,
    read_predictions,
    read_properties,
)
from coatnet.evaluation.report_html import to_html
from coatnet.evaluation.report_markdown import to_markdown, write_report
from coatnet.system.document import Table, print_table
from coatnet.training.config import Recipe
from coatnet.training.run import train


def predictions_of(predicted: list[str], truth: str = "aabbccaabb", start: int = 0) -> Predictions:
    images = tuple(f"folder/{start + number}.png" for number in range(len(predicted)))
    probability = np.linspace(0.5, 0.9, len(predicted))
    return Predictions(images, tuple(truth), tuple(predicted), probability, -np.log(probability))


def write_run(folder: Path, predicted: str, start: int = 0, truth: str = "aabbccaabb", **recipe: object) -> Path:
    """The files of a finished run, as far as a comparison reads them."""
    report = replace(report_of(("a", "b", "c")), predictions=predictions_of(list(predicted), truth, start))
    write_report(report, folder)
    (folder / "bundle").mkdir()
    (folder / "bundle" / "config.json").write_text(json.dumps({"record": {"recipe": recipe}}))
    (folder / "recipe.yaml").write_text("data: digits\nmodel: coatnet-femto-16\n")
    lines = [{"step": 5, "epoch": 0.5, "nll": 1.0, "top1": 0.5}, {"step": 9, "epoch": 1.0, "loss": 2.0, "seconds": 90}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def never(folder: Path) -> None:
    raise AssertionError(f"{folder} was evaluated again")


def test_mcnemar_is_the_binomial_test() -> None:
    for gained, lost in ((0, 0), (5, 0), (2, 7), (30, 30), (10, 31)):
        n, least = gained + lost, min(gained, lost)
        exact = sum(math.comb(n, k) for k in range(least + 1)) / 2 ** max(n - 1, 0)
        assert mcnemar(gained, lost) == pytest.approx(min(1.0, exact))
    assert 0 <= mcnemar(49_000, 51_000) < 1e-8


def test_runs_are_compared_image_by_image(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", "aabbccbbbb", optimizer={"lr": 0.1, "betas": [0.9]}, seed=0)
    second = write_run(tmp_path / "second", "aabbcaaabb", optimizer={"lr": 0.2, "betas": [0.9]}, seed=0)
    found = compare([open_run(path, never) for path in (first, second)])
    (difference,) = found.differences
    assert (difference.gained, difference.lost, difference.difference) == (2, 1, pytest.approx(0.1))
    low, high = difference.interval
    assert low < 0 < high and "not distinguishable" in describe(difference)
    # One of two that differ is right on each; the surest of them first: image 7 with 0.81, 6 with 0.77, 5 with 0.72.
    assert [found.images[number] for number in found.disagreements] == [f"folder/{n}.png" for n in (7, 6, 5)]
    assert sorted(found.images[number] for number in found.disagreements) == [f"folder/{n}.png" for n in (5, 6, 7)]
    assert found.settings == {"optimizer.lr": (0.1, 0.2)}
    # A folder of `evaluate --out` has no configuration: nothing differs from it.
    bare = replace(found.runs[1], name="bare", recipe={})
    assert compare([*found.runs, bare]).settings == {"optimizer.lr": (0.1, 0.2, None)}
    assert compare([found.runs[0], bare]).settings == {}
    flipped = replace(bare, report={**bare.report, "views": "flip"})
    between = compare([bare, flipped])
    assert between.settings == {"views": ("one", "flip")}
    said = str(between.document())  # of one of the runs no recipe is known, which the views do not hide
    assert "'views', 'one', 'flip'" in said and "There is none of" in said
    assert "There is none of bare." in compare([found.runs[0], bare]).document().to_markdown()
    plain = json.loads(found.to_json())
    assert plain["differences"][0]["map_difference"] is None and "average precision" not in describe(difference)
    assert plain["differences"][0]["gained"] == 2 and plain["n"] == 10
    assert {"image": "folder/5.png", "truth": "c", "predicted": ["c", "a"]} in plain["disagreements"]


def test_a_likelier_truth_is_a_lower_negative_log_likelihood(tmp_path: Path) -> None:
    first, second = (open_run(write_run(tmp_path / name, "aabbccbbbb"), never) for name in ("first", "second"))
    nll = second.predictions.nll - np.linspace(0.2, 0.4, 10)
    better = replace(second, predictions=replace(second.predictions, nll=nll))
    for runs, sign in (((first, better), -1), ((better, first), 1)):
        (difference,) = compare(list(runs)).differences
        assert difference.nll_difference == pytest.approx(0.3 * sign)
        assert 0.2 < min(sign * bound for bound in difference.nll_interval) < 0.3


@pytest.mark.slow
def test_runs_of_several_labels_and_large_photographs_are_compared(tmp_path: Path, capsys) -> None:
    """Real runs: what is counted is said, no labels are called nothing, and a run without answers is measured again."""
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    rows = ["path,label"]
    for number in range(24):
        size = (1200, 1600) if number % 8 == 0 else (12, 16)
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"images/{number}.jpg")
        rows.append(f"images/{number}.jpg,{('', 'a', 'b', 'a;b')[number % 4]}")
    (tmp_path / "data.csv").write_text("\n".join(rows))
    runs = []
    for seed in (0, 1):
        recipe = Recipe(data=str(tmp_path / "data.csv"), model="coatnet-femto-16", resolution=8, epochs=0.2, seed=seed,
                        batch_size=8, num_workers=0, validation_fraction=0.5)  # fmt: skip
        report = train(recipe, tmp_path / f"run{seed}", console=RecordingConsole())
        runs.append(tmp_path / f"run{seed}")
    assert report.multilabel and "heat_maps" not in report.to_dict() and len(report.heat_maps) == len(report.mistakes)
    found = compare([open_run(run, never) for run in runs])
    page = found.to_html()
    assert "all labels right on these" in page and "points all labels right (95 % interval" in page
    assert "nothing" in page and "mean average precision" in page
    # The difference of mean average precisions is that of the reports; of a run against itself it is exactly 0.
    (difference,) = found.differences
    precisions = [run.report["figures"]["mean_average_precision"] for run in found.runs]
    assert difference.map_difference == pytest.approx(precisions[1] - precisions[0], abs=1e-6)
    low, high = difference.map_interval
    assert low <= difference.map_difference <= high and "Mean average precision" in describe(difference)
    (same,) = compare([found.runs[0], found.runs[0]]).differences
    assert same.map_difference == 0 and same.map_interval is None and "not distinguishable" in describe(same)
    (runs[0] / "probabilities.npy").rename(runs[0] / "kept.npy")
    assert main(["compare", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Mean average precision is not compared: no probabilities.npy in") == 1
    (runs[0] / "probabilities.npy").write_bytes((runs[0] / "kept.npy").read_bytes()[:-4])
    assert compare([open_run(run, never) for run in runs]).differences[0].map_difference is None
    (runs[0] / "kept.npy").rename(runs[0] / "probabilities.npy")
    html = (runs[0] / "report.html").read_text()
    assert len(html) < 1_000_000 and "Held-out mean average precision" in html
    (runs[1] / "predictions.csv").unlink()
    assert main(["compare", *map(str, runs), "--json", "--out", str(tmp_path / "page.html")]) == 0
    (again,) = json.loads(capsys.readouterr().out)["differences"]
    assert again["gained"] == found.differences[0].gained
    assert again["map_difference"] == pytest.approx(difference.map_difference, abs=1e-5)
    assert again["nll_difference"] == pytest.approx(found.differences[0].nll_difference, abs=1e-5)
    assert (tmp_path / "page.html").read_text().count("data:image/webp") == len(found.disagreements)


def test_one_common_image_has_no_interval(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name, "aaa", start, "aaa") for name, start in (("one", 0), ("two", 2)))
    found = compare([open_run(path, never) for path in (first, second)])
    (difference,) = json.loads(found.to_json(), parse_constant=pytest.fail)["differences"]
    assert difference["nll_interval"] is None and "Negative log-likelihood" in describe(found.differences[0])


def test_four_images_that_differ_in_one_direction_are_no_better(tmp_path: Path) -> None:
    truth = "a" * 20
    runs = [
        write_run(tmp_path / name, given, truth=truth) for name, given in (("one", "b" * 4 + "a" * 16), ("two", truth))
    ]
    found = compare([open_run(path, never) for path in runs])
    assert found.differences[0].interval[0] > 0 and "not distinguishable" in describe(found.differences[0])


def test_only_images_that_all_runs_held_out_count(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", "aabbccaabb")
    later = write_run(tmp_path / "later", "bbbbbbbbbb", start=4, truth="ccaabbbbbb")
    found = compare([open_run(path, never) for path in (first, later)])
    assert found.images == tuple(f"folder/{number}.png" for number in range(4, 10))
    elsewhere = write_run(tmp_path / "elsewhere", "aabbccaabb", start=100)
    with pytest.raises(UserError, match="no held-out image in common"):
        compare([open_run(path, never) for path in (first, elsewhere)])
    renamed = write_run(tmp_path / "renamed", "aabbccaabb", truth="bbbbccaabb")
    with pytest.raises(UserError, match=r"2 images of 10 have another label in .*, first folder/0\.png"):
        compare([open_run(path, never) for path in (first, renamed)])
    (first / "predictions.csv").write_text("image,truth\n")
    with pytest.raises(UserError, match=r"predictions\.csv is damaged"):
        open_run(first, never)


def test_accents_and_the_order_of_classes_make_no_difference(tmp_path: Path) -> None:
    """The same answers twice, of models whose classes are in another order and written with other accents."""
    answers = [["caf\u00e9", "tea"], ["tea"], [], ["milk", "tea"]]
    runs = []
    for name, form, classes in (
        ("one", "NFC", ("caf\u00e9", "milk", "tea")),
        ("two", "NFD", ("tea", "milk", "caf\u00e9")),
    ):
        joined = tuple(
            unicodedata.normalize(form, ";".join(each for each in classes if each in answer)) for answer in answers
        )
        table = np.array([[0.9 if each in answer else 0.2 for each in classes] for answer in answers], np.float32)
        predictions = Predictions(tuple("1234"), joined, joined, np.full(4, 0.9), np.full(4, 0.1), table)
        named = tuple(unicodedata.normalize(form, each) for each in classes)
        write_report(replace(report_of(named, multilabel=True), predictions=predictions), tmp_path / name)
        runs.append(open_run(tmp_path / name, never))
    found = compare(runs)
    assert found.disagreements == () and found.correct.all()
    assert found.differences[0].map_difference == 0
    for name, form in (("three", "NFC"), ("four", "NFD")):
        truth = tuple(unicodedata.normalize(form, each) for each in ("caf\u00e9", "tea"))
        predictions = Predictions(tuple("12"), truth, truth, np.full(2, 0.9), np.full(2, 0.1))
        write_report(replace(report_of(truth), predictions=predictions), tmp_path / name)
    assert compare([open_run(tmp_path / name, never) for name in ("three", "four")]).disagreements == ()


def test_the_page_shows_images_of_every_split_but_those_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(path)
    training, validation = (
        [part.describe(index) for index in range(len(part))] for part in open_dataset(tmp_path / "data").parts.values()
    )
    assert len(training) > 4 and validation
    (tmp_path / "data" / training[0]).write_bytes(b"no image")
    page, folders = tmp_path / "page.html", [tmp_path / run / "test" for run in "xy"]

    def images_shown(data: str) -> int:
        for folder, predicted in zip(folders, "ab", strict=True):
            names = (*training[:4], validation[0])
            predictions = Predictions(names, tuple("aaaaa"), (predicted,) * 5, np.full(5, 0.9), np.full(5, 0.1))
            write_report(replace(report_of(("a", "b")), data=data, predictions=predictions), folder)
            (folder.parent / "recipe.yaml").write_text(f"data: {tmp_path / 'data'}\n")
        assert main(["compare", *map(str, folders), "--out", str(page)]) == 0
        return page.read_text().count("data:image/webp")

    assert images_shown("data") == 4
    assert images_shown("other images") == 0  # measured on others, whose names may be the same
    assert "5 images of 5 with different predictions" in capsys.readouterr().out


def test_compare_and_runs_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = str(write_run(tmp_path / "runs" / "first", "aabbccbbbb"))
    second = str(write_run(tmp_path / "runs" / "deeper" / "second", "aabbcaaabb"))
    unfinished = tmp_path / "runs" / "third"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_text("data: digits\nmodel: coatnet-femto-16\n")
    page = tmp_path / "page.html"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["compare", first, second, "--out", "~/page.html"]) == 0
    printed = capsys.readouterr().out
    assert "Differences on the same images" in printed and "McNemar" in printed and printed.startswith("# ")
    written = page.read_text(encoding="utf-8")
    assert "Held-out loss" in written and "<svg" in written and "http" not in written.split("</style>")[1]
    assert main(["compare", first, second, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_disagreements"] == 3
    assert main(["compare", first, second, "--out", str(page / "below-a-file.html")]) == 2  # costs the page alone
    assert "McNemar" in capsys.readouterr().out
    assert main(["compare", first]) == 2 and main(["compare", first, str(unfinished)]) == 2
    assert "is not finished" in capsys.readouterr().err
    (unfinished / "figures.json").write_text("{}")
    assert main(["compare", first, str(unfinished)]) == 2
    assert "is a run of a study that kept its figures only" in capsys.readouterr().err
    (unfinished / "figures.json").unlink()

    assert main(["runs", str(tmp_path / "runs"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [each["run"] for each in rows][-1] == "third"  # without a figure
    listed = {each["run"]: each for each in rows}
    assert {name: each["state"] for name, each in listed.items()} == {
        "first": "finished", "deeper/second": "finished", "third": "can be resumed"
    }  # fmt: skip
    assert listed["first"]["value"] == report_of(("a", "b", "c")).figures["top1"]
    assert listed["first"]["minutes"] == 1.5 and listed["third"]["value"] is None
    assert main(["runs", str(tmp_path / "runs")]) == 0
    assert "| deeper/second | coatnet-femto-16 | digits |" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "no")]) == 2 and main(["runs", str(unfinished / "..")]) == 0


def test_the_best_run_is_listed_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, top1 in (("a", 0.5), ("b", 0.9), ("c", 0.7)):
        report = write_run(tmp_path / "runs" / name, "aabbccbbbb") / "report.json"
        values = json.loads(report.read_text())
        report.write_text(json.dumps(values | {"figures": values["figures"] | {"top1": top1}}))
    assert main(["runs", str(tmp_path / "runs"), "--json"]) == 0
    assert [each["run"] for each in json.loads(capsys.readouterr().out)] == ["b", "c", "a"]


def test_runs_beside_a_folder_that_may_not_be_read_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs" / "first", "aabbccbbbb")
    (tmp_path / "runs" / "another's").mkdir()
    scandir = os.scandir

    def refusing(folder: Path) -> object:  # as root, permissions of the file system refuse nothing
        if str(folder).endswith("another's"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr("coatnet.cli.runs.os.scandir", refusing)
    assert main(["runs", str(tmp_path / "runs"), "--json"]) == 0
    assert [Path(each["run"]).name for each in json.loads(capsys.readouterr().out)] == ["first"]


def test_headings_are_names_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), width=80)
    print_table(console, Table(("a[/b]", "exp[adam]", ":dog:"), [("[red]1", "2", "3")]))
    printed = console.file.getvalue()
    assert all(name in printed for name in ("a[/b]", "exp[adam]", ":dog:", "[red]1"))


def test_a_table_of_answers_comes_back_whatever_the_names(tmp_path: Path) -> None:
    names = ('a,"b"', "line\nbreak", "=1+1", "\u202eabc", "", "tab\t", "a\rb")
    given = Predictions(names, names[::-1], names, np.linspace(0, 1, 7), np.linspace(0, 9, 7))
    (tmp_path / "predictions.csv").write_text(given.to_csv(), encoding="utf-8", newline="")
    found = read_predictions(tmp_path / "predictions.csv")
    assert (found.images, found.truth, found.predicted) == (names, names[::-1], names)
    np.testing.assert_allclose(found.nll, given.nll, rtol=1e-5)


def test_arrays_that_are_none_of_a_run_are_not_read(tmp_path: Path) -> None:
    table = np.random.default_rng(0).random((6, 4), dtype=np.float32)
    np.save(tmp_path / "right.npy", table)
    found = read_array(tmp_path / "right.npy", (6, 4), np.float32)
    assert found is not None and np.array_equal(found, table)
    np.save(tmp_path / "double.npy", table.astype(np.float64))
    np.save(tmp_path / "objects.npy", np.array([[None] * 4] * 6), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", table)
    (tmp_path / "archive.npy").write_bytes((tmp_path / "archive.npz").read_bytes())
    whole = (tmp_path / "right.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-1])
    (tmp_path / "huge.npy").write_bytes(whole.replace(b"(6, 4), }", b"(6, " + b"9" * 30 + b"), }"))
    (tmp_path / "text.npy").write_text("0.5")
    (tmp_path / "empty.npy").touch()
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("double", "objects", "archive", "cut", "huge", "text", "empty", "pipe", "none"):
        assert read_array(tmp_path / f"{name}.npy", (6, 4), np.float32) is None, name
    assert read_array(tmp_path / "right.npy", (4, 6), np.float32) is None


def test_copies_of_training_images_are_counted_and_left_out() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (40, 8, 8), dtype=np.uint8)
    training = ArrayDataset("some", ("a", "b"), images[:30], np.zeros(30, np.int64))
    held_out = ArrayDataset("some", ("a", "b"), images[27:], np.zeros(13, np.int64))
    correct = np.arange(13) < 6
    found = find_duplicates(correct, read_properties(held_out), training)
    assert (found.count, found.others, found.accuracy) == (3, 10, 0.3)
    report = replace(report_of(("a", "b")), duplicates=found)
    learned = "an image of the training split of some images"
    said = f"3 of these images have the same pixels as {learned}; without them 30.0 % of 10 are right"
    assert said in to_markdown(report)
    several = to_markdown(replace(report_of(("a", "b"), multilabel=True), duplicates=found))
    assert "without them 30.0 % of 10 have all labels right (95 % interval" in several
    assert report.to_dict()["duplicates"]["count"] == 3
    assert f"No image of these has the same pixels as {learned}, or nearly so." in to_markdown(
        replace(report, duplicates=replace(found, count=0))
    )


def test_near_copies_of_training_images_are_counted_apart_and_left_out() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (40, 4, 4), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    near = np.clip(images[:4].astype(int) + random.integers(-3, 4, (4, 32, 32)), 0, 255).astype(np.uint8)
    training = ArrayDataset("some", ("a", "b"), images[:30], np.zeros(30, np.int64))
    held_out = ArrayDataset("some", ("a", "b"), np.concatenate([images[28:], near, near[:1]]), np.zeros(17, np.int64))
    found = find_duplicates(np.arange(17) < 7, read_properties(held_out), training)
    assert (found.count, found.near, found.others, found.accuracy) == (2, 5, 10, 0.5)
    said = to_markdown(replace(report_of(("a", "b")), duplicates=found))
    learned = "an image of the training split of some images"
    assert f"2 of these images have the same pixels as {learned}, 5 more nearly; without them 50.0 % of 10" in said
    said = to_markdown(replace(report_of(("a", "b")), duplicates=replace(found, count=0, near=1)))
    assert f"1 of these images has nearly the same pixels as {learned}; without it 50.0 %" in said
    unseen = find_duplicates(np.arange(17) < 7, read_properties(held_out, near=False), training)
    assert (unseen.count, unseen.near, unseen.others) == (2, None, 15)


def test_labels_that_look_wrong_are_listed_in_the_report() -> None:
    """The rule by hand: class a is usually given 0.8, class b 0.6; a mistake below that is none of the label's."""
    truth, predicted = ("a", "a", "a", "b", "b", "b"), ("a", "a", "b", "b", "b", "a")
    probability = np.array([0.95, 0.9, 0.55, 0.85, 0.75, 0.9])
    given = np.array([0.95, 0.9, 0.45, 0.85, 0.75, 0.1])
    names = tuple(f"{n}.png" for n in range(6))
    predictions = Predictions(names, truth, predicted, probability, -np.log(given))
    report = replace(report_of(("a", "b")), predictions=predictions)
    assert report.suspects() == [("5.png", "b", "a", pytest.approx(0.1))]  # 0.55 is below (0.85 + 0.75 + 0.1) / 3
    assert "## Labels that look wrong" in to_markdown(report) and "| 5.png | b | a | 10.0 % |" in to_markdown(report)
    assert "Labels that look wrong" in to_html(report)
    (suspect,) = report.to_dict()["suspects"]
    assert suspect == {"image": "5.png", "label": "b", "suggested": "a", "score": pytest.approx(0.1)}
    assert not replace(report, split="training").suspects() and not replace(report, multilabel=True).suspects()


def test_groups_of_images_have_intervals_for_all_of_them_at_once() -> None:
    size = 300
    images = [np.full((8 if n < 150 else 32, 8, 3), n % 250, np.uint8) for n in range(size)]
    properties = [
        each for image in images for each in read_properties(ArrayDataset("d", ("a", "b"), image[None], np.zeros(1)))
    ]
    names = tuple(f"{'a' if n % 2 else 'b'}/{'camera' if n % 3 else 'phone'}/{n}.png" for n in range(size))
    truth = tuple("a" if n % 2 else "b" for n in range(size))
    predicted = tuple("a" if n < 150 else label for n, label in enumerate(truth))
    found = find_slices(Predictions(names, truth, predicted, np.ones(size), np.ones(size)), properties)
    groups = {(each.kind, each.name): each for each in found}
    assert groups["image size", "up to 8 pixels"].accuracy == 0.5
    assert groups["image size", "8 to 16 pixels"].accuracy == 1
    assert {name for kind, name in groups if kind == "folder"} == {"camera", "phone"}
    assert sum(each.count for each in found if each.kind == "brightness") == size
    small = groups["image size", "up to 8 pixels"]
    low, high = wilson_interval(75, 150)
    assert small.interval[0] < low - 0.01 and small.interval[1] > high + 0.01
    page = to_markdown(replace(report_of(("a", "b")), slices=found))
    assert "Bonferroni" in page and "| image size | up to 8 pixels | 150 | 50.0 % |" in page


def test_a_verdict_on_probabilities_needs_enough_images() -> None:
    few, many = report_of(("a", "b", "c"), num_images=30), report_of(("a", "b", "c"), num_images=4_000)
    bins = [replace(row, count=0, confidence=None, accuracy=None) for row in many.calibration]

    def judged(report, right: float) -> str:
        n = int(report.figures["n"])
        last = replace(bins[-1], count=n, confidence=0.31, accuracy=right)
        return to_markdown(replace(report, calibration=(*bins[:-1], last)))

    assert "30 images cannot tell whether the probabilities are too high or too low" in judged(few, 0.322)
    assert "are too low" in judged(many, 0.34) and "are too high" in judged(many, 0.28)
    assert "are well balanced" in judged(many, 0.312)


def test_probabilities_of_rare_labels_are_judged_by_their_size() -> None:
    report = report_of(("a", "b", "c"), multilabel=True, num_images=40_000)
    bins = [replace(row, count=0, confidence=None, accuracy=None) for row in report.calibration]

    def judged(given: float, there: float) -> str:
        first = replace(bins[0], count=120_000, confidence=given, accuracy=there)
        return to_markdown(replace(report, calibration=(first, *bins[1:])))

    assert "Labels get 0.9 % on average and 0.3 % of them are there: on the whole the probabilities are too high" in (
        judged(0.009, 0.003)
    )
    assert "are too low" in judged(0.003, 0.009) and "are well balanced" in judged(0.0031, 0.003)
    assert "are well balanced" in judged(0.305, 0.3)


def test_baselines_stand_beside_the_figure() -> None:
    report = report_of(("a", "b", "c", "d"))
    majority = max(row.support for row in report.per_class) / 120
    assert report.baselines() == {"chance": 0.25, "majority": majority}
    assert f"25.0 % by chance, {100 * majority:.1f} % by always naming" in to_markdown(report)
    several = report_of(("a", "b", "c", "d"), multilabel=True)
    assert several.baselines() == {"chance": pytest.approx(0.25)}
