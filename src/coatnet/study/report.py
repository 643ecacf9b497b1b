"""The pages of a study, study.md and study.html with their plots, drawn from its study.json alone."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from coatnet.errors import counted
from coatnet.evaluation.html_page import blocks, page, text
from coatnet.study.plots import draw_curves, draw_gap
from coatnet.study.record import CURVES_PLOT, GAP_PLOT, HTML_PAGE, MARKDOWN_PAGE, Member, Study
from coatnet.study.results import (
    ACCURACY,
    COMPARED,
    GAP,
    LEVEL,
    TRAINING_LOSS,
    Difference,
    Measure,
    Results,
    figures_by_seed,
)
from coatnet.study.statistics import Estimate, estimate
from coatnet.system.document import Document, Plot, Section, Table
from coatnet.system.files import atomic_files, atomic_write, file_lock
from coatnet.system.json_reader import flatten

CURVES = Plot("Training loss and held-out accuracy by steps, mean and 95 % band over seeds", CURVES_PLOT)
GAPS = Plot("Generalization gap and held-out accuracy by number of training images", GAP_PLOT)


def write_report(folder: Path) -> None:
    """Write study.md and study.html of a study into its folder, and curves.png and gap.png if a run is finished.

    Of several processes that do so at once, each waits for the one before, so that the last pages have all runs.

    Args:
        folder: has study.json; nothing else in it is read.

    Raises:
        UserError: there is no study.json, or it is damaged.
        OSError: the disk refuses.
    """
    Study.read(folder)  # a folder without a study gets no lock file
    with file_lock(lock := folder / ".report.lock"):
        try:
            _write_pages(folder)
        finally:
            lock.unlink(missing_ok=True)


def _write_pages(folder: Path) -> None:
    results = Results(Study.read(folder))
    if results.sizes:
        with atomic_files(folder / CURVES.file, folder / GAPS.file) as (curves, gap):
            found = {
                member: {size: list(results.runs(member, size).values()) for size in results.sizes}
                for member in results.members
            }
            draw_curves(found, curves)
            draw_gap(results.means(GAP), results.means(ACCURACY), gap)
    shown = document(results.study)
    first, *sections = shown.sections
    html = {"": f"<p><strong>{text(shown.headline)}</strong></p>{blocks(first)}"}
    html |= {section.title: blocks(section, folder) for section in sections}
    atomic_write(folder / HTML_PAGE, page(shown.title, html, {}), errors="backslashreplace")
    atomic_write(folder / MARKDOWN_PAGE, shown.to_markdown(with_plots=True), errors="backslashreplace")


def document(study: Study) -> Document:
    """The pages of a study as a document."""
    results = Results(study)
    sections = [Section("", [_asked(study)]), Section("Networks", list(_networks(study)))]
    if results.sizes:
        sections[1:1] = [Section("What came out", list(_findings(results)))]
        sections += [
            Section("By steps", [CURVES, _CURVES_NOTE]),
            Section("By number of images", [GAPS, _figures(results), _figures_note(study)]),
            *(_differences(results, measure) for measure in COMPARED),
            Section("The paper's order", list(_orders(results))),
            Section("What these runs can resolve", list(_power(results))),
            Section("Learning rates", list(_learning_rates(results))),
        ]
    sections += [Section("What is missing", list(_missing(results))), Section("How it was made", [_provenance(study)])]
    return Document(study.title, _headline(results), [section for section in sections if section.blocks])


def _headline(results: Results) -> str:
    study = results.study
    if not results.sizes:
        failed = sum(run.status == "failed" for run in study.runs)
        left = sum(run.seconds for run in study.runs if run.status != "failed")
        failures = f"; {failed:,} failed" if failed else ""
        return (
            f"Nothing is finished yet: {counted(len(study.runs), 'run')} planned, {_duration(left)} one after the "
            f"other{failures}"
        )
    whole = f"{len(study.finished()):,} of {counted(len(study.runs), 'run')} finished"
    for size in reversed(results.sizes):
        found = results.differences(ACCURACY, size, results.reference)
        words = (*ACCURACY.words, "not resolved")
        groups = {word: [each.member for each in found if each.result == word] for word in words}
        if parts := [f"{word}: {', '.join(names)}" for word, names in groups.items() if names]:
            against = f"Held-out accuracy at {size:,} images against {results.reference}"
            return f"{against}: {'; '.join(parts)} ({whole})"
    return f"{whole}; no difference has an interval yet"


def _asked(study: Study) -> Table:
    height, width = study.resolution
    steps = {size: sorted({run.steps for run in study.runs if run.size == size}) for size in study.sizes}
    lengths = {size: " or ".join(f"{length:,}" for length in found) for size, found in steps.items() if found}
    if len(set(lengths.values())) > 1:
        lengths = {size: f"{shown} with {size:,} images" for size, shown in lengths.items()}
    return Table(
        ("", ""),
        [
            ("question", study.question),
            ("data", f"{study.data}, {counted(study.classes, 'class')}, images of {height} x {width} pixels"),
            ("held out", f"{study.held_out:,} images"),
            ("training images", ", ".join(f"{size:,}" for size in study.sizes)),
            ("steps", "; ".join(dict.fromkeys(lengths.values()))),
            ("seeds", ", ".join(map(str, study.seeds))),
            ("learning rates", ", ".join(f"{rate:g}" for rate in study.learning_rates)),
            ("command", study.command),
        ],
    )


def _networks(study: Study) -> Iterator[str | Table]:
    def rank(member: Member, name: str) -> str:
        return str(getattr(member.paper, name) or "")

    rows = [
        (
            member.name,
            member.description,
            f"{member.parameters:,}",
            f"{member.macs:,}",
            rank(member, "generalization_rank"),
            rank(member, "capacity_rank"),
            member.note,
        )
        for member in study.members
    ]
    header = ("network", "what it is", "parameters", "multiply-accumulates", "paper: generalization",
              "paper: capacity", "note")  # fmt: skip
    shown = [column for column in range(len(header)) if column < 4 or any(row[column] for row in rows)]
    numbers = [place for place, column in enumerate(shown) if 2 <= column <= 5]
    yield Table([header[column] for column in shown], [[row[column] for column in shown] for row in rows], numbers)
    parts = [
        f"{100 * (max(counts) / min(counts) - 1):.1f} % in {what}"
        for what, counts in (
            ("parameters", [member.parameters for member in study.members]),
            ("multiply-accumulates", [member.macs for member in study.members]),
        )
    ]
    ranks = " In the paper's orders 1 is the best, and equal numbers are no difference." if 4 in shown else ""
    yield f"The largest network exceeds the smallest by {' and '.join(parts)}.{ranks}"


def _findings(results: Results) -> Iterator[str]:
    """Sentences on accuracy by number of images, on capacity, and on the orders."""
    compared = [(ACCURACY, size) for size in results.sizes] + [(TRAINING_LOSS, results.sizes[-1])]
    for measure, size in compared:
        found = results.differences(measure, size, results.reference)
        claims = [each.sentence() for each in found if each.found is None or each.found.interval]
        bare = [f"{each.member} {each.shown}" for each in found if each.found and not each.found.interval]
        if bare:
            claims.append(
                f"{measure.title} less that of {results.reference} at {size:,} images, without an interval "
                f"since there is one paired seed or no spread: {', '.join(bare)}."
            )
        yield from [" ".join(claims)] if claims else []
    yield from _agreement(results)
    yield from _correlations(results)
    yield (
        "A network is called better or worse where the 95 % interval of the paired differences excludes 0, and Holm's "
        "correction for the comparisons at that number of images leaves p below 0.05."
    )
    if missing := [f"{size:,}" for size in results.sizes if results.reference not in results.present(size)]:
        sizes = ", ".join(missing)
        yield f"{results.reference}, which all others are compared with, has no finished run at {sizes} images."
    for size in results.sizes:
        runs = [run for member in results.members for run in results.runs(member, size).values()]
        for what, kinds in (
            ("steps", {run.steps for run in runs}),
            ("held-out images", {run.figures.n for run in runs if run.figures}),
        ):
            if len(kinds) > 1:
                shown = ", ".join(f"{kind:,}" for kind in sorted(kinds))
                yield f"Beware: not all runs at {size:,} images have the same number of {what} ({shown})."


def _agreement(results: Results) -> Iterator[str]:
    """How many differences are as in the paper's order, for each measure."""
    for measure in COMPARED:
        parts = []
        for size in results.sizes:
            found = results.differences(measure, size, results.reference)
            if ranked := [each for each in found if each.expected and each.found and each.found.interval]:
                agreeing = sum(each.is_resolved and each.result == each.expected for each in ranked)
                opposed = sum(each.is_resolved for each in ranked) - agreeing
                open_ones = len(ranked) - agreeing - opposed
                parts.append(
                    f"at {size:,} images {agreeing} as in the paper, {opposed} not as in it, {open_ones} not resolved"
                )
        if parts:
            yield (
                f"Differences in {measure.title.lower()} from {results.reference}, beside the paper's order: "
                f"{'; '.join(parts)}."
            )


