"""Bodies of requests: bounded in bytes, one and all together, and in time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from coatnet.server.errors import ClientGone, Refusal
from coatnet.server.settings import Settings


class Bodies:
    """The bodies of all requests under way; `held` is what they take, in bytes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.held = 0

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, in memory, until the block ends.

        Raises:
            Refusal: it is too long ("bytes"), too slow ("slow"), or there is no room for it ("full").
            ClientGone: the client left before its end.
        """
        size = 0
        try:
            chunks: list[bytes] = []
            self._check(int(request.headers.get("content-length", 0)))
            try:
                async with asyncio.timeout(self.settings.body_seconds):
                    more = True
                    while more:
                        message = await request.receive()
                        if message["type"] == "http.disconnect":
                            raise ClientGone
                        chunk, more = message.get("body", b""), message.get("more_body", False)
                        self._check(size + len(chunk), len(chunk))
                        size += len(chunk)
                        self.held += len(chunk)
                        chunks.append(chunk)
            except TimeoutError:
                seconds = self.settings.body_seconds
                raise Refusal("slow", f"the body did not arrive within {seconds:g} seconds") from None
            yield b"".join(chunks)
        finally:
            self.held -= size

    def _check(self, size: int, new: int = 0) -> None:
        if size > self.settings.max_bytes:
            raise Refusal("bytes", f"the body is too long: it may have {self.settings.max_bytes:,} bytes")
        if self.held + new > self.settings.max_upload_bytes:
            raise Refusal("full", "too many uploads at once; try again in a moment")
