"""Arguments of `coatnet serve`."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from coatnet.cli.arguments.parser import BUNDLE_HELP, Parser
from coatnet.errors import UserError

NAME = re.compile(r"[\w.-]{1,100}")
TOKEN = re.compile(r"[\x21-\x7e]{8,}")  # what a header can carry


def serve_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """What was given, and the bundles by the names that clients use."""
    parser = Parser(
        "serve",
        "Answer over HTTP: a page at /, predictions at /predict, the Open Inference Protocol at /v2, documentation at\n"
        "/docs, figures for Prometheus at /metrics. SIGTERM ends it when what is under way is answered.",
        "examples:\n"
        "  coatnet serve runs/mine/bundle\n"
        "  coatnet serve garments=runs/clothes/bundle flowers=runs/flowers/bundle --port 9000\n"
        "  curl --data-binary @image.jpg 'http://127.0.0.1:8080/predict?top_k=3'\n\n"
        "A token that clients must send (Authorization: Bearer TOKEN) is read from the file of --token-file or from\n"
        "the variable COATNET_TOKEN. Without one, whoever reaches the port may ask.",
    )
    parser.add_argument("bundles", nargs="+", metavar="[NAME=]BUNDLE", help=BUNDLE_HELP)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="address to listen at; 0.0.0.0 is all (127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8080, metavar="P", help="0 takes a free one (8080)")
    parser.add_argument(
        "--engine", default="auto", metavar="E", help="torch, torch-compiled, openvino, onnxruntime (auto)"
    )
    parser.add_argument("--precision", default="auto", metavar="P", help="fp32 or bf16 (auto)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images computed together, at the most (16)")
    parser.add_argument("--delay-ms", type=float, metavar="MS", help="how long a batch waits for more (5)")
    parser.add_argument("--queue", type=int, metavar="N", help="images a model takes on, above that 503 (64)")
    parser.add_argument("--max-megabytes", type=float, metavar="MB", help="of one upload (20)")
    parser.add_argument("--deadline", type=float, metavar="S", help="seconds for an answer (30)")
    parser.add_argument("--token-file", metavar="FILE", help="holds the token that clients must send")
    given = parser.parse(arguments)
    return given, named_bundles(given.bundles)


def named_bundles(given: Sequence[str]) -> dict[str, str]:
    """`NAME=BUNDLE`, or a bundle that lends its own name: RUN of RUN/bundle, else the last part."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            parts = [part for part in Path(text).parts if part not in ("bundle", "/", ".", "..")]
            name, source = (parts[-1].partition("@")[0] if parts else "model"), text
            name = re.sub(r"[^\w.-]", "-", name)
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} is no name for a model: letters, digits, '.', '_' and '-'")
        if not source:
            raise UserError(f"{text!r} names no bundle; write {name}=BUNDLE")
        if name in found:
            raise UserError(f"two models are called {name!r}; write NAME=BUNDLE for one of them")
        found[name] = source
    return found


def read_token(file: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token of the file, else of COATNET_TOKEN; not of the command line, which everybody on the machine sees."""
    if file is not None:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--token-file {file} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        origin = f"--token-file {file}"
    elif "COATNET_TOKEN" in environment:
        token, origin = environment["COATNET_TOKEN"].strip(), "COATNET_TOKEN"
    else:
        return None
    if not TOKEN.fullmatch(token):
        raise UserError(f"{origin} holds no token: at least 8 letters, digits or signs in ASCII, without spaces")
    return token
