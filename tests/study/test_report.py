"""The pages of a study: what they say of known results, whole or not, and how a browser shows them."""

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser
from tests.evaluation.test_report_html import HOSTILE
from tests.server.page.visiting import Visit

from coatnet.errors import UserError
from coatnet.study.record import Curves, Figures, Member, Paper, Run, Study
from coatnet.study.report import document, write_report
from coatnet.study.results import ACCURACY, GAP, TRAINING_LOSS, Results

# Held-out accuracy of each layout at 600 images for five seeds, whose differences from the first are known.
SEEDS = (0, 1, 2, 3, 4)
COMMON = np.array([0.002, -0.004, 0.001, 0.003, -0.002])  # of a seed, for all layouts: pairs take it out
LAYOUTS = {
    "C-C-T-T": (2, 1, 0.840, np.zeros(5)),
    "C-C-C-C": (1, 4, 0.852, np.array([1, -1, 2, 0, -2]) * 1e-3),  # better by 1.2 points
    "C-C-C-T": (1, 3, 0.841, np.array([1, -9, 6, 4, -2]) * 1e-3),  # by 0.1: not resolved
    "C-T-T-T": (3, 1, 0.835, np.array([2, -2, 1, -1, 0]) * 1e-3),  # worse by 0.5
    "ViT_REL": (4, 2, 0.700, np.array([-4, 3, 2, 1, -2]) * 1e-3),  # worse by 14
}


def run_of(member: str, size: int, seed: int, top1: float, train_loss: float, rate: float = 0.001) -> Run:
    steps = tuple(range(10, 201, 10))
    falling = tuple(2.3 * 0.97 ** (step / 10 + seed) + train_loss for step in steps)
    curves = Curves(steps, falling, (100, 200), (0.6, 0.5), (top1 - 0.1, top1))
    figures = Figures(top1=top1, held_out_loss=1 - top1, train_top1=0.99, train_loss=train_loss, n=10_000, n_train=600)
    folder = f"runs/{member}-{size}-{seed}-{rate:g}"
    return Run(member, size, seed, rate, 200, folder, "finished", seconds=30.0, curves=curves, figures=figures)


def study_of(sizes: Sequence[int] = (600, 6_000), rates: Sequence[float] = (0.001,)) -> Study:
    """Five layouts; every tenfold of images adds 5 points to all, every lower rate takes one."""
    members = [
        Member(name, f"four stages, {name}", 400_000 + 1_000 * number, 9_000_000, paper=Paper(general, capacity))
        for number, (name, (general, capacity, _, _)) in enumerate(LAYOUTS.items())
    ]
    runs = [
        run_of(
            name,
            size,
            seed,
            float(top1 + more[seed] + COMMON[seed] + 0.05 * number - 0.01 * slower),
            0.1 * capacity + 0.001 * seed,
            rate,
        )
        for number, size in enumerate(sizes)
        for name, (_, capacity, top1, more) in LAYOUTS.items()
        for seed in SEEDS
        for slower, rate in enumerate(rates)
    ]
    return Study(
        format=1,
        question="layouts",
        title="Which layout generalizes, and which has capacity?",
        data="fashion-mnist",
        held_out=10_000,
        resolution=(28, 28),
        classes=10,
        command="coatnet study layouts --data fashion-mnist --out STUDY",
        versions={"coatnet": "0.2", "torch": "2.9"},
        machine="2 cores",
        recipe={"batch_size": 64, "optimizer": {"algorithm": "adamw"}},
        members=tuple(members),
        sizes=tuple(sizes),
        seeds=SEEDS,
        learning_rates=tuple(rates),
        runs=tuple(runs),
    )


def without(study: Study, drop: Callable[[Run], bool], **values: object) -> Study:
    """The study in which some runs have no figures."""
    values = {"status": "planned", "figures": None, "curves": Curves()} | values
    return replace(study, runs=tuple(replace(run, **values) if drop(run) else run for run in study.runs))


def said(study: Study) -> str:
    return document(study).to_markdown(with_plots=True)


def page_of(study: Study, folder: Path) -> str:
    study.write(folder)
    write_report(folder)
    return (folder / "study.md").read_text(encoding="utf-8")