def _correlations(results: Results) -> Iterator[str]:
    """A sentence on each order that the paper has too."""
    for measure, orders in itertools.groupby(results.orders, key=lambda order: order.measure):
        found = list(orders)
        what = "capacity" if measure is TRAINING_LOSS else "generalization"
        taus = ", ".join(
            f"{each.found.tau:.2f} at {each.size:,} images ({counted(each.found.n, 'network')}, "
            f"{counted(len(each.by_seed), 'seed')}, exact p = {each.found.p:.2f})"
            for each in found
        )
        yield (
            f"By {measure.title.lower()}, Kendall's tau-b with the paper's order of {what} is {taus}"
            + ("." if any(each.found.p < LEVEL for each in found) else ": chance alone could explain it.")
        )


_CURVES_NOTE = (
    "Lines are means over seeds, bands their 95 % intervals. The training loss is smoothed, and that of augmented "
    "images while the weights change; the tables have the loss of training images as they are, with the final weights."
)


def _figures(results: Results) -> Table:
    means = [results.means(measure) for measure in COMPARED]
    rows = [
        (
            f"{size:,}",
            member,
            str(len(results.runs(member, size))),
            *(measure.show(found[member][size]) for measure, found in zip(COMPARED, means, strict=True)),
        )
        for size in results.sizes
        for member in results.present(size)
    ]
    header = ("images", "network", "seeds", "held-out accuracy, %", "gap, points", "training loss")
    return Table(header, rows, (0, 2, 3, 4, 5))


