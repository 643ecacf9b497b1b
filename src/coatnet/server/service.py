"""Several models behind one door: from the bytes of an image to probabilities, or to the reason why not."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from coatnet.data.loader import num_cores
from coatnet.errors import nearest
from coatnet.inference.predictor import Predictor
from coatnet.server.batching import Admission, Answer, Batcher
from coatnet.server.errors import ClientGone, Refusal
from coatnet.server.metrics import Metrics, ModelMetrics
from coatnet.server.pool import DecodingPool
from coatnet.server.settings import Settings
from coatnet.server.uploads import Bodies

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """One model under the name that clients use."""

    name: str
    predictor: Predictor
    batcher: Batcher
    metrics: ModelMetrics


class Service:
    """All that the routes need; `start` and `stop` belong to the event loop."""

    def __init__(self, predictors: Mapping[str, Predictor], settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.bodies = Bodies(settings)
        self.pool = DecodingPool(num_cores(), settings.max_decoding_pixels)
        self.models = {name: self._serve(name, predictor) for name, predictor in predictors.items()}
        self.draining = False
        self.metrics.watch_uploads(lambda: self.bodies.held)

    def _serve(self, name: str, predictor: Predictor) -> Served:
        figures = ModelMetrics(self.metrics, name)
        batcher = Batcher(predictor, self.settings, figures)
        engine = f"{predictor.engine.name} {predictor.engine.precision}"
        self.metrics.watch_model(
            name,
            predictor.bundle.model.variant.name,
            engine,
            depth=lambda: batcher.depth,
            places=lambda: batcher.free,
            ready=lambda: batcher.ready,
        )
        return Served(name, predictor, batcher, figures)

    @property
    def alive(self) -> bool:
        """Whether every model's thread runs; if not, only a restart helps."""
        return all(served.batcher.alive for served in self.models.values())

    @property
    def ready(self) -> bool:
        """Whether to send requests here."""
        return not self.draining and all(served.batcher.ready for served in self.models.values())

    def start(self) -> None:
        """Begin to compute."""
        for served in self.models.values():
            served.batcher.start()

    def stop(self) -> None:
        """Once all is answered; a thread that still computes is left behind."""
        self.pool.close()
        for served in self.models.values():
            served.batcher.stop()

    def model(self, name: str) -> Served:
        """The model of that name, the first one for "". Raises Refusal if there is none ("model")."""
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise Refusal("model", f"there is no model {name[:100]!r}{nearest(name[:100], self.models)}")
        return self.models[name]

    async def from_file(self, served: Served, admission: Admission, encoded: bytes) -> tuple[Answer, float]:
        """The answer to an encoded image, and the seconds of its decoding. Raises Refusal."""
        views, seconds = await self.pool.prepare(served.predictor, encoded)
        served.metrics.decode.observe(seconds)
        return await served.batcher.answer(admission, views), seconds

    async def while_heard(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, unless the deadline passes or the client leaves first; then it is cancelled.

        Raises:
            Refusal: the deadline passed, or whatever `work` refuses.
            ClientGone: the client left.
        """
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
        try:
            seconds = self.settings.deadline_seconds
            await asyncio.wait((working, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if leaving.done():
                raise ClientGone
            raise Refusal("deadline", f"no answer within {seconds:g} seconds")
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def predict(self, request: Request, name: str, top_k: int) -> dict[str, Any]:
        """The likeliest classes of the image that is the body of the request. Raises Refusal, ClientGone."""
        served = self.model(name)
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise Refusal("format", "this is a form; send the image itself: curl --data-binary @image.jpg")
        served.batcher.check()  # before the image is uploaded
        started = time.perf_counter()
        async with self.bodies.receive(request) as body:
            if not body:
                raise Refusal("empty", "the body is empty: send the bytes of an image")
            with served.batcher.admitted() as admission:
                answer, decoding = await self.while_heard(request, self.from_file(served, admission, body))
        total = time.perf_counter() - started
        served.metrics.total.observe(total)
        classes, probabilities = served.predictor.top(answer.probabilities, top_k)
        times = {
            "decode": decoding,
            "queue": answer.queue_seconds,
            "inference": answer.inference_seconds,
            "total": total,
        }
        return {
            "model": served.name,
            "predictions": [
                {"class": one, "probability": probability}
                for one, probability in zip(classes, probabilities, strict=True)
            ],
            "milliseconds": {step: round(1e3 * seconds, 3) for step, seconds in times.items()},
        }

    async def all_answers(
        self,
        request: Request,
        served: Served,
        images: Sequence[T],
        answer_one: Callable[[Admission, T], Coroutine[Any, Any, Answer]],
    ) -> list[Answer]:
        """An answer an image, or the first refusal, with the others taken back. Raises Refusal, ClientGone."""
        with served.batcher.admitted(len(images)) as admission:
            return await self.while_heard(request, _together([answer_one(admission, one) for one in images]))


async def _together(answers: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
