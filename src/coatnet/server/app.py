"""The application: its routes, error answers, page and documentation.

The contract with the page at `/` and with every other client stands in the OpenAPI description at `/docs`, from the
models below and those of `errors.py` and `protocol.py`. `POST /predict?model=NAME&top_k=5` takes the bytes of an image
as the body, without a form, and so does `POST /explain`. Where a token is set, `/models`, `/predict`, `/explain`,
`/metrics` and `/v2/models/...` require `Authorization: Bearer TOKEN`; the page, the documentation and the health checks
do not. Class names are arbitrary text.
Nothing is fetched from elsewhere, no model is loaded or unloaded, and no upload is written to a disk.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from mimetypes import guess_type
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coatnet.bundle.bundle import without_places
from coatnet.data.decode import FORMATS
from coatnet.errors import UserError, nearest_option, one_line
from coatnet.inference.predictor import Predictor
from coatnet.server import Settings
from coatnet.server.access import check_origin, token_required
from coatnet.server.connections import MAX_HEADER_BYTES, OVER_LIMIT, WRITE_BYTES, header_error
from coatnet.server.errors import ERRORS, ClientDisconnected, RequestError, error_response, json_response
from coatnet.server.metrics import CONTENT_TYPE
from coatnet.server.protocol import add_protocol
from coatnet.server.service import Service
from coatnet.version import __version__

# The page shows images that were dropped on it from blob URLs.
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# Swagger UI writes style elements and has its icons in data URLs.
DOCS_POLICY = PAGE_POLICY.replace("img-src 'self' blob:", "img-src 'self' data:; style-src 'self' 'unsafe-inline'")
DRAIN_SECONDS = 2.0
MAX_TARGET_BYTES = 8192


class Middleware:
    """The outermost layer of the application: what is refused before any route, and how requests end.

    If an answer is sent before the client has sent its whole body, the rest is read and discarded for up to
    `DRAIN_SECONDS`: closing at once would reset the connection, and the client would lose the answer.
    """

    def __init__(
        self, app: ASGIApp, service: Service, allowed_hosts: Collection[str], own_names: Collection[str]
    ) -> None:
        self.app, self.service = app, service
        self.allowed_hosts = {name.lower() for name in allowed_hosts}
        self.own_names = {name.lower() for name in own_names} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        over_limit = scope.get("state", {}).get(OVER_LIMIT, "")
        unread = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
        begun = False

        async def listen() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                close = unread or over_limit
                extra = _headers(scope["path"]) + ([(b"connection", b"close")] if close else [])
                await send({**message, "headers": [*message.get("headers", ()), *extra]})
                return
            body = message.get("body", b"")
            for start in range(0, len(body), WRITE_BYTES):  # each waits until the client has read the one before
                piece = body[start : start + WRITE_BYTES]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            if message.get("more_body", False):
                return
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    while unread:
                        await listen()
            await send({"type": "http.response.body"})

        app = self.app
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope  # uvicorn leaves the body out
        try:
            if over_limit:
                raise RequestError("full", over_limit)
            self._check(scope)
        except RequestError as error:
            self.service.metrics.rejections.labels(error.code).inc()
            app = error_response(error, scope["path"])
        try:
            await app(asked, listen, answer)
        except asyncio.CancelledError:  # the server ends
            self.service.unanswered += 1
            unread = False
            if not begun:
                error = RequestError("stopped", "the server has ended; try again in a moment")
                await error_response(error, scope["path"])(scope, receive, answer)

    def _check(self, scope: Scope) -> None:
        """Raise RequestError for what no route is to see."""
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_TARGET_BYTES:
            raise RequestError("target", f"the path with its parameters may have {MAX_TARGET_BYTES:,} bytes")
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise header_error()
        check_origin(scope, self.allowed_hosts, self.own_names)


def _headers(path: str) -> list[tuple[bytes, bytes]]:
    policy = DOCS_POLICY if path.startswith("/docs") else PAGE_POLICY
    return [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"referrer-policy", b"no-referrer"),
    ]


PAGE = Path(__file__).with_name("page")
SWAGGER_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>coatnet: the API</title>
<link rel="icon" href="/favicon.svg">
<link rel="stylesheet" href="/docs/files/swagger-ui.css">
<div id="docs"></div>
<script src="/docs/files/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
"""
SWAGGER_FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
SWAGGER_START = 'SwaggerUIBundle({ url: "/openapi.json", dom_id: "#docs", validatorUrl: null });\n'


