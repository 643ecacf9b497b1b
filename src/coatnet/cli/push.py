"""`coatnet push`: publish a trained model on the Hugging Face hub."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

from coatnet.cli.parser import Parser
from coatnet.system.terminal import echo, echo_summary, report_wait


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "push",
        "Publish a trained model on the Hugging Face hub: weights, config and model card in one commit.\n"
        "Log in first (`hf auth login`) or set HF_TOKEN.",
        "examples:\n"
        "  coatnet push runs/mine/bundle my-name/garments\n"
        "  coatnet predict hf://my-name/garments image.jpg      # then works for anyone, anywhere",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of a trained model: RUN/bundle, or its run folder RUN")
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository on the hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="if the repository is created: make it private")
    return parser.parse(arguments)


def run(arguments: Sequence[str]) -> int:
    """Publish a trained model and print its address."""
    given = parse_arguments(arguments)
    from coatnet.bundle.bundle import find_folder, load, without_places
    from coatnet.bundle.hub import CARD, upload
    from coatnet.system.files import user_path

    folder = find_folder(user_path(given.bundle))
    bundle = load(folder)  # a damaged bundle is not published
    with TemporaryDirectory() as place:
        if bundle.record != (record := without_places(bundle.record)):  # written by an earlier release
            echo("the paths of this machine in config.json and README.md are left out", error=True)
            shared = Path(place, "bundle")
            replace(bundle, record=record).save(shared)
            card = folder / CARD
            if card.is_file() and not mentions_places(card, bundle.record):
                copyfile(card, shared / CARD)  # perhaps written by hand
            folder = shared
        with report_wait("uploading"):
            address = upload(folder, given.repository, private=given.private)
    echo_summary(address)
    return 0


def mentions_places(card: Path, record: Mapping[str, Any]) -> bool:
    """Whether a model card holds the place of the data or of the bundle to start from."""
    recipe, text = record.get("recipe"), card.read_text(encoding="utf-8", errors="replace")
    places = [recipe.get(name) for name in ("data", "init")] if isinstance(recipe, Mapping) else []
    return any(isinstance(place, str) and place and place in text for place in places)
