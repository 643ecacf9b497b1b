"""`coatnet doctor`: check a data source before training on it."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import BUNDLE_HELP, DATA_HELP, FAILED, Parser
from coatnet.errors import counted
from coatnet.system.files import require_absent
from coatnet.system.terminal import echo


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "doctor",
        "Read every image and report what is there: classes and sizes, unreadable files with the reason, copies and\n"
        "near copies, those with conflicting labels or in two of training, validation and test, classes that size,\n"
        "brightness or color give away. With --labels also wrong labels, outliers and classes that look the same.\n"
        "Exit code 1 if an image is unreadable or in two of the splits; with --strict also if one decodes\n"
        "only with a warning.",
        "examples:\n"
        "  coatnet doctor path/to/folder\n"
        "  coatnet doctor labels.csv --strict --json\n"
        "  coatnet doctor path/to/folder --labels --model runs/mine --html suspects.html --write path/to/fixed.csv\n"
        f"  coatnet train --data path/to/fixed.csv --out runs/next     # once its column label is right\n\n{DATA_HELP}",
    )
    parser.add_argument("data", metavar="DATA", help="a data source, see below")
    parser.add_argument("--strict", action="store_true", help="also report files that decode only with a warning")
    parser.add_argument(
        "--labels", action="store_true", help="also look for wrong labels, by the features of the model of --model"
    )
    parser.add_argument(
        "--model", metavar="BUNDLE", help=f"with --labels: {BUNDLE_HELP}; auto: the published one that suits the images"
    )
    parser.add_argument(
        "--write",
        metavar="FILE.csv",
        help="table for `coatnet train --data` without copies and unreadable images: path, label, split; with --labels "
        "also suggested and score, the worst first",
    )
    parser.add_argument("--html", metavar="FILE.html", help="page with the images that were found, the worst first")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, for a program")
    parser.add_max_megapixels()
    parser.add_device()
    given = parser.parse(arguments)
    if given.labels and not given.model:
        parser.error(
            "--labels needs --model: a bundle of your own, such as one trained on these images, or auto, the published "
            "network that suits them, which is fetched once"
        )
    for name, ending in (("write", ".csv"), ("html", ".html")):
        path = getattr(given, name)
        if path and not path.lower().endswith(ending):
            parser.error(f"--{name} {path} is no {ending}")
        if path:
            require_absent(path)
    if given.model and not given.labels:
        parser.error("--model is for --labels: give that as well")
    return given


def run(arguments: Sequence[str]) -> int:
    """Check a data source and print what was found."""
    given = parse_arguments(arguments)
    from coatnet.bundle.config import readable_json
    from coatnet.data.inspection import inspect
    from coatnet.data.open import open_dataset
    from coatnet.data.shards.dataset import ShardDataset

    splits = open_dataset(given.data)
    for part in splits.parts.values():
        if isinstance(part, ShardDataset):
            part.verify_when_read()
    if given.write:
        from coatnet.evaluation.findings import require_table

        require_table(given.write, splits)
    opened = None
    if given.labels:
        from coatnet.evaluation.label_check import open_for_labels

        opened = open_for_labels(given.model, splits, given.device)
    inspection, check = inspect(splits, strict=given.strict), None
    try:
        if opened is not None:
            from coatnet.evaluation.label_check import check_opened

            check = check_opened(opened._replace(splits=inspection.splits))
        if given.write:
            from coatnet.evaluation.findings import write_table

            write_table(given.write, inspection, check)
        if given.html:
            from coatnet.evaluation.findings import write_page

            write_page(given.html, inspection, check)
    finally:  # the findings are printed even if labels cannot be checked or files not written
        if given.json:
            labels = {"labels": check.to_dict()} if check else {}
            echo(readable_json(inspection.to_dict() | labels), end="", is_json=True)
        else:
            if check:
                echo(check.describe())
            echo(inspection.describe())
    if given.write and not given.json:
        reasons = list(inspection.left_out.values())
        left_out = [f"{reasons.count(reason):,} {reason}" for reason in dict.fromkeys(reasons)]
        without = f", without {', '.join(left_out)}" if left_out else ""
        echo(f"{given.write}: {counted(len(inspection.rows()), 'image')}{without}")
    return 0 if inspection.healthy else FAILED
