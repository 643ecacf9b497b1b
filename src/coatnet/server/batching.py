"""Images that wait together are computed together: a bounded queue, and one thread that runs the engine.

An idle engine takes what is there at once, unless more is being decoded: then it waits for that, `delay_seconds` at
the most. A busy one finds a full batch when it returns. Shapes: V views, R resolution, C channels, K classes.
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
from coatnet.server.errors import Refusal
from coatnet.server.metrics import ModelMetrics
from coatnet.server.settings import Settings

log = logging.getLogger("coatnet.serve")
BEAT_SECONDS = 0.5
STOPPED = "the model has stopped; the server must be restarted"


@dataclass(frozen=True)
class Answer:
    """`(K,)`, and how long the image waited and its batch took."""

    probabilities: NDArray[np.float32]
    queue_seconds: float
    inference_seconds: float


@dataclass(eq=False)
class Waiting:
    """One image `(V, R, R, C)` on its way through the engine."""

    views: NDArray[np.uint8]
    answer: asyncio.Future[Answer]
    since: float = field(default_factory=time.perf_counter)


@dataclass
class Admission:
    """Places in the queue; `coming` of them are for images that are still being decoded."""

    coming: int


class Batcher:
    """The queue of one model and its thread. All but `_run` and what it calls belongs to the event loop."""

    def __init__(self, predictor: Predictor, settings: Settings, metrics: ModelMetrics) -> None:
        self.predictor, self.settings, self.metrics = predictor, settings, metrics
        self.free = settings.max_queue
        self._coming = 0
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()  # of what waits, what comes, and whether to stop
        self._stopping = self._over = False
        self._beat = time.monotonic()
        # A daemon: an engine that hangs must not keep the process from its end.
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether the thread has begun or ended something within `hang_seconds`."""
        return self.alive and time.monotonic() - self._beat < self.settings.hang_seconds

    @property
    def depth(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        """From the event loop that the answers go to."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread when all that waits is answered; one that does not end within a second is left behind."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(1)

    def check(self, count: int = 1) -> None:
        """Raises Refusal if there is no place for so many images."""
        if not self.alive:
            raise Refusal("stopped", STOPPED)
        if self.free < count:
            raise Refusal("full", "too many images wait already; try again in a moment")

    @contextmanager
    def admitted(self, count: int = 1) -> Iterator[Admission]:
        """Places for images, from their upload to their answer. Raises Refusal as `check` does."""
        self.check(count)
        admission = Admission(count)
        self.free -= count
        self._coming += count
        try:
            yield admission
        finally:
            self.free += count
            if admission.coming:
                self._arrive(admission, admission.coming)

    async def answer(self, admission: Admission, views: NDArray[np.uint8]) -> Answer:
        """The model's answer to one decoded image; cancelling it takes the image out of the queue.

        Raises:
            Refusal: the model failed on the batch ("inference"), or has stopped.
        """
        waiting = Waiting(views, self._loop.create_future())
        self._arrive(admission, 1, waiting)
        if self._over:  # since it was admitted
            raise Refusal("stopped", STOPPED)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            with self._changed:
                if waiting in self._waiting:
                    self._waiting.remove(waiting)
                    self.metrics.dropped.inc()
            raise

    def _arrive(self, admission: Admission, count: int, waiting: Waiting | None = None) -> None:
        with self._changed:
            admission.coming -= count
            self._coming -= count
            if waiting is not None:
                self._waiting.append(waiting)
            self._changed.notify()

    def _run(self) -> None:
        batch: list[Waiting] = []
        try:
            while batch := self._next_batch():
                self._give(batch, self._compute(batch))
                batch = []
        except BaseException:
            log.critical("the inference thread has died", exc_info=True)
        finally:
            with self._changed:
                self._over = True
                left = [*batch, *self._waiting]
            self._give(left, [Refusal("stopped", STOPPED) for _ in left])

    def _next_batch(self) -> list[Waiting]:
        """Empty when it is time to stop."""
        with self._changed:
            while True:
                self._beat = time.monotonic()
                if self._waiting:
                    patience = self._waiting[0].since + self.settings.delay_seconds - time.perf_counter()
                    if len(self._waiting) >= self.settings.batch_size or not self._coming or patience <= 0:
                        return [self._waiting.popleft() for _ in range(min(self.settings.batch_size, self.depth))]
                    self._changed.wait(patience)
                elif self._stopping:
                    return []
                else:
                    self._changed.wait(BEAT_SECONDS)

    def _compute(self, batch: Sequence[Waiting]) -> Sequence[Answer | Refusal]:
        started = time.perf_counter()
        try:
            rows = self.predictor.probabilities(np.stack([waiting.views for waiting in batch]))
        except Exception:
            log.exception("a batch of %d images failed", len(batch))
            return [Refusal("inference", "the model failed on this batch") for _ in batch]
        taken = time.perf_counter() - started
        self.metrics.batch_size.observe(len(batch))
        self.metrics.inference.observe(taken)
        return [
            Answer(row, started - waiting.since, taken)
            if np.isfinite(row).all()
            else Refusal("inference", "the model gave no number for this image")
            for row, waiting in zip(rows, batch, strict=True)
        ]

    def _give(self, batch: Sequence[Waiting], outcomes: Sequence[Answer | Refusal]) -> None:
        if batch and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, batch, outcomes)

    def _deliver(self, batch: Sequence[Waiting], outcomes: Sequence[Answer | Refusal]) -> None:
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if waiting.answer.done():  # cancelled
                continue
            if isinstance(outcome, Refusal):
                waiting.answer.set_exception(outcome)
            else:
                self.metrics.queue.observe(outcome.queue_seconds)
                waiting.answer.set_result(outcome)
