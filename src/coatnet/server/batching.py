"""Dynamic batching: a bounded queue of images, and one thread that runs the engine on batches of them.

An idle engine takes what is queued at once, unless further images are being decoded: it waits for those, at most
`delay_seconds`. While it is busy, the next batch fills. Shapes: V views, R resolution, C channels, K classes.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coatnet.inference.predictor import Predictor
from coatnet.server import Settings
from coatnet.server.errors import RequestError
from coatnet.server.metrics import ModelMetrics

log = logging.getLogger("coatnet.serve")
HEARTBEAT_SECONDS = 0.5
STOPPED = "the model has stopped; the server must be restarted"


@dataclass(frozen=True)
class Answer:
    """Probabilities `(K,)`, novelty, the seconds that the image was queued, and the seconds that its batch took."""

    probabilities: NDArray[np.float32]
    novelty: float | None
    queue_seconds: float
    inference_seconds: float


@dataclass(eq=False)
class QueuedImage:
    """The views `(V, R, R, C)` of one image, and the future of its answer."""

    views: NDArray[np.uint8]
    answer: asyncio.Future[Answer]
    since: float = field(default_factory=time.perf_counter)


@dataclass
class Reservation:
    """Places in the queue, of which `decoding` are for images that are still being decoded."""

    decoding: int


class Batcher:
    """The queue of one model and its thread. Everything but `_run`, and what it calls, runs in the event loop."""

    def __init__(self, predictor: Predictor, settings: Settings, metrics: ModelMetrics) -> None:
        self.predictor, self.settings, self.metrics = predictor, settings, metrics
        self.free = settings.max_queue
        self._decoding = 0
        self._waiting: deque[QueuedImage] = deque()
        self._changed = threading.Condition()  # guards the queue, the counts and the stop flag
        self._stopping = self._over = False
        self._heartbeat = time.monotonic()
        # A daemon, so that an engine that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether the thread has begun or ended a batch within `hang_seconds`."""
        return self.alive and time.monotonic() - self._heartbeat < self.settings.hang_seconds

    @property
    def depth(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        """Start the thread. Called in the event loop that receives the answers."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread once the queue is empty; one that does not end within a second is abandoned."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(1)

    def check(self, count: int = 1) -> None:
        """Raise RequestError if the queue has no place for `count` images."""
        if not self.alive:
            raise RequestError("stopped", STOPPED)
        if self.free < count:
            raise RequestError("full", "the queue is full; try again in a moment")

    @contextmanager
    def reserve(self, count: int = 1) -> Iterator[Reservation]:
        """Reserve places for images, from their upload to their answer. Raises RequestError as `check` does."""
        self.check(count)
        reservation = Reservation(count)
        self.free -= count
        self._decoding += count
        try:
            yield reservation
        finally:
            self.free += count
            if reservation.decoding:
                self._enqueue(reservation, reservation.decoding)

    async def answer(self, reservation: Reservation, views: NDArray[np.uint8]) -> Answer:
        """The model's answer to one decoded image; cancelling it takes the image out of the queue.

        Raises:
            RequestError: the model failed on the batch ("inference"), or has stopped.
        """
        waiting = QueuedImage(views, self._loop.create_future())
        self._enqueue(reservation, 1, waiting)
        if self._over:  # since the reservation
            raise RequestError("stopped", STOPPED)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            with self._changed:
                if waiting in self._waiting:
                    self._waiting.remove(waiting)
                    self.metrics.dropped.inc()
            raise

    def _enqueue(self, reservation: Reservation, count: int, waiting: QueuedImage | None = None) -> None:
        with self._changed:
            reservation.decoding -= count
            self._decoding -= count
            if waiting is not None:
                self._waiting.append(waiting)
            self._changed.notify()

    def _run(self) -> None:
        batch: list[QueuedImage] = []
        try:
            while batch := self._next_batch():
                self._send_results(batch, self._compute(batch))
                batch = []
        except BaseException:
            log.critical("the inference thread has ended with an error", exc_info=True)
        finally:
            with self._changed:
                self._over = True
                left = [*batch, *self._waiting]
            self._send_results(left, [RequestError("stopped", STOPPED) for _ in left])

    def _next_batch(self) -> list[QueuedImage]:
        """The next batch; empty when the thread is to stop."""
        with self._changed:
            while True:
                self._heartbeat = time.monotonic()
                if self._waiting:
                    remaining = self._waiting[0].since + self.settings.delay_seconds - time.perf_counter()
                    if len(self._waiting) >= self.settings.batch_size or not self._decoding or remaining <= 0:
                        return [self._waiting.popleft() for _ in range(min(self.settings.batch_size, self.depth))]
                    self._changed.wait(remaining)
                elif self._stopping:
                    return []
                else:
                    self._changed.wait(HEARTBEAT_SECONDS)

    def _compute(self, batch: Sequence[QueuedImage]) -> Sequence[Answer | RequestError]:
        started = time.perf_counter()
        try:
            rows, novelty = self.predictor.scores(np.stack([waiting.views for waiting in batch]))
        except Exception:
            log.exception("a batch of %d images failed", len(batch))
            return [RequestError("inference", "the model failed on this batch") for _ in batch]
        taken = time.perf_counter() - started
        self.metrics.batch_size.observe(len(batch))
        self.metrics.inference.observe(taken)
        return [
            Answer(row, None if novelty is None else float(novelty[index]), started - waiting.since, taken)
            if np.isfinite(row).all()
            else RequestError("inference", "the model's answer to this image is not finite")
            for index, (row, waiting) in enumerate(zip(rows, batch, strict=True))
        ]

    def _send_results(self, batch: Sequence[QueuedImage], outcomes: Sequence[Answer | RequestError]) -> None:
        if batch and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set_results, batch, outcomes)

    def _set_results(self, batch: Sequence[QueuedImage], outcomes: Sequence[Answer | RequestError]) -> None:
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if waiting.answer.done():  # cancelled
                continue
            if isinstance(outcome, RequestError):
                waiting.answer.set_exception(outcome)
            else:
                self.metrics.queue.observe(outcome.queue_seconds)
                waiting.answer.set_result(outcome)
