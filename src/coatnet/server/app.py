"""The routes of the server, and its contract with the page at `/` and with every other client.

`GET /models` -> 200, a list of
    {"name", "variant", "classes" (how many), "class_names", "resolution", "multilabel", "engine", "precision",
     "num_parameters", "max_bytes" (of a body), "card" (Markdown of the bundle's README, or "")}

`POST /predict?model=NAME&top_k=5`, the bytes of an image as the body, no form around them -> 200,
    {"model", "predictions": [{"class", "probability"}, ...] likeliest first,
     "milliseconds": {"decode", "queue", "inference", "total"}}
    Without `model` it is the first one. `top_k` is at least 1; more than there are classes gives all.

Every other answer is {"error": {"code", "message"}}, the message one readable line:
    400 the request is no HTTP or no JSON      415 this is no image         500 the model failed on this batch
    401 a token is needed                      422 an image that is of no    503 too much to do, with Retry-After
    404 no such model or path                      use, or a wrong parameter  504 the deadline passed
    408 the body came too slowly               413 more bytes than max_bytes

Where a token is set, `/models`, `/predict`, `/metrics` and `/v2/models/...` want `Authorization: Bearer TOKEN`; the
page, the documentation and the two questions of health do not. Class names are arbitrary text. Nothing is fetched
from anywhere, nothing can be loaded or unloaded, and nothing that is uploaded touches a disk.

The content-security policy of the page is `default-src 'self'; img-src 'self' blob:; ...`: no inline script or style.
"""

import hmac
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from coatnet.bundle.card import model_card
from coatnet.inference.predictor import Predictor
from coatnet.server.docs import add_docs
from coatnet.server.errors import ClientGone, Refusal, json_response, refuse
from coatnet.server.metrics import CONTENT_TYPE
from coatnet.server.middleware import Guard
from coatnet.server.protocol import add_protocol
from coatnet.server.schemas import ERRORS, IMAGE_BODY, MODELS, PREDICTION
from coatnet.server.service import Service
from coatnet.server.settings import Settings
from coatnet.version import __version__

PAGE = Path(__file__).with_name("page")


def create_app(
    predictors: Mapping[str, Predictor], settings: Settings | None = None, token: str | None = None
) -> tuple[Guard, Service]:
    """The application, and the service behind it. The first model is the one that nameless requests go to."""
    service = Service(predictors, settings or Settings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="coatnet", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.openapi_version = "3.1.0"
    secured = [Depends(_token_check(token))] if token else []
    _add_answers_to_mistakes(app, service)
    _add_routes(app, service, secured)
    add_protocol(app, service, secured)
    add_docs(app)
    _add_page(app)
    return Guard(app), service


def _add_routes(app: FastAPI, service: Service, secured: list[Any]) -> None:
    listing = [_facts(name, served.predictor, service.settings.max_bytes) for name, served in service.models.items()]

    @app.get("/models", dependencies=secured, responses=MODELS)
    async def models() -> Response:
        """The models that are served here."""
        return json_response(listing)

    @app.post("/predict", dependencies=secured, responses=PREDICTION | ERRORS, openapi_extra=IMAGE_BODY)
    async def predict(
        request: Request,
        model: Annotated[str, Query(description="a name of GET /models; the first one if it is left out")] = "",
        top_k: Annotated[int, Query(ge=1, description="how many of the likeliest classes")] = 5,
    ) -> Response:
        """The likeliest classes of one image."""
        return json_response(await service.predict(request, model, top_k))

    @app.get("/metrics", dependencies=secured, response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.exposition(), headers={"content-type": CONTENT_TYPE})


def _add_page(app: FastAPI) -> None:
    """A route a file: no path from outside ever becomes one of a disk."""
    for file in PAGE.iterdir():

        async def send(_: Request, file: Path = file) -> Response:
            return FileResponse(file, headers={"cache-control": "no-cache"})

        app.router.add_route("/" if file.name == "index.html" else f"/{file.name}", send, methods=["GET"])


def _facts(name: str, predictor: Predictor, max_bytes: int) -> dict[str, Any]:
    bundle = predictor.bundle
    return {
        "name": name,
        "variant": bundle.model.variant.name,
        "classes": len(bundle.classes),
        "class_names": list(bundle.classes),
        "resolution": bundle.preprocessing.resolution,
        "multilabel": bundle.multilabel,
        "engine": predictor.engine.name,
        "precision": predictor.engine.precision,
        "num_parameters": sum(parameter.numel() for parameter in bundle.model.parameters()),
        "max_bytes": max_bytes,
        "card": model_card(bundle),
    }


def _token_check(token: str) -> Any:
    async def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        offered = given.credentials if given else ""
        if not hmac.compare_digest(offered.encode(), token.encode()):
            raise Refusal("token", "this server wants a token: send the header Authorization: Bearer TOKEN")

    return check


def _add_answers_to_mistakes(app: FastAPI, service: Service) -> None:
    def refused(request: Request, refusal: Refusal) -> Response:
        service.metrics.rejections.labels(refusal.code).inc()
        return refuse(refusal, request.url.path)

    @app.exception_handler(Refusal)
    async def on_refusal(request: Request, refusal: Refusal) -> Response:
        return refused(request, refusal)

    @app.exception_handler(RequestValidationError)
    async def on_parameters(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return refused(request, Refusal("parameters", f"{first['loc'][-1]}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            answer = refused(request, Refusal("method", f"{request.method} is not for this path"))
            answer.headers.update(error.headers or {})
            return answer
        return refused(request, Refusal("path", "there is nothing at this path"))

    @app.exception_handler(ClientGone)
    async def on_leaving(request: Request, _: ClientGone) -> Response:
        service.metrics.disconnects.inc()
        return Response(status_code=400)  # to nobody

    @app.exception_handler(Exception)
    async def on_our_mistake(request: Request, _: Exception) -> Response:
        return refused(request, Refusal("internal", "a mistake of ours; the log of the server tells more"))