class ModelInfo(BaseModel):
    """One model of `GET /models`. `classes` counts them, `resolution` is a side in pixels, or `192 x 320`,
    `max_bytes` bounds a body, `card` is its README."""

    name: str
    variant: str
    classes: int
    class_names: list[str]
    resolution: int | str
    multilabel: bool
    engine: str
    precision: str
    num_parameters: int
    max_bytes: int
    card: str


class ClassProbability(BaseModel):
    name: str = Field(alias="class")
    probability: float


class Milliseconds(BaseModel):
    decode: float
    queue: float
    inference: float
    total: float


class PredictionAnswer(BaseModel):
    """The likeliest classes, likeliest first.

    `novelty`: the share of known images that look less foreign, of a calibrated model. `unknown`: whether that is above
    the limit of `--reject`. `set`: the classes that together hold the truth as often as `--set` asks.
    """

    model: str
    predictions: list[ClassProbability]
    novelty: float | None = None
    unknown: bool = False
    set: list[str] | None = None
    milliseconds: Milliseconds


class PredictParameters(BaseModel, extra="forbid"):
    """The query of `POST /predict`."""

    model: str = Field("", description="a name of GET /models; the first one if it is left out")
    top_k: int = Field(5, ge=1, description="how many of the likeliest classes")


class ExplanationAnswer(BaseModel):
    """What mattered for a class.

    `heat_map`: a PNG in base64, as large as what the model sees, blue to red and more opaque where hot. `box`: where it
    lies in the image, upright: left, top, right and bottom, as fractions of its width and height.
    """

    model: str
    method: str
    name: str = Field(alias="class")
    probability: float
    box: tuple[float, float, float, float]
    heat_map: str


class ExplainParameters(BaseModel, extra="forbid"):
    """The query of `POST /explain`."""

    model: str = Field("", description="a name of GET /models; the first one if it is left out")
    # Occlusion takes hundreds of predictions an image.
    method: Literal["layercam", "attention"] = Field("layercam", description="of `coatnet explain`")
    target: str = Field("", description="name of the class to explain; the likeliest if it is left out")
    stage: int | None = Field(None, description="for layercam: 0 for the stem, 1, 2, ... for the stages")


