"""`coatnet calibrate`: fit probabilities, novelty and sets of classes of a model to held-out images."""

import argparse
from collections.abc import Sequence

from coatnet.cli.parser import BUNDLE_HELP, DATA_HELP, Parser
from coatnet.system.terminal import echo_summary


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "calibrate",
        "Fit a trained model to images that it was not trained on: temperatures, so that its probabilities are right\n"
        "as often as they say; a score of novelty, by which it answers `unknown` (predict --reject); thresholds for\n"
        "sets of classes that hold the truth (predict --set). `coatnet train` does this at its end. With one\n"
        "label per image, the most likely class stays the same.",
        "examples:\n"
        "  coatnet calibrate runs/mine --data path/to/folder               # the model is replaced, all or nothing\n"
        f"  coatnet calibrate runs/mine --data other/images --split all --out calibrated\n\n{DATA_HELP}",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--data", required=True, metavar="DATA", help="labeled images, see below")
    parser.add_argument(
        "--split",
        choices=("validation", "training", "all"),
        default="validation",
        help="which part of the data (validation)",
    )
    parser.add_argument("--out", metavar="BUNDLE", help="folder for the calibrated model (by default it is replaced)")
    parser.add_batch_size()
    parser.add_max_megapixels()
    parser.add_device()
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Calibrate a model and write it."""
    given = parse_arguments(arguments)
    from coatnet.bundle.bundle import find_folder, require_bundle_place
    from coatnet.errors import UserError
    from coatnet.evaluation import calibrate
    from coatnet.system.files import user_path
    from coatnet.system.progress import ProgressBar

    source = user_path(given.bundle)
    if given.out is None and not source.is_dir():
        raise UserError(f"there is no folder {given.bundle}; to calibrate a model of the hub, name one with --out")
    target = require_bundle_place(given.out or find_folder(source))
    with ProgressBar("calibrating") as bar:
        bundle = calibrate(
            given.bundle,
            given.data,
            split=given.split,
            batch_size=given.batch_size,
            device=given.device,
            progress=bar.update,
        )
    bundle.model.cpu()
    bundle.save(target)
    assert bundle.calibration is not None
    fitted = bundle.calibration.temperature[0]
    text = f"{fitted[0]:.3g}" if len(fitted) == 1 else f"{fitted.min():.3g} to {fitted.max():.3g}"
    echo_summary(f"{target}: calibrated by {len(bundle.calibration.images):,} images, temperature {text}")
    return 0
