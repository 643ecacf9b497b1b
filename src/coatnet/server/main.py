"""From the names of models to a server that listens, and to its end."""

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import numpy as np
import uvicorn

from coatnet.errors import UserError
from coatnet.inference.predictor import Predictor
from coatnet.server.app import create_app
from coatnet.server.connections import PatientConnection
from coatnet.server.middleware import Guard
from coatnet.server.service import Service
from coatnet.server.settings import Settings


def serve(
    sources: Mapping[str, str],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    engine: str = "auto",
    precision: str = "auto",
    settings: Settings | None = None,
    token: str | None = None,
) -> bool:
    """Serve models by name until SIGTERM or SIGINT; whether all that was under way could be answered.

    Port 0 is any free one. The address is printed when requests are taken.

    Raises:
        UserError: a model cannot be used, or the address not be listened at.
    """
    settings = settings or Settings()
    with _bound(host, port) as listener:
        predictors = {name: warm(Predictor(source, engine, precision), settings) for name, source in sources.items()}
        app, service = create_app(predictors, settings, token)
        config = connections(app, settings)
        if token is None and host not in ("127.0.0.1", "::1", "localhost"):
            print(f"coatnet: {host} without a token: whoever reaches the port may ask", file=sys.stderr)
        shown = f"[{host}]" if ":" in host else host
        StoppableServer(config, service, f"http://{shown}:{listener.getsockname()[1]}").run([listener])
    return not any(served.batcher.alive for served in service.models.values())


def warm(predictor: Predictor, settings: Settings) -> Predictor:
    """The same, after a batch of each size that engines prepare for: no request waits for that."""
    for power in range(settings.batch_size.bit_length()):
        predictor.probabilities(np.zeros((1 << power, *predictor.image_shape), np.uint8))
    return predictor


def connections(app: Guard, settings: Settings) -> uvicorn.Config:
    """How uvicorn is to treat connections."""
    return uvicorn.Config(
        app,
        http=PatientConnection,
        ws="none",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=settings.idle_seconds,
        timeout_graceful_shutdown=settings.grace_seconds,
    )


class StoppableServer(uvicorn.Server):
    """A server that says at once that it is not ready when it is told to stop, and stops listening a moment later.

    In that moment, `notice_seconds`, it still answers: whoever sends requests here needs it to hear of it. Told twice,
    it leaves.
    """

    def __init__(self, config: uvicorn.Config, service: Service, address: str) -> None:
        super().__init__(config)
        self.service, self.address = service, address
        self._end_of_notice = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for served in self.service.models.values():
            variant, engine = served.predictor.bundle.model.variant.name, served.predictor.engine
            print(
                f"{served.name}: {variant}, {len(served.predictor.classes):,} classes, {engine.name} {engine.precision}"
            )
        print(f"listening at {self.address}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own remembers the signal and dies of it in the end; a server that ends as told ends well.
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
    """A socket that has the address, before a model is read for nothing; clients are not heard yet."""
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
