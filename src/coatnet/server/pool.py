"""Decoding in a few threads, bounded by the pixels that are in memory at the same time."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from coatnet.data.decode import BadImage, image_size
from coatnet.inference.predictor import Predictor
from coatnet.server.errors import Refusal


class DecodingPool:
    """Threads that make of encoded images what a model takes."""

    def __init__(self, threads: int, max_pixels: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decoding")
        self._room = threading.Condition()
        self._free = self._max_pixels = max_pixels

    async def prepare(self, predictor: Predictor, encoded: bytes) -> tuple[NDArray[np.uint8], float]:
        """`(V, R, R, C)`, and the seconds that it took.

        Raises:
            Refusal: this is no image, or none that can be used; the code is that of `BadImage`.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, predictor, encoded)
        except BadImage as error:
            raise Refusal(error.code, error.reason.partition(": ")[2]) from None

    def close(self) -> None:
        """Images that nobody has begun are left."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, predictor: Predictor, encoded: bytes) -> tuple[NDArray[np.uint8], float]:
        with self._room_for(_pixels(encoded)):
            started = time.perf_counter()
            views = predictor.prepare(encoded)
            return views, time.perf_counter() - started

    @contextmanager
    def _room_for(self, pixels: int) -> Iterator[None]:
        """Waits until others are done. What could never fit is the decoder's to refuse, or goes alone."""
        pixels = min(pixels, self._max_pixels)
        with self._room:
            self._room.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._room:
                self._free += pixels
                self._room.notify_all()


def _pixels(encoded: bytes) -> int:
    """As the header says; of what has none the decoder will say what is wrong."""
    try:
        height, width = image_size(encoded, "picture")
    except BadImage:
        return 0
    return height * width
