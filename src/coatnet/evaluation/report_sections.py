"""What a report says, in sections of plain text and tables; sections without content are left out."""

from collections.abc import Mapping
from typing import Any

from coatnet.errors import counted
from coatnet.evaluation.metrics import FIGURES, ClassFigures, wilson_interval
from coatnet.evaluation.report import Report
from coatnet.system.document import Document, Plot, Section, Table

MAX_OPEN_TABLE_ROWS = 50  # chosen: a longer table is folded


def document(report: Report) -> Document:
    """The report as a document."""
    headline = report.headline()
    sections = [
        Section("", [*report.context(), *report.notes]),
        Section("", [figures_table(report)]),
        _confusion(report),
        _classes(report),
        _mistakes(report),
        suspects_section(report),
        Section("Can the probabilities be trusted?", [calibration_sentence(report), CALIBRATION_PLOT]),
        reliability_section(report),
        slices_section(report),
        _bad_images(report),
        Section("How it was made", [Table(("", ""), provenance(report))]),
    ]
    title = f"{report.model} on {report.data}"
    return Document(title, headline[0].upper() + headline[1:], [section for section in sections if section.blocks])


CALIBRATION_PLOT = Plot("Accuracy at each level of probability", "calibration.png")


def figures_table(report: Report) -> Table:
    """Each figure with its interval and its meaning."""
    rows = [
        (figure.title, report.format_figure(name), report.format_interval(name), figure.meaning)
        for name, figure in FIGURES.items()
        if name in report.figures
    ]
    return Table(("figure", "value", "95 % interval", "what it says"), rows, (1, 2))


def _confusion(report: Report) -> Section:
    if report.multilabel:
        return Section("", [])
    plot = [Plot("Confusion matrix: true classes down, predicted classes across", "confusion.png")]
    support = {name: row.support for name, row in zip(report.classes, report.per_class, strict=True)}
    rows = [
        (truth, predicted, f"{count:,}", percent(count / support[truth]))
        for truth, predicted, count in report.confused_pairs
    ]
    table = Table(("truth", "taken for", "images", "of the class"), rows, (2, 3))
    said = table if rows else "Nothing: every image was classified right."
    return Section("What is taken for what", [*(plot if report.confusion is not None else []), said])


def _classes(report: Report) -> Section:
    table = class_table(report)
    if len(table.rows) <= MAX_OPEN_TABLE_ROWS:
        return Section("Classes, weakest first", [table])
    few = Table(table.header, table.rows[:10], table.numbers)
    whole = Table(table.header, table.rows, table.numbers, f"All {len(table.rows):,} classes, weakest first")
    return Section("The ten weakest classes", [few, whole])


def class_table(report: Report) -> Table:
    """The figures of each class, weakest first."""
    measure = "average_precision" if report.multilabel else "f1"

    def weakest_first(item: tuple[str, ClassFigures]) -> tuple:
        value = getattr(item[1], measure)
        return (item[1].support == 0, value is None, value)

    ordered = sorted(zip(report.classes, report.per_class, strict=True), key=weakest_first)
    columns = ["recall", "precision", "f1"] + ["average_precision"] * report.multilabel
    header = ["class", "images"] + [name.replace("_", " ").replace("f1", "F1") for name in columns]
    rows = [[name, f"{row.support:,}"] + [percent(getattr(row, column)) for column in columns] for name, row in ordered]
    return Table(header, rows, range(1, len(header)))


def _mistakes(report: Report) -> Section:
    if not report.mistakes:
        return Section("", [])
    plot = [Plot("The worst mistakes: truth, and what the model saw instead", "mistakes.png")]
    rows = [
        (str(number), wrong.image, wrong.truth, wrong.predicted, percent(wrong.probability))
        for number, wrong in enumerate(report.mistakes, start=1)
    ]
    table = Table(("", "image", "truth", "prediction", "probability"), rows, (0, 4))
    return Section("Worst mistakes", [WORST_MISTAKES, *(plot if report.thumbnails else []), table])


def suspects_section(report: Report) -> Section:
    """Images whose label may be the mistake."""
    found = report.suspects()
    if not found:
        return Section("", [])
    first = f", the first {MAX_LISTED_SUSPECTS}" if len(found) > MAX_LISTED_SUSPECTS else ""
    note = (
        f"{counted(len(found), 'image')}: another class is predicted as surely as images of that class usually are "
        f"(confident learning){first}. Look at them; `coatnet doctor --labels` judges the training images as well."
    )
    rows = [(*names, percent(score)) for *names, score in found[:MAX_LISTED_SUSPECTS]]
    return Section(SUSPECTS, [note, Table(("image", "label", "rather", "probability of the label"), rows, (3,))])


SUSPECTS, MAX_LISTED_SUSPECTS = "Labels that look wrong", 20
WORST_MISTAKES = "Sure and wrong: a hard image, a wrong label, or something the model never saw."


def calibration_sentence(report: Report) -> str:
    """Mean probability beside accuracy; that they differ is said only where so many images can tell."""
    total = sum(row.count for row in report.calibration)
    sure = sum(row.count * row.confidence for row in report.calibration if row.confidence is not None) / total
    right = sum(row.count * row.accuracy for row in report.calibration if row.accuracy is not None) / total
    gap, n = sure - right, int(report.figures["n"])
    low, high = wilson_interval(round(right * n), n)
    if report.multilabel:
        sentence = f"Labels get {percent(sure)} on average and {percent(right)} of them are there"
    else:
        sentence = f"The first guess gets {percent(sure)} on average and is right for {percent(right)}"
    # Of labels that few images have, both are below 0.01.
    balanced = abs(gap) < 0.01 and (not report.multilabel or abs(gap) <= 0.1 * max(sure, right))
    if not balanced and low <= sure <= high:
        return (
            f"{sentence} (95 % interval {100 * low:.1f} to {100 * high:.1f}): {report.format_num_images()} cannot tell "
            "whether the probabilities are too high or too low."
        )
    verdict = "well balanced" if balanced else "too high" if gap > 0 else "too low"
    return f"{sentence}: on the whole the probabilities are {verdict}."


