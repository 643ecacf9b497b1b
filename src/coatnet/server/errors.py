"""Error answers: a code for programs, one line for people, and the HTTP status of each."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

STATUS = {
    "http": 400,
    "json": 400,  # not JSON, or not what the protocol asks for
    "token": 401,
    "origin": 403,
    "path": 404,
    "model": 404,
    "method": 405,
    "slow": 408,
    "bytes": 413,
    "target": 414,
    "format": 415,
    "host": 421,
    "empty": 422,
    "truncated": 422,
    "large": 422,
    "pixels": 422,
    "channels": 422,
    "corrupt": 422,
    "unreadable": 422,
    "parameters": 422,
    "header": 431,
    "internal": 500,
    "inference": 500,
    "full": 503,
    "stopped": 503,
    "deadline": 504,
}
MEANING = {
    400: "not HTTP, or not JSON of the protocol",
    401: "a token is needed",
    403: "asked by a page of another origin",
    404: "no such model",
    408: "the body arrived too slowly",
    413: "too many bytes",
    414: "the path with its parameters is too long",
    415: "not an image",
    421: "the server is not known by the name in the header Host",
    422: "an image that cannot be decoded, or a wrong parameter",
    431: "the header is too long",
    500: "the model failed on this batch",
    503: "overloaded; Retry-After says when to try again",
    504: "the deadline passed",
}
RETRY_AFTER_SECONDS = 1


class ErrorDetail(BaseModel):
    """`code` is a key of `STATUS`; `message` is one readable line."""

    code: str
    message: str


class ErrorAnswer(BaseModel):
    """Every answer that is not a prediction."""

    error: ErrorDetail


class ProtocolErrorAnswer(BaseModel):
    """The error object of the Open Inference Protocol: one string."""

    error: str


Responses = dict[int | str, dict[str, Any]]
ERRORS: Responses = {
    status: {"model": ErrorAnswer, "description": description} for status, description in MEANING.items()
}
PROTOCOL_ERRORS: Responses = {status: {**response, "model": ProtocolErrorAnswer} for status, response in ERRORS.items()}


class RequestError(Exception):
    """A request that gets no prediction: `code` is one of `STATUS`, `message` one readable line."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message
        self.status = STATUS[code]

    @property
    def headers(self) -> dict[str, str]:
        match self.status:
            case 503:
                return {"retry-after": str(RETRY_AFTER_SECONDS)}
            case 401:
                return {"www-authenticate": "Bearer"}
        return {}


class ClientDisconnected(Exception):
    """The client closed the connection before its answer."""


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, since class names may hold lone surrogates, which UTF-8 cannot encode."""
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


def error_response(error: RequestError, path: str) -> Response:
    """The error as JSON; under /v2 as the error object of the Open Inference Protocol."""
    body = error.message if path.startswith("/v2") else {"code": error.code, "message": error.message}
    return json_response({"error": body}, error.status, error.headers)
