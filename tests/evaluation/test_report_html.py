"""report.html in a real browser: clicks, keyboard, hostile names, accessibility, a phone, a thousand classes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect
from tests.evaluation.test_report import report_of
from tests.server.page.visiting import Visit

from coatnet.evaluation.predictions import Duplicates, Predictions, Slice, choose_examples
from coatnet.evaluation.reliability import ClassSets, Refusals, Reliability, SelectiveAccuracy
from coatnet.evaluation.report import Report
from coatnet.evaluation.report_html import comparable_loss, to_html

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "\u202egnp.txt\u202c & \x1b[31m",
    "w" * 500,
    '" onfocus="window.hacked=1',
    "plain",
)
Open = Callable[..., Visit]


def with_predictions(report: Report, matrix: np.ndarray, side: int = 28) -> Report:
    """The report with an answer to each image as the matrix counts them, and noise as images."""
    random = np.random.default_rng(0)
    cells = [(int(i), int(j)) for i, j in np.argwhere(matrix) for _ in range(matrix[i, j])]
    predictions = Predictions(
        tuple(f"{HOSTILE[1]}/{number}.png" for number in range(len(cells))),
        tuple(report.classes[truth] for truth, _ in cells),
        tuple(report.classes[predicted] for _, predicted in cells),
        random.random(len(cells)),
        random.random(len(cells)),
    )
    examples = [(row, random.integers(0, 255, (side, side, 3), np.uint8)) for row in choose_examples(predictions)]
    return replace(
        report,
        confusion=tuple(map(tuple, matrix.tolist())),
        predictions=predictions,
        examples=tuple(examples),
        heat_maps=report.thumbnails,
        duplicates=Duplicates(3, 117, 0.5, (0.4, 0.6)),
        slices=(Slice("folder", HOSTILE[0], 60, 0.2, (0.1, 0.3)), Slice("folder", "b", 60, 0.9, (0.8, 0.95))),
        reliability=Reliability(
            temperature=0.8,
            num_shared=120,
            network={"nll": 0.7},
            error_before=0.2,
            error_after=0.013,
            bins_before=report.calibration,
            selective=(SelectiveAccuracy(0.9, 0.77, (0.7, 0.8)),),
            risk_coverage=((0.5, 0.1), (1.0, 0.3)),
            refusals=(Refusals(0.05, 0.06, (0.04, 0.09)),),
            sets=(ClassSets("aps", 0.9, 0.91, (0.88, 0.93), 1.7, (None, *[0.93] * (len(report.classes) - 1))),),
        ),
        training={"epochs": 2.0, "steps": 40, "minutes": 0.5, "images": 1_000, "hardware": HOSTILE[0]},
        recipe={"data": HOSTILE[0], "loss": "softmax", "mixing": {"label_smoothing": 0.1, "cutmix_alpha": 1.0}},
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of six classes whose names are there to break it, with the curves of a run."""
    folder = tmp_path_factory.mktemp("report")
    lines = [{"step": step, "epoch": step / 20, "loss": 2.4 - step / 40} for step in range(1, 41)]
    lines += [{"step": step, "epoch": step / 20, "nll": 2 - step / 30, "top1": step / 50} for step in (20, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = report_of(HOSTILE)
    assert report.confusion is not None
    page = to_html(with_predictions(report, np.array(report.confusion)), folder / "metrics.jsonl")
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Open]:
    """Opens a report; afterwards the console must be clean, and nothing have been asked for."""
    visits: list[Visit] = []

    def open_page(path: Path, **options: object) -> Visit:
        visits.append(Visit(chromium, path.as_uri(), **options))
        return visits[-1]

    yield open_page
    for one in visits:
        hacked = one.page.evaluate("window.hacked")
        one.leave()
        assert hacked is None
        assert not one.complaints, f"the console says {one.complaints}"
        assert not one.outside, f"the page asked {one.outside}"


def test_a_cell_shows_its_images_and_headings_sort_by_mouse_and_keyboard(visit: Open, hostile: Path) -> None:
    seen = visit(hostile)
    cell = seen.see('[data-cell="0,1"]').first
    count = int(cell.text_content() or "")
    cell.click()
    expect(seen.see("#cell li img")).to_have_count(count)
    expect(seen.see("#cell h3")).to_contain_text(f"{HOSTILE[0]} taken for {HOSTILE[1]}: {count} image")
    assert seen.see("#cell img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 28
    seen.page.keyboard.press("ArrowLeft")
    seen.page.keyboard.press("Enter")
    expect(seen.see("#cell h3")).to_contain_text(f"{HOSTILE[0]} recognized as such")
    expect(seen.see('[data-cell="0,0"]').first).to_have_attribute("aria-pressed", "true")

    rows = seen.see("table.sortable").first.locator("tbody tr")
    shown = [row.split("\t")[0] for row in rows.all_inner_texts()]

    def recalls() -> list[float]:
        return [
            float(said.rstrip(" %"))
            for said in seen.see("table.sortable").first.locator("td:nth-child(3)").all_inner_texts()
        ]

    heading = seen.see("table.sortable th button").nth(2)
    heading.focus()
    seen.page.keyboard.press("Enter")
    assert recalls() == sorted(recalls(), reverse=True)
    heading.press("Space")
    assert recalls() == sorted(recalls())
    expect(seen.see("table.sortable th").nth(2)).to_have_attribute("aria-sort", "ascending")
    seen.see("table.sortable th button").first.click()
    assert sorted(shown) == sorted(row.split("\t")[0] for row in rows.all_inner_texts())
    clickable = "button, summary, select, a, .scroll"
    assert seen.see(clickable).evaluate_all("all => all.every((one) => one.tabIndex === 0)")


def test_the_page_says_what_stands_beside_the_figure(visit: Open, hostile: Path) -> None:
    said = visit(hostile).see("body").inner_text()
    for part in (
        "16.7 % by chance",
        "3 of these images have the same pixels as an image of the training split of ",
        "; without them 50.0 % of 117 are right",
        "2.0 epochs of 1,000 images, 40 steps in 0.5 minutes",
        "labels smoothed by 0.1 cost even a perfect network are subtracted",
        "mixed by cutmix",
        "Bonferroni",
        "Expected calibration error 20.0 % as the network gives its probabilities, 1.3 % calibrated",
        "The same before calibration",
        "90.0 %\t77.0 %",
        "APS\t90.0 %\t91.0 %\t88.0 to 93.0\t1.70",
        "Risk and coverage",
    ):
        assert part in said, part
    assert HOSTILE[3] in said and "\u202e" not in said and "\\u202egnp.txt" in said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_accessible_and_fits_a_phone(visit: Open, hostile: Path, scheme: str) -> None:
    seen = visit(hostile, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    seen.see('[data-cell="0,0"]').first.click()
    for summary in seen.see("summary").all():
        summary.click()
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 360
    found = Axe().run(seen.page)
    assert found.violations_count == 0, found.generate_report()
    assert len(found.response["passes"]) > 15
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => +a + +b)"
    assert (seen.page.evaluate(brightness) > 600) == (scheme == "light")


@pytest.mark.slow
def test_a_thousand_classes_and_a_hundred_thousand_images_stay_below_ten_megabytes(visit: Open, tmp_path: Path) -> None:
    names = tuple(f"{number} {'n' * 60}" for number in range(1_000))
    random = np.random.default_rng(0)
    labels, others = random.integers(0, 1_000, (2, 100_000))
    predicted = np.where(random.random(100_000) < 0.6, labels, others)
    matrix = np.zeros((1_000, 1_000), int)
    np.add.at(matrix, (labels, predicted), 1)
    matrix[7, 900] = 40
    page = to_html(with_predictions(report_of(names, num_images=1_000), matrix, side=96))
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    assert 2e6 < path.stat().st_size < 10e6
    seen = visit(path)
    expect(seen.see("table.sortable").first.locator("tbody tr")).to_have_count(1_000)
    seen.see("#truth").select_option("7")
    seen.see("#predicted").select_option("900")
    expect(seen.see("#cell h3")).to_contain_text("40 images")
    expect(seen.see("#cell img")).to_have_count(8)
    box = seen.see("canvas").bounding_box()
    assert box is not None
    seen.see("canvas").click(position={"x": 0.9005 * box["width"], "y": 0.0075 * box["height"]})
    expect(seen.see("#cell h3")).to_contain_text("900 ")


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_training_loss_of_a_perfect_network_is_0_whatever_the_smoothing(multilabel: bool) -> None:
    """A perfect network gives the smoothed targets as probabilities."""
    report = report_of(multilabel=multilabel)
    num_classes = len(report.classes)
    target = torch.zeros(1, num_classes)
    target[0, 0] = 1
    if multilabel:
        targets = target * 0.9 + 0.05
        logged = F.binary_cross_entropy_with_logits(targets.logit(), targets, reduction="sum")
    else:
        targets = target * 0.9 + 0.1 / num_classes
        logged = F.cross_entropy(targets.log(), torch.tensor([0]), label_smoothing=0.1)
    assert logged > 0.1
    recipe = {"loss": "sigmoid" if multilabel else "softmax", "mixing": {"label_smoothing": 0.1}}
    series, sentence = comparable_loss(np.array([[1.0, float(logged)]]), replace(report, recipe=recipe))
    assert series[0].tolist() == pytest.approx([1, 0], abs=1e-5) and "both are 0 at best" in sentence
    # Of a student the scale is that of its teacher's probabilities.
    taught = replace(report, recipe={**recipe, "teacher": "runs/large"})
    series, sentence = comparable_loss(np.array([[1.0, 2.0]]), taught)
    assert series[0, 1] == 2 and "its scale is another" in sentence
