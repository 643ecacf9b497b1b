"""From the body of a request to what a model takes, within bounds of bytes, pixels and time."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from coatnet.data.decode import BadImage, Scale, decoding_pixels
from coatnet.inference.explanation import Box
from coatnet.inference.predictor import Predictor
from coatnet.server import Settings
from coatnet.server.errors import ClientDisconnected, RequestError

T = TypeVar("T")


class Uploads:
    """The bodies of all requests in progress; `num_bytes` is the memory that they take."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.num_bytes = 0

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, in memory until the block ends.

        Raises:
            RequestError: the body is too long ("bytes"), too slow ("slow"), or there is no room for it ("full").
            ClientDisconnected: the client left before its end.
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
                            raise ClientDisconnected
                        chunk, more = message.get("body", b""), message.get("more_body", False)
                        self._check(size + len(chunk), len(chunk))
                        size += len(chunk)
                        self.num_bytes += len(chunk)
                        chunks.append(chunk)
            except TimeoutError:
                seconds = self.settings.body_seconds
                raise RequestError("slow", f"the body did not arrive within {seconds:g} seconds") from None
            body = b"".join(chunks)
            chunks.clear()
            yield body
        finally:
            self.num_bytes -= size

    def _check(self, size: int, new: int = 0) -> None:
        if size > self.settings.max_bytes:
            raise RequestError("bytes", f"the body is too long: it may have {self.settings.max_bytes:,} bytes")
        if self.num_bytes + new > self.settings.max_upload_bytes:
            raise RequestError("full", "too many uploads at once; try again in a moment")


class AbandonedError(Exception):
    """The deadline has passed, or the client has left."""


class DecodingPool:
    """Threads that decode and resize image files and read requests in JSON; the pixels in memory at the same time are
    bounded.

    A thread whose deadline has passed or whose client has left is free as soon as its work checks that: before it
    starts, while it waits for pixels, and between the steps of reading JSON.
    """

    def __init__(self, num_threads: int, max_pixels: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decoding")
        self._condition = threading.Condition()
        self._free = self._max_pixels = max_pixels

    async def prepare(self, predictor: Predictor, encoded: bytes) -> tuple[NDArray[np.uint8], Box, float]:
        """The views `(V, R, R, C)` of an image, the part of it that they show, and the seconds that they took.

        Raises:
            RequestError: not an image, or one that cannot be decoded; the code is that of `BadImage`.
        """
        try:
            return await self.run(lambda check: self._prepare(predictor, encoded, check))
        except BadImage as error:
            raise RequestError(error.code, error.reason.partition(": ")[2]) from None

    async def run(self, work: Callable[[Callable[[], None]], T]) -> T:
        """The result of `work` in a thread. It is given a function that raises once the deadline has
        passed or the client has left."""
        abandoned = threading.Event()

        def check() -> None:
            if abandoned.is_set():
                raise AbandonedError

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, check)
        except asyncio.CancelledError:
            abandoned.set()
            with self._condition:
                self._condition.notify_all()
            raise

    def close(self) -> None:
        """Stop; images that are not being decoded yet are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _prepare(
        self, predictor: Predictor, encoded: bytes, check: Callable[[], None]
    ) -> tuple[NDArray[np.uint8], Box, float]:
        with self._reserve_pixels(_num_pixels(encoded, predictor.scale), check):
            started = time.perf_counter()
            views, box = predictor.prepare_and_locate(encoded)
            return views, box, time.perf_counter() - started

    @contextmanager
    def _reserve_pixels(self, pixels: int, check: Callable[[], None]) -> Iterator[None]:
        """Wait until they are free. An image above the bound waits for all of them: the decoder refuses it, or it is
        decoded alone."""
        pixels = min(pixels, self._max_pixels)
        with self._condition:
            check()
            while self._free < pixels:
                self._condition.wait()
                check()
            self._free -= pixels
        try:
            yield
        finally:
            with self._condition:
                self._free += pixels
                self._condition.notify_all()


def _num_pixels(encoded: bytes, scale: Scale | None) -> int:
    """What decoding takes, in pixels, by the header; 0 without a readable one, which the decoder then reports."""
    try:
        return decoding_pixels(encoded, "image", scale)
    except BadImage:
        return 0
