"""The routes of the Open Inference Protocol v2, as Triton and KServe speak it over HTTP, in JSON."""

from typing import Any

from fastapi import FastAPI, Request, Response

from coatnet.server.batching import Admission, Answer
from coatnet.server.errors import Refusal, json_response
from coatnet.server.schemas import (
    FLAG,
    INFERENCE,
    INFERENCE_BODY,
    PROTOCOL_ERRORS,
    STRING,
    TENSOR,
    answer,
    fields,
    listing,
)
from coatnet.server.service import Service
from coatnet.server.tensors import model_metadata, read_inference, write_inference
from coatnet.version import __version__

LIVE = fields(live=FLAG)
READY = fields(ready=FLAG)
Responses = dict[int | str, dict[str, Any]]


def add_protocol(app: FastAPI, service: Service, secured: list[Any]) -> None:
    """Everything under /v2."""
    not_found: Responses = {status: PROTOCOL_ERRORS[status] for status in (401, 404)}

    @app.get(
        "/v2", responses={200: answer("the server", fields(name=STRING, version=STRING, extensions=listing(STRING)))}
    )
    async def server_metadata() -> Response:
        """The server's name and version."""
        return json_response({"name": "coatnet", "version": __version__, "extensions": []})

    @app.get("/v2/health/live", responses={200: answer("alive", LIVE), 503: answer("restart it", LIVE)})
    async def live() -> Response:
        """Whether the inference threads run; if not, only a restart helps."""
        return json_response({"live": service.alive}, 200 if service.alive else 503)

    @app.get("/v2/health/ready", responses={200: answer("ready", READY), 503: answer("not now", READY)})
    async def ready() -> Response:
        """Whether to send requests here."""
        return json_response({"ready": service.ready}, 200 if service.ready else 503)

    @app.get(
        "/v2/models/{name}",
        dependencies=secured,
        responses={
            200: answer("inputs and outputs", fields(name=STRING, inputs=listing(TENSOR), outputs=listing(TENSOR))),
            **not_found,
        },
    )
    async def metadata(name: str) -> Response:
        """Inputs and outputs of a model."""
        served = service.model(name)
        return json_response(model_metadata(served.name, served.predictor))

    @app.get(
        "/v2/models/{name}/ready",
        dependencies=secured,
        responses={
            200: answer("ready", fields(name=STRING, ready=FLAG)),
            503: answer("not now", fields(name=STRING, ready=FLAG)),
            **not_found,
        },
    )
    async def model_ready(name: str) -> Response:
        """Whether a model answers."""
        served = service.model(name)
        is_ready = served.batcher.ready and not service.draining
        return json_response({"name": served.name, "ready": is_ready}, 200 if is_ready else 503)

    @app.post(
        "/v2/models/{name}/infer",
        dependencies=secured,
        responses=INFERENCE | PROTOCOL_ERRORS,
        openapi_extra=INFERENCE_BODY,
    )
    async def infer(request: Request, name: str) -> Response:
        """The probabilities of images, given as pixels or as encoded files."""
        if "inference-header-content-length" in request.headers:
            raise Refusal("json", "binary tensors behind the JSON are not understood here; send data as JSON")
        served = service.model(name)
        served.batcher.check()
        async with service.bodies.receive(request) as body:
            asked = read_inference(body, served.predictor, service.settings.max_queue)

            async def answer_one(admission: Admission, image: Any) -> Answer:
                if isinstance(image, bytes):
                    return (await service.from_file(served, admission, image))[0]
                return await served.batcher.answer(admission, image)

            answers = await service.all_answers(request, served, asked.images, answer_one)
        rows = [one.probabilities for one in answers]
        return json_response(write_inference(served.name, asked, rows, served.predictor))
