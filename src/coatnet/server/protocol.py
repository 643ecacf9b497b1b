"""The Open Inference Protocol v2 over HTTP and in JSON, as KServe and Triton define it.

Shapes: N images, R resolution, C channels, K classes. The one input is "images": UINT8 (N, R, R, C), as the network
sees them (FP32, values as files hold them, for a model of other images than 8-bit RGB), or BYTES (N,), image files of
any size in base64. The outputs are "probabilities", FP32 (N, K), and "class", BYTES (N,), the likeliest; a calibrated
model also has "novelty", FP32 (N,), and "unknown", BOOL (N,).
"""

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NoReturn

from fastapi import FastAPI, Request, Response
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from coatnet.data.decode import Scale
from coatnet.inference.graph import INPUT
from coatnet.inference.predictor import Predictor
from coatnet.server.batching import Answer, Reservation
from coatnet.server.errors import PROTOCOL_ERRORS, RequestError, Responses, json_response
from coatnet.server.service import ServedModel, Service, gather_or_cancel
from coatnet.server.tensors import PLACEHOLDER, cut_out_data, read_files, read_floats, read_pixels, refuse
from coatnet.version import __version__

PROBABILITIES, CLASS, NOVELTY, UNKNOWN = "probabilities", "class", "novelty", "unknown"
CALIBRATED_OUTPUTS = (
    {"name": NOVELTY, "datatype": "FP32", "shape": [-1]},
    {"name": UNKNOWN, "datatype": "BOOL", "shape": [-1]},
)
Shape = list[Annotated[int, Field(gt=0, lt=2**31)]]


class InputTensor(BaseModel):
    """The one input. `data` is read by `read_pixels` and `read_files`, by the shape."""

    name: Literal["images", "pictures"]  # the second is that of release 0.1
    shape: Annotated[Shape, Field(min_length=1)]
    datatype: Literal["UINT8", "FP32", "BYTES"]
    data: list[Any]


class RequestedOutput(BaseModel):
    name: Literal["probabilities", "class", "novelty", "unknown"]


def _distinct(outputs: list[RequestedOutput]) -> list[RequestedOutput]:
    if len({output.name for output in outputs}) != len(outputs):
        raise ValueError("an output is named twice")
    return outputs


class InferenceRequest(BaseModel):
    """The body of `POST /v2/models/{name}/infer`. Without `outputs`, all are given."""

    id: str | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[RequestedOutput] | None, AfterValidator(lambda given: _distinct(given or []))] = None


class OutputTensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class InferenceResponse(BaseModel):
    model_name: str
    id: str | None = None
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