def _figures_note(study: Study) -> str:
    n_train = sorted({run.figures.n_train for run in study.finished() if run.figures})
    return (
        "Means over seeds with 95 % intervals (Student's t; none for one seed). They cover the seed: first weights, "
        "choice and order of the training images. They do not cover the choice of the held-out images, which are the "
        "same for all runs. The gap is the accuracy on training images without augmentation "
        f"({' to '.join(f'{n:,}' for n in sorted({n_train[0], n_train[-1]}))} of them) less that on held-out images."
    )


_DIFFERENCE = ("images", "network", "against", "difference", "95 % interval", "pairs", "p", "result", "paper's order")
_NUMBERS = (0, 3, 4, 5, 6)


def _differences(results: Results, measure: Measure) -> Section:
    against_first = [each for size in results.sizes for each in results.differences(measure, size, results.reference)]
    against_best: list[Difference] = []
    for size in results.sizes:
        present = results.present(size)
        best = results.in_order(measure, present, size)[0]
        if measure is ACCURACY and best != results.reference and len(present) > 2:
            against_best += results.differences(measure, size, best, all_pairs=True)
    content: list[str | Table] = []
    if against_first:
        content = [
            f"Each network less {results.reference}, paired by seed; intervals are those of single comparisons, p is "
            "Holm's over the comparisons at one number of images.",
            _difference_table(against_first),
        ]
    if against_best:
        content += [
            "Each network less the best at its number of images. It was found in these same runs, so that its lead is "
            "too large on average, and p is Holm's over all pairs of networks.",
            _difference_table(against_best),
        ]
    unit = f",{measure.unit}" if measure.unit else ""
    return Section(f"Differences in {measure.title.lower()}{unit}", content)


def _difference_table(found: Sequence[Difference]) -> Table:
    has_paper = any(each.expected for each in found)
    columns = len(_DIFFERENCE) if has_paper else len(_DIFFERENCE) - 1
    return Table(_DIFFERENCE[:columns], [each.row()[:columns] for each in found], _NUMBERS)


