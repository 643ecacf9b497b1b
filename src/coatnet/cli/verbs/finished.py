"""The verbs that use a finished model."""

import sys
from collections.abc import Mapping, Sequence

from coatnet.cli.arguments.finished import (
    evaluate_arguments,
    features_arguments,
    probe_arguments,
    push_arguments,
)
from coatnet.cli.verbs.exit_codes import FAILED
from coatnet.system.hardware import best_device


def evaluate(arguments: Sequence[str]) -> int:
    """Measure a finished model."""
    given = evaluate_arguments(arguments)
    from coatnet.bundle import load
    from coatnet.evaluation.evaluate import evaluate as evaluate_bundle
    from coatnet.system.progress import ProgressBar

    bundle = load(given.bundle)
    bundle.model.to(best_device())
    with ProgressBar("measuring") as bar:
        report = evaluate_bundle(bundle, given.data, split=given.split, progress=bar.update)
    print(report.to_json() if given.json else report.to_markdown(), end="")
    return 0


def features(arguments: Sequence[str]) -> int:
    """Write the features of images to a file."""
    given = features_arguments(arguments)
    from coatnet.bundle import load
    from coatnet.data.find_images import open_images
    from coatnet.evaluation.feature_files import write_features
    from coatnet.evaluation.features import extract

    bundle = load(given.bundle)
    bundle.model.to(best_device())
    data = given.data or open_images(given.images)
    found = extract(bundle, data, split=given.split, batch_size=given.batch_size)
    print(f"{given.out}: {write_features(found, given.out):,} images, {found.num_features:,} features each")
    return show_bad_images(found.bad_images)


def show_bad_images(bad_images: Mapping[str, str]) -> int:
    """A line for each image that is left out; the exit code."""
    for name, reason in bad_images.items():
        print(f"coatnet: error: {name}: {reason}", file=sys.stderr)
    return FAILED if bad_images else 0


def probe(arguments: Sequence[str]) -> int:
    """Judge a model's features."""
    given = probe_arguments(arguments)
    from coatnet.bundle import load
    from coatnet.evaluation.probe import probe as probe_bundle

    bundle = load(given.bundle)
    bundle.model.to(best_device())
    report = probe_bundle(bundle, given.data, k=given.k)
    print(report.to_json() if given.json else report.to_text(), end="")
    return 0


def push(arguments: Sequence[str]) -> int:
    """Publish a finished model on the hub."""
    given = push_arguments(arguments)
    from pathlib import Path

    from coatnet.bundle import load
    from coatnet.bundle.upload import upload

    load(given.bundle)  # what cannot be used is not published
    print(upload(Path(given.bundle), given.repository, private=given.private))
    return 0