IMAGE_BODY = {
    "requestBody": {
        "description": f"the bytes of an image file: {', '.join(each.name for each in FORMATS)}",
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def create_app(
    predictors: Mapping[str, Predictor],
    settings: Settings | None = None,
    token: str | None = None,
    allowed_hosts: Collection[str] = (),
    own_names: Collection[str] = (),
) -> tuple[Middleware, Service]:
    """Build the ASGI application.

    Args:
        predictors: models by the name that clients use; requests without a name go to the first one.
        settings: limits of the server.
        token: what clients must send as `Authorization: Bearer TOKEN`; None asks for nothing.
        allowed_hosts: names by which clients may address the server, and at which pages may be that use it; "*" lets
            clients address it by any name.
        own_names: names by which clients may address the server besides these, localhost and addresses.

    Returns:
        The application, and the service that computes its answers.

    Raises:
        UserError: the files of Swagger UI are not installed.
    """
    service = Service(predictors, settings or Settings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="coatnet", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.openapi_version = "3.1.0"
    secured = token_required(token)
    _add_error_handlers(app, service)
    _add_routes(app, service, secured)
    add_protocol(app, service, secured)
    _add_docs(app)
    _add_page(app)
    return Middleware(app, service, allowed_hosts, own_names), service


def _add_routes(app: FastAPI, service: Service, secured: list[Any]) -> None:
    # Written once: there may be many thousand class names.
    listing = json_response(
        [_model_info(name, served.predictor, service.settings.max_bytes) for name, served in service.models.items()]
    ).body

    @app.get("/models", dependencies=secured, responses={200: {"model": list[ModelInfo]}, 401: ERRORS[401]})
    async def models() -> Response:
        """The models that are served here."""
        return Response(listing, media_type="application/json")

    @app.post(
        "/predict",
        dependencies=secured,
        responses={200: {"model": PredictionAnswer}} | ERRORS,
        openapi_extra=IMAGE_BODY,
    )
    async def predict(request: Request, asked: Annotated[PredictParameters, Query()]) -> Response:
        """The classes of one image with their probabilities, likeliest first."""
        return json_response(await service.predict(request, asked.model, asked.top_k))

    @app.post(
        "/explain",
        dependencies=secured,
        responses={200: {"model": ExplanationAnswer}} | ERRORS,
        openapi_extra=IMAGE_BODY,
    )
    async def explain(request: Request, asked: Annotated[ExplainParameters, Query()]) -> Response:
        """What mattered in one image for one class, as a heat map."""
        return json_response(await service.explain(request, asked.model, asked.method, asked.target, asked.stage))

    @app.get("/metrics", dependencies=secured, response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.exposition(), headers={"content-type": CONTENT_TYPE})


def _add_docs(app: FastAPI) -> None:
    """Add Swagger UI under /docs, served from an installed package. Raises UserError if it is not installed."""
    package = find_spec("fastapi_offline")
    if package is None or package.origin is None:
        raise UserError("the server needs fastapi-offline: pip install 'coatnet[serve]'")

    files = Path(package.origin).with_name("static")
    _add_file(app, "/docs", SWAGGER_PAGE.encode(), "text/html")
    _add_file(app, "/docs/start.js", SWAGGER_START.encode(), "text/javascript")
    for name in SWAGGER_FILES:
        _add_file(app, f"/docs/files/{name}", (files / name).read_bytes(), guess_type(name)[0])


def _add_page(app: FastAPI) -> None:
    for file in PAGE.iterdir():
        path = "/" if file.name == "index.html" else f"/{file.name}"
        _add_file(app, path, file.read_bytes(), guess_type(file.name)[0], {"cache-control": "no-cache"})


def _add_file(
    app: FastAPI, path: str, content: bytes, media_type: str | None, headers: Mapping[str, str] | None = None
) -> None:
    """One route a file, which is kept in memory: no path of a request becomes a path on the disk, a client that does
    not read holds no file open, and ranges, which could ask for the same bytes many times, are not supported."""

    async def send(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=headers)

    app.router.add_route(path, send, methods=["GET"])


def _model_info(name: str, predictor: Predictor, max_bytes: int) -> dict[str, Any]:
    bundle = predictor.bundle
    # The recipe is for who trains; of older bundles it names folders of another machine.
    record = {key: value for key, value in without_places(bundle.record).items() if key != "recipe"}
    shown = replace(bundle, record=record)
    return {
        "name": name,
        "variant": bundle.model.variant.name,
        "classes": len(bundle.classes),
        "class_names": list(bundle.classes),
        "resolution": bundle.preprocessing.shown_size,
        "multilabel": bundle.multilabel,
        "engine": predictor.engine.name,
        "precision": predictor.engine.precision,
        "num_parameters": sum(parameter.numel() for parameter in bundle.model.parameters()),
        "max_bytes": max_bytes,
        "card": shown.card(),
    }


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    def refused(request: Request, error: RequestError) -> Response:
        service.metrics.rejections.labels(error.code).inc()
        if service.draining and error.code == "slow":  # the end of its upload was waited for in vain
            service.unanswered += 1
        return error_response(error, request.url.path)

    @app.exception_handler(RequestError)
    async def on_request_error(request: Request, error: RequestError) -> Response:
        return refused(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_parameters(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        asked = ExplainParameters if request.url.path == "/explain" else PredictParameters
        name, known = str(first["loc"][-1])[:100], asked.model_fields
        problem = f"{name}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            problem = f"there is no parameter {name!r}{nearest_option(name, known)}; there are {', '.join(known)}"
        return refused(request, RequestError("parameters", one_line(problem)))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            answer = refused(request, RequestError("method", f"{request.method} is not for this path"))
            answer.headers.update(error.headers or {})
            return answer
        return refused(request, RequestError("path", "there is nothing at this path"))

    @app.exception_handler(ClientDisconnected)
    async def on_disconnect(request: Request, _: ClientDisconnected) -> Response:
        service.metrics.disconnects.inc()
        return Response(status_code=400)  # the client has left

    @app.exception_handler(Exception)
    async def on_internal_error(request: Request, _: Exception) -> Response:
        return refused(request, RequestError("internal", "internal error; see the log of the server"))