def _orders(results: Results) -> Iterator[str | Table]:
    for what, name in (("generalization", "generalization_rank"), ("capacity", "capacity_rank")):
        ranked = [member for member in results.study.members if getattr(member.paper, name) is not None]
        if len(ranked) > 1:
            ranked.sort(key=lambda member: getattr(member.paper, name))
            order = ranked[0].name
            for before, after in itertools.pairwise(ranked):
                order += f" {'=' if getattr(before.paper, name) == getattr(after.paper, name) else '>'} {after.name}"
            yield f"The paper's order of {what}: {order}."
    if results.orders:
        header = ("by", "images", "tau-b", "exact p", "tau-b of each seed", "order here, best first")
        yield Table(header, [order.row() for order in results.orders], (1, 2, 3))
        yield (
            "Kendall's tau-b is 1 for the paper's order and -1 for its reverse; p is the fraction of all orders that "
            "are at least as far from 0. Means are those of the seeds that all networks finished. The paper orders "
            "generalization by the gap; held-out accuracy depends on capacity as well, the more so with many images."
        )


def _power(results: Results) -> Iterator[str | Table]:
    rows = []
    for size, measure in itertools.product(results.sizes, COMPARED):
        found = [each.found for each in results.differences(measure, size, results.reference)]
        spread = [each for each in found if each is not None and each.interval is not None]
        if not spread:
            continue
        pooled = math.sqrt(math.fsum(each.spread**2 for each in spread) / len(spread))
        typical = Estimate(0.0, pooled, min(each.n for each in spread))
        assert typical.detectable is not None and typical.interval is not None
        numbers = (pooled, typical.interval[1], typical.detectable)
        shown = (f"{number:.{measure.digits}f}{measure.unit}" for number in numbers)
        rows.append((f"{size:,}", measure.title.lower(), str(typical.n), *shown))
    if rows:
        header = ("images", "in", "pairs", "spread of a pair", "half an interval", "found 4 times of 5")
        yield Table(header, rows, (0, 2, 3, 4, 5))
        yield (
            "The last column is the true difference between two networks whose interval excludes 0 in 80 % of studies "
            f"with as many pairs and this spread, that of the differences from {results.reference}. Holm's correction "
            "and smaller differences need more seeds: “not resolved” is not “equal”."
        )


def _learning_rates(results: Results) -> Iterator[str | Table]:
    if len(results.study.learning_rates) < 2:
        return
    rows = [
        (
            f"{size:,}",
            member,
            f"{rate:g}",
            str(len(runs)),
            *(measure.show(estimate(figures_by_seed(measure, runs).values())) for measure in COMPARED),
            "chosen" if rate == results.rates[member, size] else "",
        )
        for size in results.sizes
        for member in results.present(size)
        for rate, runs in sorted(results.by_rate[member, size].items())
    ]
    header = ("images", "network", "rate", "seeds", "held-out accuracy, %", "gap, points", "training loss", "")
    yield (
        "Everywhere else on this page each network has, at each number of images, the rate with the most finished "
        "seeds and among those the highest mean held-out accuracy. That choice uses the held-out images, so accuracies "
        "are slightly too high, for all networks alike."
    )
    yield Table(header, rows, (0, 2, 3, 4, 5, 6))


def _missing(results: Results) -> Iterator[str | Table]:
    study = results.study
    failed = [run for run in study.runs if run.status == "failed"]
    if failed:
        rows = [
            (run.member, f"{run.size:,}", str(run.seed), f"{run.learning_rate:g}", run.reason or "") for run in failed
        ]
        yield f"{counted(len(failed), 'run')} failed; differences are those of the seeds that both networks finished."
        yield Table(("network", "images", "seed", "rate", "reason"), rows, (1, 2, 3))
    waiting = [run for run in study.runs if run.status == "planned"]
    if waiting:
        counts = Counter((run.size, run.member) for run in waiting)
        rows = [(f"{size:,}", member, str(counts[size, member])) for size in study.sizes for member in results.members
                if counts[size, member]]  # fmt: skip
        left = _duration(sum(run.seconds for run in waiting))
        yield f"{counted(len(waiting), 'run')} not finished, {left} one after the other. The same command resumes them."
        yield Table(("images", "network", "runs"), rows, (0, 2))


def _provenance(study: Study) -> Table:
    taken = sum(run.seconds for run in study.finished())
    rows = [
        ("machine", study.machine),
        ("software", ", ".join(f"{name} {version}" for name, version in study.versions.items())),
        ("training", f"{counted(len(study.finished()), 'run')}, {_duration(taken)} together"),
        *(
            ("recipe: " + name, "none" if value is None else str(value))
            for name, value in flatten(study.recipe).items()
            if name != "data"
        ),
    ]
    return Table(("", ""), rows)


def _duration(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `3.5 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.1f} hours"
