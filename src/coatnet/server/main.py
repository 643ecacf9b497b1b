"""`serve`: load the models, listen, answer until SIGTERM or SIGINT."""

import logging
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import uvicorn

from coatnet.errors import UserError, one_line
from coatnet.inference.predictor import Predictor
from coatnet.server import Settings
from coatnet.server.app import Middleware, create_app
from coatnet.server.connections import ACCEPTED_AT_ONCE, Connection, ConnectionLimits, reserve_descriptors
from coatnet.server.service import Service
from coatnet.system.terminal import echo, report_wait

BACKLOG = 1024


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
    allowed_hosts: Collection[str] = (),
    reject: float | None = None,
    coverage: float | None = None,
    set_method: str = "lac",
    raw: bool = False,
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
        allowed_hosts: names by which clients may address the server, besides localhost, addresses, `host` and the
            name of the machine; "*" is any name.
        reject: as of `Predictor`, for every model.
        coverage: as of `Predictor`, for every model.
        set_method: as of `Predictor`.
        raw: as of `Predictor`.

    Returns:
        Whether every request in progress was answered before the end.

    Raises:
        UserError: a model cannot be loaded, or the address is not free.
    """
    settings = settings or Settings()
    answers: Any = {"reject": reject, "coverage": coverage, "set_method": set_method, "raw": raw}
    with _bound(host, port) as listener:
        predictors = {}
        for name, source in sources.items():
            with report_wait(f"loading {name}"):
                predictors[name] = Predictor(source, engine, precision, device=device, **answers)
            with report_wait(f"preparing {name} for batches of 1 to {settings.batch_size}"):
                warm(predictors[name], settings)
        settings = replace(settings, max_connections=reserve_descriptors(settings.max_connections))
        app, service = create_app(predictors, settings, token, allowed_hosts, own_names=(host, socket.gethostname()))
        config = uvicorn_config(app, settings)
        if token is None and host not in ("127.0.0.1", "::1", "localhost"):
            echo(f"coatnet: warning: {host} without a token: no authentication", error=True)
        for logger in ("asyncio", "uvicorn.error", "coatnet.serve"):
            logging.getLogger(logger).addFilter(OncePerMinute())
        shown = f"[{host}]" if ":" in host else host
        StoppableServer(config, service, f"http://{shown}:{listener.getsockname()[1]}").run([listener])
    if service.unanswered:
        echo(f"coatnet: warning: requests without an answer at the end: {service.unanswered}", error=True)
    return not service.unanswered and not any(served.batcher.alive for served in service.models.values())


def warm(predictor: Predictor, settings: Settings) -> Predictor:
    """Run a batch of each size that engines compile for, so that no request waits for that; returns `predictor`."""
    for power in range(settings.batch_size.bit_length()):
        predictor.probabilities(np.zeros((1 << power, *predictor.image_shape), predictor.pixel_type))
    return predictor


def uvicorn_config(app: Middleware, settings: Settings) -> uvicorn.Config:
    """The configuration of uvicorn: limits of connections, no access log."""
    return uvicorn.Config(
        app,
        http=partial(Connection, ConnectionLimits(settings), settings.write_seconds),  # pyrefly: ignore
        ws="none",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=settings.idle_seconds,
        timeout_graceful_shutdown=settings.grace_seconds,
    )


class OncePerMinute(logging.Filter):
    """Lets one record of a kind through in a minute, since clients cause some, and says how many it held back.

    Errors of the system, such as no free descriptor, are one line without a traceback.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}  # when one was let through, how many were not since

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        error = record.exc_info[1] if record.exc_info else None
        first = str(record.msg).partition("\n")[0]
        kind = (first[:80], type(error).__name__)
        now = time.monotonic()
        since, held = self._seen.get(kind, (-60.0, 0))
        if now - since < 60:
            self._seen[kind] = (since, held + 1)
            return False
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[kind] = (now, 0)
        if isinstance(error, OSError):
            record.msg, record.args, record.exc_info = f"{first}: {error}", (), None
        if held:
            record.msg = f"{str(record.msg).rstrip()} (and {held} more since the last line)"
        return True


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
        for listener in sockets or ():
            listener.listen(BACKLOG)  # uvicorn's backlog is also how many asyncio accepts at once
        for served in self.service.models.values():
            variant, engine = served.predictor.bundle.model.variant.name, served.predictor.engine
            num_classes = len(served.predictor.classes)
            echo(one_line(f"{served.name}: {variant}, {num_classes:,} classes, {engine.name} {engine.precision}"))
        echo(f"listening at {self.address}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves this out, and the log would have a traceback
            await self.lifespan.shutdown()

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