def test_what_is_claimed_is_what_the_paired_seeds_show() -> None:
    page = said(study_of())
    # Differences 1.3, 1.1, 1.4, 1.2, 1.0: spread 0.158, half an interval 2.776 x 0.158 / sqrt(5) = 0.196.
    better = (
        "C-C-C-C is better than C-C-T-T at 600 images by 1.20 points (1.00 to 1.40, 5 paired seeds), as in the paper's"
    )
    worse = (
        "C-T-T-T is worse than C-C-T-T at 600 images by 0.50 points (0.30 to 0.70, 5 paired seeds), as in the paper's"
    )
    open_question = (
        "No difference in held-out accuracy could be resolved between C-C-C-T and C-C-T-T at 600 images: +0.10 points "
        "(-0.63 to +0.83, 5 paired seeds)."
    )
    for sentence in (better, worse, open_question):
        assert sentence in page, sentence
    headline = page.splitlines()[2]
    assert "6,000 images against C-C-T-T: better: C-C-C-C; worse: C-T-T-T, ViT\\_REL; not resolved: C-C-C-T" in headline
    assert "| 600 | C-C-C-C | C-C-T-T | +1.20 | +1.00 to +1.40 | 5 | &lt;0.001 | better | better |" in page
    assert "| 600 | C-C-C-T | C-C-C-C | -1.10 | -1.71 to -0.49 | 5 | 0.022 | worse | equal |" in page  # the best
    assert "| 600 | C-C-C-C | 5 | 85.20 (84.69 to 85.71) | 13.80 (13.29 to 14.31) | 0.4020 (0.4000 to 0.4040) |" in page
    assert "| 600 | held-out accuracy | 5 | 0.35 points | 0.43 points | 0.58 points |" in page
    agreement = "beside the paper's order: at 600 images 3 as in the paper, 0 not as in it, 1 not resolved; at 6,000"
    assert f"Differences in generalization gap from C-C-T-T, {agreement}" in page
    assert "coatnet study layouts --data fashion-mnist --out STUDY" in page and "1.0 % in parameters" in page


def test_the_order_is_compared_with_the_papers() -> None:
    orders = Results(study_of()).orders
    assert [(order.measure, order.size) for order in orders] == [
        (GAP, 600), (GAP, 6_000), (ACCURACY, 600), (ACCURACY, 6_000), (TRAINING_LOSS, 6_000),
    ]  # fmt: skip
    # Nine pairs in the paper's order, the tenth tied there; 4 of 120 orders are as far from 0.
    assert orders[0].found.tau == pytest.approx(9 / np.sqrt(10 * 9))
    assert orders[0].found.p == pytest.approx(4 / 120)
    assert orders[-1].found.tau == 1 and orders[-1].by_seed == (1.0,) * 5
    page = said(study_of())
    assert "The paper's order of capacity: C-C-T-T = C-T-T-T &gt; ViT\\_REL &gt; C-C-C-T &gt; C-C-C-C." in page
    assert "By training loss, Kendall's tau-b with the paper's order of capacity is 1.00 at 6,000 images" in page


def with_accuracies(differences: Mapping[str, Sequence[float]]) -> Study:
    """A study of 600 images in which members differ from the first by these points of accuracy."""
    study = study_of(sizes=(600,))
    first = [0.8 + 0.01 * seed for seed in SEEDS]
    runs = [
        run_of(member.name, 600, seed, first[seed] + differences.get(member.name, (0,) * 5)[seed] / 100, 0.1)
        for member in study.members
        for seed in SEEDS
    ]
    return replace(study, runs=tuple(runs))


def test_an_interval_that_only_chance_among_several_excludes_0_is_no_claim() -> None:
    # Mean 1, spread 0.707: t = 3.16, p = 0.034, and four times that for the best of four comparisons.
    results = with_accuracies({"C-C-C-C": (0, 1, 2, 1, 1), "C-T-T-T": (9, -9, 1, 0, 0)})
    page = said(results)
    assert "C-C-C-C is better" not in page
    assert (
        "(+0.12 to +1.88, 5 paired seeds; the interval excludes 0, but p is 0.14 after Holm's correction for 4" in page
    )
    runs = tuple(run for run in results.runs if run.member in ("C-C-T-T", "C-C-C-C"))
    pair = replace(results, members=results.members[:2], runs=runs)
    assert "C-C-C-C is better than C-C-T-T at 600 images by 1.00 points (0.12 to 1.88, 5 paired seeds)" in said(pair)


def test_a_result_against_the_paper_says_so() -> None:
    page = said(with_accuracies({"ViT_REL": (3.0, 3.1, 2.9, 3.0, 3.1)}))
    assert "is better than C-C-T-T at 600 images by 3.02 points" in page
    assert "5 paired seeds) (in the paper's order: worse)." in page
    assert "beside the paper's order: at 600 images 0 as in the paper, 1 not as in it, 0 not resolved." in page


