"""`coatnet serve`: answer over HTTP with trained models."""

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from coatnet.cli.parser import BUNDLE_HELP, FAILED, Parser, calibrated_options
from coatnet.errors import UserError, import_extra
from coatnet.system.files import read_regular
from coatnet.system.terminal import report_wait

HOST_NAME = re.compile(r"[\w.-]+|\*")
NAME = re.compile(r"[\w.-]{1,100}")
TOKEN = re.compile(r"[\x21-\x7e]{8,}")  # the characters that a header can carry
MAX_TOKEN_BYTES = 65_536


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "serve",
        "Answer over HTTP: a page at /, predictions at /predict, the Open Inference Protocol at /v2, documentation at\n"
        "/docs, metrics for Prometheus at /metrics. SIGTERM ends it after the requests in progress are answered.",
        "examples:\n"
        "  coatnet serve runs/mine\n"
        "  coatnet serve garments=runs/clothes flowers=runs/flowers --port 9000\n"
        "  curl --data-binary @image.jpg 'http://127.0.0.1:8080/predict?top_k=3'\n\n"
        "The token that clients must send (Authorization: Bearer TOKEN) is read from --token-file or from the\n"
        "environment variable COATNET_TOKEN. Without one there is no authentication.",
    )
    parser.add_argument("bundles", nargs="+", metavar="[NAME=]BUNDLE", help=BUNDLE_HELP)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="address to listen on; 0.0.0.0 is all (127.0.0.1)"
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which clients address the server, for each one (localhost, addresses, H, this machine's name)",
    )
    parser.add_argument("--port", type=int, default=8080, metavar="P", help="port; 0 takes a free one (8080)")
    parser.add_engine()
    parser.add_calibrated()
    parser.add_argument("--batch-size", type=int, metavar="N", help="most images computed together (16)")
    parser.add_argument("--delay-ms", type=float, metavar="MS", help="how long a batch waits for more images (5)")
    parser.add_argument("--queue", type=int, metavar="N", help="images that may wait for a model; more get a 503 (64)")
    parser.add_argument("--max-megabytes", type=float, metavar="MB", help="largest upload (20)")
    parser.add_argument("--deadline", type=float, metavar="S", help="seconds within which to answer (30)")
    parser.add_argument("--token-file", metavar="FILE", help="file with the token that clients must send")
    parser.add_max_megapixels()
    parser.add_device()
    given = parser.parse(arguments)
    given.bundles = named_bundles(given.bundles)
    for option in ("delay_ms", "max_megabytes", "deadline"):
        value = getattr(given, option)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{option.replace('_', '-')} is {value:g}; give a finite number that is not negative")
    for host in given.allowed_host:
        if not HOST_NAME.fullmatch(host):
            raise UserError(f"--allowed-host {host!r} is not a host name, such as models.example.com, nor '*'")
    return given


def named_bundles(given: Sequence[str]) -> dict[str, str]:
    """Bundles by the names that clients use: NAME of `NAME=BUNDLE`, RUN of `RUN/bundle`, else the last part."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            place = text if Path(text).exists() else text.partition("@")[0]  # of the hub, without a revision
            parts = [part for part in Path(place).parts if part not in ("bundle", "/", ".", "..")]
            name, source = (parts[-1] if parts else "model"), text
            name = re.sub(r"[^\w.-]", "-", name)
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} is not a name for a model: letters, digits, '.', '_' and '-'")
        if not source:
            raise UserError(f"{text!r} names no bundle; write {name}=BUNDLE")
        if name in found:
            raise UserError(f"two models are called {name!r}; write NAME=BUNDLE for one of them")
        found[name] = source
    return found


def read_token(file: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token of the file, else of COATNET_TOKEN; never of the command line, which all users of a machine see.

    Raises:
        UserError: there is none, or the file belongs to this user and others may read it: the rule of ssh for keys.
    """
    if file is not None:
        try:
            token = read_regular(file, MAX_TOKEN_BYTES).decode().strip()
            status = Path(file).stat()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--token-file {file} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        if os.name == "posix" and status.st_uid == os.getuid() and status.st_mode & 0o077:
            raise UserError(f"--token-file {file} can be read by other users of this machine: chmod 600 {file}")
        origin = f"--token-file {file}"
    elif "COATNET_TOKEN" in environment:
        token, origin = environment["COATNET_TOKEN"].strip(), "COATNET_TOKEN"
    else:
        return None
    if not TOKEN.fullmatch(token):
        raise UserError(f"{origin} holds no token: at least 8 letters, digits or signs in ASCII, without spaces")
    return token


def run(arguments: Sequence[str]) -> int:
    """Serve trained models until a signal ends it."""
    given = parse_arguments(arguments)
    token = read_token(given.token_file)
    with report_wait("loading torch"):
        for package in ("fastapi", "prometheus_client", "uvicorn"):
            import_extra(package, "serve", "the server")
        from coatnet.server import Settings
        from coatnet.server.main import serve

    max_bytes = None if given.max_megabytes is None else int(given.max_megabytes * 2**20)
    limits = {
        "batch_size": given.batch_size,
        "delay_seconds": None if given.delay_ms is None else given.delay_ms / 1e3,
        "max_queue": given.queue,
        "max_bytes": max_bytes,
        "max_upload_bytes": max(Settings.max_upload_bytes, max_bytes or 0),
        "deadline_seconds": given.deadline,
    }
    answered = serve(
        given.bundles,
        host=given.host,
        port=given.port,
        engine=given.engine,
        precision=given.precision,
        device=given.device,
        settings=Settings(**{name: value for name, value in limits.items() if value is not None}),
        token=token,
        allowed_hosts=given.allowed_host,
        **calibrated_options(given),
    )
    return 0 if answered else FAILED
