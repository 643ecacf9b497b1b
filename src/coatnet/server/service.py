"""The service behind the routes: several models, from the bytes of an image to probabilities or an error."""

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import PIL.Image
from starlette.requests import Request

from coatnet.errors import UserError, nearest
from coatnet.inference.explanation import check_method, heat_colors
from coatnet.inference.predictor import Predictor
from coatnet.server import Settings
from coatnet.server.batching import Answer, Batcher, Reservation
from coatnet.server.errors import ClientDisconnected, RequestError
from coatnet.server.metrics import Metrics, ModelMetrics
from coatnet.server.uploads import DecodingPool, Uploads
from coatnet.system.hardware import num_cores

T = TypeVar("T")


@dataclass(frozen=True)
class ServedModel:
    """One model under the name that clients use."""

    name: str
    predictor: Predictor
    batcher: Batcher
    metrics: ModelMetrics


class Service:
    """What the routes call. `start` and `stop` are called in the event loop."""

    def __init__(self, predictors: Mapping[str, Predictor], settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.uploads = Uploads(settings)
        self.pool = DecodingPool(num_cores(), settings.max_decoding_pixels)
        self.models = {name: self._serve(name, predictor) for name, predictor in predictors.items()}
        # One at a time: gradients of several images at once would take the cores from the predictions.
        self.explaining = ThreadPoolExecutor(1, thread_name_prefix="explaining")
        self.draining = False
        self.unanswered = 0  # requests in progress that the end of the server cut off
        self.metrics.watch_uploads(lambda: self.uploads.num_bytes)

    def _serve(self, name: str, predictor: Predictor) -> ServedModel:
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
        return ServedModel(name, predictor, batcher, figures)

    @property
    def alive(self) -> bool:
        """Whether every model's thread runs; if not, only a restart helps."""
        return all(served.batcher.alive for served in self.models.values())

    @property
    def ready(self) -> bool:
        """Whether to send requests here."""
        return not self.draining and all(served.batcher.ready for served in self.models.values())

    def start(self) -> None:
        """Start the inference threads."""
        for served in self.models.values():
            served.batcher.start()

    def stop(self) -> None:
        """Stop the threads, after all requests are answered; a thread that still computes is abandoned."""
        self.pool.close()
        self.explaining.shutdown(wait=False, cancel_futures=True)
        for served in self.models.values():
            served.batcher.stop()

    def model(self, name: str) -> ServedModel:
        """The model of that name, the first one for "". Raises RequestError ("model") if there is none."""
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise RequestError("model", f"there is no model {name[:100]!r}{nearest(name[:100], self.models)}")
        return self.models[name]

    async def from_file(self, served: ServedModel, reservation: Reservation, encoded: bytes) -> tuple[Answer, float]:
        """The answer to an encoded image, and the seconds of its decoding. Raises RequestError."""
        views, _, seconds = await self.pool.prepare(served.predictor, encoded)
        served.metrics.decode.observe(seconds)
        return await served.batcher.answer(reservation, views), seconds

    async def until_disconnect(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled if the deadline passes or the client disconnects first.

        Raises:
            RequestError: the deadline passed, or as raised by `work`.
            ClientDisconnected: the client closed the connection.
        """
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
        try:
            seconds = self.settings.deadline_seconds
            await asyncio.wait((working, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if leaving.done():
                raise ClientDisconnected
            raise RequestError("deadline", f"no answer within {seconds:g} seconds")
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    @asynccontextmanager
    async def receive(self, request: Request, served: ServedModel) -> AsyncIterator[tuple[bytes, Reservation]]:
        """The image in a request's body, and a place in the queue. Raises RequestError, ClientDisconnected."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise RequestError("format", "this is a form; send the image itself: curl --data-binary @image.jpg")
        served.batcher.check()  # before the image is uploaded
        async with self.uploads.receive(request) as body:
            if not body:
                raise RequestError("empty", "the body is empty: send the bytes of an image")
            with served.batcher.reserve() as reservation:
                yield body, reservation

    async def predict(self, request: Request, name: str, top_k: int) -> dict[str, Any]:
        """The likeliest classes of the image in the request's body. Raises RequestError, ClientDisconnected."""
        served, started = self.model(name), time.perf_counter()
        async with self.receive(request, served) as (body, reservation):
            answer, decoding = await self.until_disconnect(request, self.from_file(served, reservation, body))
        total = time.perf_counter() - started
        served.metrics.total.observe(total)
        found = served.predictor.describe(answer.probabilities, answer.novelty, top_k)
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
                for one, probability in zip(found.classes, found.probabilities, strict=True)
            ],
            "novelty": found.novelty,
            "unknown": found.unknown,
            "set": found.class_set,
            "milliseconds": {step: round(1e3 * seconds, 3) for step, seconds in times.items()},
        }

    async def explain(self, request: Request, name: str, method: str, target: str, stage: int | None) -> dict[str, Any]:
        """What mattered in the image in the request's body. Raises RequestError, ClientDisconnected."""
        served = self.model(name)
        try:
            check_method(served.predictor.bundle.model, method, stage)
            index = served.predictor.class_index(target) if target else None
        except UserError as error:
            raise RequestError("parameters", str(error)) from None
        started = time.perf_counter()
        async with self.receive(request, served) as (body, reservation):
            work = self._explain(served, reservation, body, index, method, stage)
            explained = await self.until_disconnect(request, work)
        served.metrics.explain.observe(time.perf_counter() - started)
        return {"model": served.name, "method": method, **explained}

    async def _explain(
        self,
        served: ServedModel,
        reservation: Reservation,
        encoded: bytes,
        index: int | None,
        method: str,
        stage: int | None,
    ) -> dict[str, Any]:
        views, box, seconds = await self.pool.prepare(served.predictor, encoded)
        served.metrics.decode.observe(seconds)
        probabilities = (await served.batcher.answer(reservation, views)).probabilities
        target = int(probabilities.argmax()) if index is None else index

        def draw() -> str:
            heat = served.predictor.heat_maps(views[None], np.array([target]), method=method, stage=stage)[0]
            PIL.Image.fromarray(heat_colors(heat)).save(buffer := io.BytesIO(), "PNG")
            return base64.b64encode(buffer.getvalue()).decode()

        drawn = await asyncio.get_running_loop().run_in_executor(self.explaining, draw)
        named = {"class": served.predictor.classes[target], "probability": float(probabilities[target])}
        return {**named, "box": box, "heat_map": drawn}


async def gather_or_cancel(answers: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """All answers; the first error cancels the others."""
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
