"""`coatnet push`: publish a trained model on the Hugging Face hub."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from coatnet.cli.parser import Parser
from coatnet.system.terminal import echo_summary, telling


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
    from coatnet.bundle.bundle import find_folder, load
    from coatnet.bundle.hub import upload

    folder = find_folder(Path(given.bundle))
    load(folder)  # a damaged bundle is not published
    with telling("uploading"):
        address = upload(folder, given.repository, private=given.private)
    echo_summary(address)
    return 0
