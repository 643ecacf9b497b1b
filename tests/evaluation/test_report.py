"""Reports as Markdown, JSON and plots, for any class names."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.evaluation.metrics import Metrics
from coatnet.evaluation.predictions import Predictions
from coatnet.evaluation.report import Mistake, Report
from coatnet.evaluation.report_markdown import to_markdown, write_report
from coatnet.evaluation.report_sections import document
from coatnet.system.document import show

ODD = (
    "t-shirt | top",
    "<b>bag</b>",
    "$5 & up",
    "back`tick_s*",
    "日本\N{GRINNING FACE}",
    "line\nbreak",
    "plain",
)


def report_of(classes: tuple[str, ...] = ODD, *, multilabel: bool = False, num_images: int = 120) -> Report:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(len(classes), (num_images,), generator=generator)
    logits = torch.randn(num_images, len(classes), generator=generator)
    logits[torch.arange(num_images), labels] += 2
    metrics = Metrics(len(classes), multilabel)
    metrics.update(logits, torch.nn.functional.one_hot(labels, len(classes)) if multilabel else labels)
    confusion = metrics.confusion()
    return Report(
        data="some images",
        split="validation",
        model="coatnet-femto",
        resolution=32,
        num_parameters=2_345_678,
        classes=classes,
        multilabel=multilabel,
        figures=metrics.compute(),
        intervals=metrics.intervals(),
        per_class=tuple(metrics.per_class()),
        confusion=None if confusion is None else tuple(map(tuple, confusion.tolist())),
        confused_pairs=tuple((classes[i], classes[j], count) for i, j, count in metrics.confused_pairs()),
        calibration=metrics.calibration(),
        mistakes=(
            Mistake("a|b/1.jpg", classes[0], classes[1], 0.991),
            Mistake("2.jpg", classes[1], classes[0], 0.5),
        ),
        bad_images={"bad|name.png": "truncated: the file ends early"},
        seconds=2.0,
        thumbnails=(np.zeros((28, 28, 3), np.uint8), np.full((40, 160, 3), 90, np.uint8)),
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of()


def rows_of(page: str, heading: str) -> list[str]:
    section = page.partition(f"## {heading}")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def test_the_headline_is_percent_with_n_and_interval(report: Report) -> None:
    low, high = report.intervals["top1"]
    top1 = f"{100 * report.figures['top1']:.1f} %"
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
    expected = f"top-1 accuracy {top1} ({interval}) on 120 images of 7 classes"
    assert report.headline() == expected
    assert expected[1:] in to_markdown(report)


def test_json_holds_fractions_and_all_fields(report: Report) -> None:
    plain = json.loads(report.to_json())
    assert plain == report.to_dict()
    assert plain["figures"] == report.figures
    assert plain["intervals"]["top1"] == list(report.intervals["top1"])
    assert [row["class"] for row in plain["per_class"]] == list(ODD)
    assert np.array(plain["confusion"]).trace() == round(report.figures["top1"] * 120)
    assert plain["mistakes"][0] == {
        "image": "a|b/1.jpg", "truth": ODD[0], "predicted": ODD[1], "probability": 0.991
    }  # fmt: skip
    assert plain["bad_images"] == report.bad_images and "thumbnails" not in plain


def test_classes_are_listed_weakest_first(report: Report) -> None:
    rows = rows_of(to_markdown(report), "Classes, weakest first")
    scores = [float(row.split(" | ")[-1].removesuffix(" % |")) for row in rows]
    assert len(scores) == 7 and scores == sorted(scores)


def test_no_class_name_breaks_a_table(report: Report) -> None:
    for line in to_markdown(report, with_plots=True).splitlines():
        if line.startswith("|"):
            columns = line.replace("\\|", "").count("|") - 1
            assert columns in (2, 4, 5), line
    assert "<b>" not in to_markdown(report)


def test_long_tables_are_folded() -> None:
    page = to_markdown(report_of(tuple(f"class {number}" for number in range(51))))
    assert "## The ten weakest classes" in page
    assert "<details><summary>All 51 classes, weakest first</summary>\n\n| class |" in page
    assert page.index("<details>") < page.rindex("| class 50 |") < page.index("</details>")
    assert "<details>" not in to_markdown(report_of(tuple(f"class {number}" for number in range(50))))


def test_multilabel_reports_have_average_precision_and_no_confusion(tmp_path: Path) -> None:
    report = report_of(multilabel=True)
    page = to_markdown(report)
    assert page.count("mean average precision") and "average precision |" in page
    assert "top-1" not in page and "taken for" not in page
    write_report(report, tmp_path)
    assert not (tmp_path / "confusion.png").exists() and (tmp_path / "mistakes.png").exists()


def test_equality_ignores_seconds_and_thumbnails(report: Report) -> None:
    assert report == replace(report, seconds=99.0, thumbnails=())
    assert report != replace(report, data="other images")


def test_written_pages_show_only_existing_plots(report: Report, tmp_path: Path) -> None:
    for number, each in enumerate((report, replace(report, thumbnails=(), mistakes=()))):
        folder = tmp_path / str(number)
        write_report(each, folder)
        page = (folder / "report.md").read_text(encoding="utf-8")
        shown = {piece.partition(")")[0] for piece in page.split("](")[1:]}
        assert shown == {path.name for path in folder.glob("*.png")}
        for name in shown:
            with Image.open(folder / name) as image:
                assert 400 < image.width < 1600
    assert json.loads((tmp_path / "0" / "report.json").read_text(encoding="utf-8")) == report.to_dict()


def test_a_name_that_is_not_unicode_is_written_escaped(tmp_path: Path) -> None:
    report = report_of(("caf\udce9", "b"))
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["classes"] == ["caf\udce9", "b"]


def test_one_image_has_a_report() -> None:
    page = to_markdown(report_of(("a", "b"), num_images=1))
    assert "on 1 image of 2 classes" in page and "unknown" in page


def test_on_a_terminal_a_report_is_tables_with_names_as_they_are(
    report: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show(document(report))
    printed = capsys.readouterr().out
    assert "back`tick_s*" in printed and "<b>bag</b>" in printed and "line\\nbreak" in printed
    assert "---" not in printed and "**" not in printed and "\n# " not in printed and "──" in printed
    show(document(report), markdown=True)
    assert capsys.readouterr().out == to_markdown(report)
    show(document(report), json=report.to_json())
    assert json.loads(capsys.readouterr().out) == report.to_dict()


def test_nan_is_refused(report: Report) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(report, figures={**report.figures, "nll": float("nan")}).to_json()


def test_a_report_that_cannot_be_written_leaves_the_files_of_the_one_before(tmp_path: Path) -> None:
    before = replace(report_of(), predictions=predictions_of("abc"))
    write_report(before, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "predictions.csv" in files
    other = report_of(num_images=60)
    broken = replace(other, figures={**other.figures, "nll": float("nan")}, predictions=predictions_of("cba"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(broken, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_report_that_is_stopped_while_its_files_get_their_names_is_none(tmp_path: Path, monkeypatch) -> None:
    write_report(replace(report_of(), predictions=predictions_of("abc")), tmp_path)
    assert (tmp_path / "confusion.png").exists() and (tmp_path / "report.json").exists()
    rename = os.replace

    def stopped(source: Path, target: Path) -> None:
        if target.name == "report.html":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_report(replace(report_of(num_images=60), predictions=None, confusion=None), tmp_path)
    names = ("report.json", "report.html", "report.md", "predictions.csv", "confusion.png")
    assert not any((tmp_path / name).exists() for name in names)


def predictions_of(answers: str) -> Predictions:
    """Three predictions, one of them right."""
    probability = np.linspace(0.5, 0.9, len(answers))
    return Predictions(("1", "2", "3"), ("a", "a", "a"), tuple(answers), probability, -np.log(probability))


def test_the_old_name_of_write_report_warns() -> None:
    with pytest.warns(FutureWarning, match=r"coatnet\.write_report"):
        from coatnet.evaluation.report import write  # pyrefly: ignore[missing-module-attribute]
    assert write is write_report