def add_protocol(app: FastAPI, service: Service, secured: list[Any]) -> None:
    """Add the routes under /v2; those that name a model carry the dependencies `secured`."""
    not_found = {status: PROTOCOL_ERRORS[status] for status in (401, 404)}

    @app.get("/v2", responses=_answers(ServerMetadata))
    async def server_metadata() -> Response:
        """The server's name and version."""
        return json_response({"name": "coatnet", "version": __version__, "extensions": []})

    @app.get("/v2/health/live", responses=_answers(Live, 200, 503))
    async def live() -> Response:
        """Whether the inference threads run; if not, only a restart helps."""
        return json_response({"live": service.alive}, 200 if service.alive else 503)

    @app.get("/v2/health/ready", responses=_answers(Ready, 200, 503))
    async def ready() -> Response:
        """Whether to send requests here."""
        return json_response({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/v2/models/{name}", dependencies=secured, responses=_answers(ModelMetadata) | not_found)
    async def metadata(name: str) -> Response:
        """Inputs and outputs of a model."""
        return json_response(model_metadata(service.model(name)))

    @app.get("/v2/models/{name}/ready", dependencies=secured, responses=_answers(ModelReady, 200, 503) | not_found)
    async def model_ready(name: str) -> Response:
        """Whether a model answers."""
        served = service.model(name)
        is_ready = served.batcher.ready and not service.draining
        return json_response({"name": served.name, "ready": is_ready}, 200 if is_ready else 503)

    @app.post(
        "/v2/models/{name}/infer",
        dependencies=secured,
        responses=_answers(InferenceResponse) | PROTOCOL_ERRORS,
        # FastAPI would read the body unbounded: the route reads it, within the limits of the uploads.
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": _schema(InferenceRequest)}}}
        },
    )
    async def infer(request: Request, name: str) -> Response:
        """The probabilities of images, given as pixels or as image files."""
        if "inference-header-content-length" in request.headers:
            raise RequestError("json", "binary tensors behind the JSON are not supported; send data as JSON")
        served = service.model(name)
        served.batcher.check()

        async def answer_one(reservation: Reservation, image: Any) -> Answer:
            if isinstance(image, bytes):
                return (await service.from_file(served, reservation, image))[0]
            return await served.batcher.answer(reservation, image)

        async def answer(body: bytes) -> bytes:
            given, images = await service.pool.run(
                lambda check: read_request(body, served.predictor, service.settings.max_queue, check)
            )
            with served.batcher.reserve(len(images)) as reservation:
                answers = await gather_or_cancel([answer_one(reservation, image) for image in images])
            return await service.pool.run(lambda _: write_response(served, given, answers))

        async with service.uploads.receive(request) as body:
            content = await service.until_disconnect(request, answer(body))
        return Response(content, media_type="application/json")


def read_request(
    body: bytes, predictor: Predictor, max_images: int, check: Callable[[], None] = lambda: None
) -> tuple[InferenceRequest, Sequence[Any]]:
    """The request, and its images: bytes of image files, or uint8 arrays (1, R, R, C).

    `check` is called now and then; what it raises ends the work.

    Raises:
        RequestError: code "json": it is not JSON, not of the protocol, or not what the model takes.
    """
    envelope, data = cut_out_data(body, max_images, decimals=predictor.scale is not None)
    try:
        request = InferenceRequest.model_validate(json.loads(envelope, parse_constant=_refuse_constant), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        refuse(f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}")
    except (ValueError, RecursionError):  # not JSON, not UTF-8, a number of thousands of digits, nested too deeply
        refuse("the body is not JSON that can be read")
    (tensor,) = request.inputs
    if tensor.data != [PLACEHOLDER]:
        refuse("data is not in the input, or not only there")
    if tensor.shape[0] > max_images:
        refuse(f"{tensor.shape[0]} images in one request; there may be {max_images}")
    for output in request.outputs or []:
        if output.name in (NOVELTY, UNKNOWN) and predictor.bundle.calibration is None:
            refuse(f"outputs: there is no {output.name}: this model is not calibrated")
    if tensor.datatype == "BYTES":
        return request, read_files(data, tensor.shape)
    image_shape = predictor.image_shape[1:]
    if tuple(tensor.shape[1:]) != image_shape:
        refuse(f"shape is {tensor.shape[:10]}; this model takes {[-1, *image_shape]}")
    scale: Scale | None = predictor.scale
    wanted = "UINT8" if scale is None else "FP32"
    if tensor.datatype != wanted:
        refuse(f"datatype is {tensor.datatype}; this model takes {wanted}, or image files in BYTES")
    if scale is None:
        return request, list(read_pixels(data, tensor.shape, check)[:, None])
    levels = scale.levels(read_floats(data, tensor.shape, check)).movedim(1, -1)
    return request, list(levels.numpy()[:, None])


def write_response(served: ServedModel, request: InferenceRequest, answers: Sequence[Answer]) -> bytes:
    """The answer in JSON, written image by image: there may be millions of numbers."""
    predictor = served.predictor
    size = len(answers)
    tensors: dict[str, tuple[str, list[int], Callable[[Answer], list[Any]]]] = {
        PROBABILITIES: ("FP32", [size, len(predictor.classes)], lambda answer: answer.probabilities.tolist()),
        CLASS: ("BYTES", [size], lambda answer: [predictor.top(answer.probabilities, 1)[0][0]]),
    }
    if predictor.bundle.calibration is not None:
        tensors[NOVELTY] = ("FP32", [size], lambda answer: [answer.novelty])
        tensors[UNKNOWN] = ("BOOL", [size], lambda answer: [predictor.is_unknown(answer.novelty)])
    outputs = []
    for name in [output.name for output in request.outputs or []] or tensors:
        datatype, shape, values = tensors[name]
        head = json.dumps({"name": name, "datatype": datatype, "shape": shape})
        data = ", ".join(json.dumps(values(row), allow_nan=False)[1:-1] for row in answers)
        outputs.append(f'{head[:-1]}, "data": [{data}]}}')
    identity = {} if request.id is None else {"id": request.id}
    head = json.dumps({"model_name": served.name, **identity})
    return f'{head[:-1]}, "outputs": [{", ".join(outputs)}]}}'.encode("ascii")


def model_metadata(served: ServedModel) -> dict[str, Any]:
    """Inputs and outputs of a model as the protocol describes them; -1 is any number of images."""
    predictor = served.predictor
    datatype = "UINT8" if predictor.scale is None else "FP32"
    return {
        "name": served.name,
        "versions": [],
        "platform": f"coatnet_{predictor.engine.name}",
        "inputs": [{"name": INPUT, "datatype": datatype, "shape": [-1, *predictor.image_shape[1:]]}],
        "outputs": [
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, len(predictor.classes)]},
            {"name": CLASS, "datatype": "BYTES", "shape": [-1]},
            *([] if predictor.bundle.calibration is None else CALIBRATED_OUTPUTS),
        ],
    }


def _answers(model: type[BaseModel], *statuses: int) -> Responses:
    return {status: {"model": model} for status in statuses or (200,)}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model with its parts in place: OpenAPI resolves references from its own root only."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).rpartition("/")[2]
            return inline(parts[name]) if name else {key: inline(part) for key, part in value.items()}
        return [inline(part) for part in value] if isinstance(value, list) else value

    return inline(schema)


def _refuse_constant(name: str) -> NoReturn:
    refuse(f"{name} is not JSON")