def reliability_section(report: Report) -> Section:
    """What calibration, refusals and sets of classes of a calibrated model reach."""
    found = report.reliability
    if found is None:
        return Section("", [])
    shared = f"{found.num_shared:,} of these images" if found.num_shared < report.figures["n"] else "these images"
    measured = (
        f" The calibration was fitted to {shared}; each is measured with what was fitted without it."
        if found.num_shared
        else " The calibration was fitted to other images."
    )
    right = "all labels right" if report.multilabel else "right"
    selective = [(percent(row.answered), percent(row.accuracy), _span(row.interval)) for row in found.selective]
    refused = [(percent(row.asked), percent(row.refused), _span(row.interval)) for row in found.refusals]
    sets = [
        (row.method.upper(), percent(row.asked), percent(row.coverage), _span(row.interval), f"{row.mean_size:.2f}")
        for row in found.sets
    ]
    per_class = [
        (name, f"{row.support:,}", *(percent(each.class_coverage[number]) for each in found.sets))
        for number, (name, row) in enumerate(zip(report.classes, report.per_class, strict=True))
    ]
    blocks: list[str | Table] = [
        f"Expected calibration error {percent(found.error_before)} as the network gives its probabilities, "
        f"{percent(found.error_after)} calibrated (temperature {found.temperature:.2f}).{measured}",
        "Accuracy where the most novel images are refused:",
        Table(("answered", right, "95 % interval"), selective, (0, 1, 2)),
        "Images refused at some thresholds of --reject:",
        Table(("asked for", "refused", "95 % interval"), refused, (0, 1, 2)),
    ]
    if sets:
        header = ("method", "asked for", "hold the truth", "95 % interval", "classes in a set")
        methods = [row.method.upper() for row in found.sets]
        blocks += [
            "Sets of classes that are to hold the truth (--set):",
            Table(header, sets, (1, 2, 3, 4)),
            Table(("class", "images", *methods), per_class, range(1, 2 + len(sets)), "How many hold it, by class"),
        ]
    return Section("Refusals and sets of classes", blocks)


def _span(interval: tuple[float, float]) -> str:
    return " to ".join(f"{100 * bound:.1f}" for bound in interval)


def slices_section(report: Report) -> Section:
    """Accuracy by image size, brightness and folder."""
    if not report.slices:
        return Section("", [])
    whole = sum(each.count * each.accuracy for each in report.slices if each.kind == report.slices[0].kind) / sum(
        each.count for each in report.slices if each.kind == report.slices[0].kind
    )
    rows = [
        (
            each.kind,
            each.name,
            f"{each.count:,}",
            percent(each.accuracy),
            _span(each.interval),
            "" if each.interval[0] <= whole <= each.interval[1] else "lower" if each.accuracy < whole else "higher",
        )
        for each in report.slices
    ]
    measure = "all labels right" if report.multilabel else "right"
    note = (
        f"All {len(rows)} intervals hold at once with 95 % (Bonferroni): of so many groups, one looks bad by chance. A "
        f"group is called lower or higher if its interval excludes the {percent(whole)} of all images."
    )
    header = ("by", "group", "images", measure, "interval", "than all images")
    return Section("Groups of images", [note, Table(header, rows, (2, 3, 4))])


def _bad_images(report: Report) -> Section:
    if not report.bad_images:
        return Section("", [])
    note = f"They are not in the figures above ({len(report.bad_images):,})."
    return Section("Images that could not be read", [note, Table(("image", "reason"), [*report.bad_images.items()])])


def provenance(report: Report) -> list[tuple[str, str]]:
    """What was measured, and how the model came about."""
    speed = report.figures["n"] / max(report.seconds, 1e-9)
    return [
        ("data", f"{report.data}, {report.split}, {report.format_num_images()}"),
        ("model", f"{report.model}, {report.num_parameters / 1e6:,.2f} M parameters"),
        ("resolution", f"{report.resolution} pixels"),
        *([("views of an image", report.views)] if report.views != "one" else []),
        *([("training", describe_training(report.training))] if report.training else []),
        *([("software", str(report.training["software"]))] if "software" in report.training else []),
        ("evaluation", f"{report.seconds:,.1f} s, {speed:,.0f} images/s"),
    ]


def describe_training(training: Mapping[str, Any]) -> str:
    """`12.0 epochs of 10,800 images, 1,013 steps in 45.2 minutes on CPU, 2 cores, bf16`, as far as it is known."""
    parts = [
        f"{training['epochs']:,.1f} epochs" if "epochs" in training else "",
        f"{training['images']:,} images" if "images" in training else "",
    ]
    text = " of ".join(part for part in parts if part)
    text += f", {training['steps']:,} steps" if "steps" in training else ""
    text += f" in {training['minutes']:,.1f} minutes" if "minutes" in training else ""
    text += f" on {training['hardware']}" if "hardware" in training else ""
    return text + (f", {training['precision']}" if "precision" in training else "")


def percent(share: float | None) -> str:
    """`94.1 %`; nothing for None."""
    return "" if share is None else f"{100 * share:.1f} %"
