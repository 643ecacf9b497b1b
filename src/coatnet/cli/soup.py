"""`coatnet soup`: average trained models that started from the same weights."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import DATA_HELP, Parser
from coatnet.cli.runs import data_of
from coatnet.errors import UserError
from coatnet.system.terminal import echo, echo_summary, summary_of_a_write


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "soup",
        "Average the weights of models that started from the same weights and were trained differently (other seeds,\n"
        "learning rates, augmentation). The best one is taken first, then each other one, from the best down, if the\n"
        "accuracy of the average on held-out images does not fall with it. The average costs no more than one model.",
        "examples:\n"
        "  coatnet soup runs/a runs/b runs/c --out runs/average            # runs of train finetune from one bundle\n"
        f"  coatnet soup runs/a runs/b --data other/images --out average\n\n{DATA_HELP}",
    )
    parser.add_argument("models", nargs="+", metavar="RUN", help="runs, bundles or ids of the hub, two or more")
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="folder for the averaged model")
    parser.add_argument(
        "--data", metavar="DATA", help="images to choose by, see below; by default those of the first run"
    )
    parser.add_argument("--uniform", action="store_true", help="average all of them, whatever the images say")
    parser.add_batch_size()
    parser.add_argument("--json", action="store_true", help="print the models and figures as JSON, for a program")
    parser.add_max_megapixels()
    parser.add_device()
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Average models, write the bundle, and print which were taken."""
    given = parse_arguments(arguments)
    from coatnet.bundle.bundle import require_bundle_place
    from coatnet.bundle.config import readable_json
    from coatnet.data.open import NAMES
    from coatnet.evaluation import soup
    from coatnet.system.files import user_path

    target = require_bundle_place(given.out, sources=given.models)
    data = given.data or data_of(user_path(given.models[0]))
    if data is None and not given.uniform:
        raise UserError(f"--data is missing: {given.models[0]} is not the folder of a run, which would name its images")
    recorded = data if given.uniform and given.data is None else None
    if recorded and recorded not in NAMES and "://" not in recorded and not user_path(recorded).exists():
        echo(f"coatnet: {recorded} is not there any more, so nothing is measured", error=True)
        data = None
    made = soup(given.models, data, uniform=given.uniform, batch_size=given.batch_size, device=given.device)
    figures = (readable_json(made.bundle.record["soup"]) if given.json else made.to_text()).rstrip()
    with summary_of_a_write(figures):
        made.bundle.save(target)
    if not given.json:
        echo_summary(f"The averaged model is {given.out}.")
    return 0
