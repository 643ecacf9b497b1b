"""`serve`: load the models, listen, answer until SIGTERM or SIGINT."""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FrameType

import numpy as np
import uvicorn

from coatnet.errors import UserError, one_line
from coatnet.inference.predictor import Predictor
from coatnet.server import Settings
from coatnet.server.app import Middleware, create_app
from coatnet.server.connections import Connection, Crowd
from coatnet.server.service import Service
from coatnet.system.terminal import echo


def serve(
    sources: Mapping[str, str],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    engine: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    settings: Settings | None = None,
    token: str | None = None,
) -> bool:
    """Serve models over HTTP until SIGTERM or SIGINT. The address is printed once requests are accepted.

    Args:
        sources: bundles (folders, or ids of the hub) by the name that clients use; the first one is the default.
        host: address to listen at.
        port: 0 is any free one.
        engine: as of `Predictor`.
        precision: as of `Predictor`.
        device: as of `Predictor`.
        settings: limits of the server.
        token: what clients must send as `Authorization: Bearer TOKEN`; None asks for nothing.

    Returns:
        Whether every request in progress was answered before the end.

    Raises:
        UserError: a model cannot be loaded, or the address is not free.
    """
    settings = settings or Settings()
    with _bound(host, port) as listener:
        predictors = {
            name: warm(Predictor(source, engine, precision, device=device), settings)
            for name, source in sources.items()
        }
        app, service = create_app(predictors, settings, token)
        config = uvicorn_config(app, settings)
        if token is None and host not in ("127.0.0.1", "::1", "localhost"):
            echo(f"coatnet: warning: {host} without a token: no authentication", error=True)
        shown = f"[{host}]" if ":" in host else host
        StoppableServer(config, service, f"http://{shown}:{listener.getsockname()[1]}").run([listener])
    return not any(served.batcher.alive for served in service.models.values())


def warm(predictor: Predictor, settings: Settings) -> Predictor:
    """Run a batch of each size that engines compile for, so that no request waits for that; returns `predictor`."""
    for power in range(settings.batch_size.bit_length()):
        predictor.probabilities(np.zeros((1 << power, *predictor.image_shape), np.uint8))
    return predictor


def uvicorn_config(app: Middleware, settings: Settings) -> uvicorn.Config:
    """The configuration of uvicorn: limits of connections, no access log."""
    return uvicorn.Config(
        app,
        http=partial(Connection, Crowd(settings), settings.write_seconds),  # pyrefly: ignore
        ws="none",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.idle_seconds,
        timeout_graceful_shutdown=settings.grace_seconds,
    )


class StoppableServer(uvicorn.Server):
    """Stops in two steps: on the first SIGTERM or SIGINT it is not ready, `notice_seconds` later it stops
    listening.

    In between it still answers, so that a load balancer has time to take it out. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, address: str) -> None:
        super().__init__(config)
        self.service, self.address = service, address
        self._end_of_notice = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for served in self.service.models.values():
            variant, engine = served.predictor.bundle.model.variant.name, served.predictor.engine
            num_classes = len(served.predictor.classes)
            echo(one_line(f"{served.name}: {variant}, {num_classes:,} classes, {engine.name} {engine.precision}"))
        echo(f"listening at {self.address}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own raises the signal again at the end; a server that was asked to stop exits with 0.
        if self.service.draining:
            self.should_exit = self.force_exit = True
        self.service.draining = True
        self._end_of_notice = time.monotonic() + self.service.settings.notice_seconds

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and time.monotonic() >= self._end_of_notice:
            self.should_exit = True
        return await super().on_tick(counter)


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to the address before any model is loaded; it does not listen yet."""
    if not 0 <= port < 2**16:
        raise UserError(f"there is no port {port}; ports go from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"there is no address {host}: {error.strerror}") from None
    with listener:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise UserError(f"cannot listen at {host} port {port}: {error.strerror}") from None
        yield listener