def test_members_with_other_seeds_are_compared_by_those_of_both() -> None:
    study = without(
        study_of(), lambda run: run.member == "C-C-C-C" and run.seed > 2, status="failed", reason="disk full"
    )
    page = said(study)
    # 1.3, 1.1, 1.4: mean 1.267, spread 0.153, half an interval 4.303 x 0.153 / sqrt(3) = 0.379.
    assert "C-C-C-C is better than C-C-T-T at 600 images by 1.27 points (0.89 to 1.65, 3 paired seeds)" in page
    assert "4 runs failed" in page and "| C-C-C-C | 600 | 3 | 0.001 | disk full |" in page
    assert Results(study).orders[0].by_seed == Results(study_of()).orders[0].by_seed[:3]


def test_one_seed_claims_nothing() -> None:
    page = said(without(study_of(), lambda run: run.seed != 1))
    assert "10 of 50 runs finished; no difference has an interval yet" in page.splitlines()[2]
    assert "is better" not in page and "is worse" not in page
    assert "without an interval since there is one paired seed or no spread: C-C-C-C +1.10 points, C-C-C-T" in page
    assert "| one seed |" in page
    assert "| 6,000 | C-C-C-C | 4 |" in page  # what is missing


def test_the_headline_is_of_the_largest_size_that_has_an_answer() -> None:
    page = said(without(study_of(), lambda run: run.size == 6_000 and run.seed > 0))
    assert page.splitlines()[2].startswith("**Held-out accuracy at 600 images against C-C-T-T: better: C-C-C-C; worse:")
    assert "beside the paper's order: at 600 images 3 as in the paper, 0 not as in it, 1 not resolved." in page


def test_each_rate_is_reported_and_the_choice_is_called_one() -> None:
    study = study_of(sizes=(600,), rates=(0.001, 0.0005))
    # One network prefers the other rate, by three points.
    other = [
        replace(run, figures=replace(run.figures, top1=run.figures.top1 + 0.04))
        if run.figures and (run.member, run.learning_rate) == ("C-T-T-T", 0.0005) else run
        for run in study.runs
    ]  # fmt: skip
    study = replace(study, runs=tuple(other))
    page = said(study)
    assert "| 600 | C-T-T-T | 0.0005 | 5 | 86.50 (86.00 to 87.00) |" in page and "uses the held-out images" in page
    assert "| 600 | C-T-T-T | 5 | 86.50 (86.00 to 87.00) |" in page  # in the table of results
    assert Results(study).rates["C-T-T-T", 600] == 0.0005 and Results(study).rates["C-C-C-C", 600] == 0.001
    assert "Learning rates" not in said(study_of())


def test_a_study_that_has_not_begun_is_a_plan(tmp_path: Path) -> None:
    page = page_of(without(study_of(), lambda run: True), tmp_path)
    assert "Nothing is finished yet: 50 runs planned, 25 minutes one after the other" in page
    assert "## Networks" in page and "## What is missing" in page and "What came out" not in page and ".png" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.html", "study.json", "study.md"]


def test_the_last_page_has_the_runs_of_all_that_draw_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, go_on = threading.Event(), threading.Event()

    def draw(found: object, path: Path) -> None:
        path.touch()
        if not drawing.is_set():  # the first, which is slow
            drawing.set()
            go_on.wait(60)

    monkeypatch.setattr("coatnet.study.report.draw_curves", draw)
    monkeypatch.setattr("coatnet.study.report.draw_gap", lambda gaps, accuracies, path: path.touch())
    study = study_of(sizes=(600,))
    without(study, lambda run: run.folder == study.runs[-1].folder).write(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(write_report, tmp_path)
        assert drawing.wait(60)
        study.write(tmp_path)  # the last run has ended
        second = pool.submit(write_report, tmp_path)
        wait([second], timeout=1)  # it is done only if it does not wait for the first
        go_on.set()
        first.result(), second.result()
    for page in ("study.md", "study.html"):
        assert "25 of 25 runs finished" in (tmp_path / page).read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".*"))


def test_unequal_budgets_are_named() -> None:
    study = study_of(sizes=(600,))
    study = replace(study, runs=(replace(study.runs[0], steps=100), *study.runs[1:]))
    assert "Beware: not all runs at 600 images have the same number of steps (100, 200)." in said(study)


