"""Connections of clients: how many there may be, how long each may take, what is answered to what is not HTTP.

uvicorn waits without end for headers and for clients that do not read, and counts connections only when one asks.
"""

import asyncio
import os
from collections import Counter
from http import HTTPStatus
from ipaddress import IPv6Address, ip_address
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from coatnet.errors import UserError
from coatnet.server import Settings
from coatnet.server.errors import RequestError, error_response

MAX_HEADER_BYTES = 16_384
WRITE_BYTES = 65_536  # of one answer in memory until the client reads
LINGER_SECONDS = 1.0
FREE_CHUNKS, MEAN_CHUNK_BYTES = 1000, 64  # of a body: chosen, a file sent line by line has 256
ACCEPTED_AT_ONCE = 16  # in each turn of the event loop
SPARE_DESCRIPTORS = 64 + 6 * ACCEPTED_AT_ONCE  # some turns pass before a connection too many is closed
OVER_LIMIT_SECONDS = 1.0  # for the request of a connection that is one too many
OVER_LIMIT = "over_limit"  # the key of a scope's state: why the connection is one too many


class ConnectionLimits:
    """The connections of a server, all and by client.

    A connection over the limit is refused in the response to its request, or after a second. From an eighth over the
    limit on, it is refused and closed at once: without that bound, all descriptors of the process would be taken.
    """

    def __init__(self, settings: Settings) -> None:
        self.most, self.most_of_client = settings.max_connections, settings.max_client_connections
        self._counts: Counter[str] = Counter()

    def enter(self, client: str) -> tuple[str, bool]:
        """Count a connection.

        Returns:
            Why it is one too many, "" if it is not, and whether it is to be closed at once.
        """
        self._counts[client] += 1
        number, number_of_client = self._counts.total(), self._counts[client]
        close = number > with_spare(self.most) or number_of_client > with_spare(self.most_of_client)
        if number > self.most:
            return "too many connections; try again in a moment", close
        if number_of_client > self.most_of_client:
            return f"one client may have {self.most_of_client} connections; close some", close
        return "", close

    def leave(self, client: str) -> None:
        """Count a connection as closed."""
        self._counts[client] -= 1
        if not self._counts[client]:
            del self._counts[client]


def with_spare(limit: int) -> int:
    """How many connections are open at most where `limit` are served."""
    return limit + limit // 8 + 1


def client_key(address: Any) -> str:
    """What counts as one client: an IPv4 address, or the network /64 of an IPv6 address, which one machine may have."""
    try:
        ip = ip_address(str(address[0]).partition("%")[0])
    except (ValueError, TypeError, IndexError):
        return "unknown"
    if isinstance(ip, IPv6Address):
        ip = ip.ipv4_mapped or int(ip) >> 64
    return str(ip)


def reserve_descriptors(max_connections: int) -> int:
    """Let the process open as many descriptors as its connections need.

    Returns:
        `max_connections`, or fewer where the system does not allow so many.

    Raises:
        UserError: hardly any connection would be left.
    """
    try:
        import resource
    except ImportError:  # Windows
        return max_connections
    used = len(os.listdir("/dev/fd")) + SPARE_DESCRIPTORS
    needed = used + with_spare(max_connections)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < needed:  # -1 is no limit
        soft = needed if hard < 0 else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed:
            max_connections = (soft - used) * 8 // 9
    if max_connections < 1:
        raise UserError(f"the system allows {soft} open files, the server needs {used + 16}: raise `ulimit -n`")
    return max_connections


class Parser(h11.Connection):
    """h11's parser, which refuses bodies in tiny chunks: each takes as long as thousands of bytes."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self._chunks = self._bytes = 0

    def next_event(self) -> Any:
        """The next event. Raises RemoteProtocolError as h11 does, and for too many chunks."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks, self._bytes = self._chunks + 1, self._bytes + len(event.data)
            if self._chunks > FREE_CHUNKS + self._bytes // MEAN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        return event


class Connection(H11Protocol):
    """HTTP/1.1 with bounds: of connections (`ConnectionLimits`), of the time for a header and for reading an answer.

    The time for a header is uvicorn's `timeout_keep_alive`. A client must read `WRITE_BYTES` of an answer, or all that
    is left of it, in each `write_seconds`. h11 is strict about lengths; a faster parser would save little beside a
    network.
    """

    def __init__(self, limits: ConnectionLimits, write_seconds: float, **given: Any) -> None:
        super().__init__(**given)
        self.conn = Parser()
        self._limits, self._write_seconds = limits, write_seconds
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._over_limit = ""
        self._lingering = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._key = client_key(self.client)
        transport.set_write_buffer_limits(high=0)  # so that writing pauses whenever something is left to write
        self._over_limit, close = self._limits.enter(self._key)
        self.app_state = {**self.app_state, OVER_LIMIT: self._over_limit}
        if close:
            self._refuse(RequestError("full", self._over_limit), linger=False)
        else:
            self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limits.leave(self._key)
        self._cancel_header_timer()
        super().connection_lost(exc)  # resumes writing, which ends that timer

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel_header_timer()
        elif self._header_timer is None and not self._lingering:
            self._start_header_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_reading(self, most: int | None = None) -> None:
        """Give the client up if more than `most` bytes are left to write; look again after `write_seconds`."""
        left = self.transport.get_write_buffer_size()
        if most is not None and left > most:
            self.transport.abort()
            return
        self._write_timer = self.loop.call_later(self._write_seconds, self._await_reading, max(left - WRITE_BYTES, 0))

    def send_400_response(self, msg: str) -> None:
        begun = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
        in_body = self.cycle is not None and not self.cycle.response_complete
        if in_body:  # its answer can no longer be sent
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if begun:  # a second answer is impossible
            self.transport.close()
        elif not in_body and len(self.conn.trailing_data[0]) > MAX_HEADER_BYTES:
            self._refuse(header_error())
        else:
            self._refuse(RequestError("http", "this is not HTTP/1.1, or a body in tiny chunks"))

    def _refuse(self, error: RequestError, *, linger: bool = True) -> None:
        """Answer without a request. Without reading for a while after it, a client that still sends may miss it."""
        answer = error_response(error, "")
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode(), b"connection: close"]
        lines += [name + b": " + value for name, value in answer.raw_headers]
        self._lingering = True
        self._cancel_header_timer()
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(answer.body))
        if linger:
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def _start_header_timer(self) -> None:
        seconds = OVER_LIMIT_SECONDS if self._over_limit else self.timeout_keep_alive
        self._header_timer = self.loop.call_later(seconds, self._close_on_timeout)

    def _cancel_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_on_timeout(self) -> None:
        self._header_timer = None
        if self.transport.is_closing():
            return
        if self._over_limit:
            self._refuse(RequestError("full", self._over_limit))
        elif self.conn.trailing_data[0]:
            self._refuse(RequestError("slow", f"the header did not arrive within {self.timeout_keep_alive:g} seconds"))
        else:
            self.transport.close()


def header_error() -> RequestError:
    return RequestError("header", f"the header is too long: it may have {MAX_HEADER_BYTES:,} bytes")