def test_a_member_that_never_finished_is_missing_and_the_rest_stands() -> None:
    for gone in LAYOUTS:
        page = said(without(study_of(), lambda run, gone=gone: run.member == gone))
        assert f"{gone}, which all others are compared with, has no finished run" in page or gone != "C-C-T-T"
        assert f"| 6,000 | {gone.replace('_', chr(92) + '_')} | 5 |" in page


def test_plots_have_a_color_for_each_member_and_bands_for_several_seeds(tmp_path: Path) -> None:
    def drawn(study: Study) -> np.ndarray:
        page_of(study, tmp_path)
        with Image.open(tmp_path / "curves.png") as curves, Image.open(tmp_path / "gap.png") as gap:
            assert gap.width == curves.width == 1350
            pixels = np.asarray(curves.convert("RGB"))
        colors = ["0072b2", "d55e00", "009e73", "cc79a7", "e69f00", "fbf0d9"]  # the last: 15 % of the fifth, on white
        return np.array([(pixels == list(bytes.fromhex(color))).all(-1).sum() for color in colors])

    study = study_of(sizes=(600,))
    *lines, band = drawn(study)
    assert min(lines) > 30 and band > 1_000  # the first line lies below another that is equal, but for its ends
    *lines, band = drawn(without(study, lambda run: run.seed != 0))
    assert min(lines) > 30 and band < 50


@pytest.mark.slow
def test_the_page_is_whole_in_itself_whatever_a_member_is_called(chromium: Browser, tmp_path: Path) -> None:
    study = study_of(sizes=(600,))
    hostile = dict(zip(LAYOUTS, HOSTILE, strict=False))
    members = [replace(each, name=hostile[each.name], description=HOSTILE[0]) for each in study.members]
    runs = [replace(run, member=hostile[run.member]) for run in study.runs]
    runs.append(replace(runs[0], seed=7, folder="runs/7", status="failed", figures=None, reason=HOSTILE[1]))
    page_of(replace(study, members=tuple(members), runs=tuple(runs), title=HOSTILE[0]), tmp_path)
    phone = {"width": 400, "height": 800}
    seen = Visit(chromium, (tmp_path / "study.html").as_uri(), color_scheme="dark", viewport=phone)
    try:
        decoded = "all => Promise.all(all.map((one) => one.decode().then(() => one.naturalWidth)))"
        assert seen.see("img.plot").evaluate_all(decoded) == [1350, 1350]
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 400
        assert seen.see("h1").inner_text() == HOSTILE[0] and "\u202e" not in seen.see("body").inner_text()
        found = Axe().run(seen.page)
        assert found.violations_count == 0, found.generate_report()
        assert seen.page.evaluate("window.hacked") is None and not seen.complaints and not seen.outside
    finally:
        seen.leave()


def test_a_record_that_contradicts_itself_is_one_error(tmp_path: Path) -> None:
    study = study_of(sizes=(600,))
    for values, said in (
        ({"members": []}, "members must be one or more"),
        ({"members": [asdict(study.members[0])] * 2}, "with different names"),
        ({"runs": [asdict(study.runs[0]) | {"member": "other"}]}, "runs name 'other', which is not a member"),
        ({"runs": [asdict(study.runs[0]) | {"curves": {"step": [1, 2], "train_loss": [0.5]}}]}, "1 values for 2 steps"),
    ):
        (tmp_path / "study.json").write_text(json.dumps(asdict(study) | values))
        with pytest.raises(UserError, match=said):
            write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


PAGES = Path(__file__).resolve().parents[2] / "docs" / "study"


def test_committed_pages_are_what_is_drawn_today() -> None:
    for record in sorted(PAGES.glob("*/study.json")):
        page = said(Study.read(record.parent))
        drawn = (record.parent / "study.md").read_text(encoding="utf-8")
        assert drawn == page, f"draw it again: coatnet study --report {record.parent}"
        assert (record.parent / "curves.png").is_file() and (record.parent / "gap.png").is_file()


def test_the_summary_of_the_replication_quotes_its_pages() -> None:
    """Each interval of a row, such as `0.78 to 3.92`, and each tau, stand in a page that the row links."""
    rows = [
        line for line in (PAGES / "replication.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")
    ]
    quoted = 0
    for row in rows:
        pages = "".join(
            (PAGES / link).read_text(encoding="utf-8") for link in re.findall(r"\(([\w-]+/study\.md)\)", row)
        )
        for figure in re.findall(r"[+-]?\d+\.\d+ to [+-]?\d+\.\d+|(?<=tau )-?\d\.\d+", row):
            assert figure in pages, f"{figure} of the row {row[:40]}"
            quoted += 1
    assert quoted >= 5
