"""Answers that are no prediction: a code for programs, a line for people, a status for HTTP."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

STATUS = {
    "json": 400,  # not JSON, or not what the protocol asks for
    "token": 401,
    "path": 404,
    "model": 404,
    "method": 405,
    "slow": 408,
    "bytes": 413,
    "format": 415,
    "empty": 422,
    "truncated": 422,
    "large": 422,
    "pixels": 422,
    "corrupt": 422,
    "unreadable": 422,
    "parameters": 422,
    "internal": 500,
    "inference": 500,
    "full": 503,
    "stopped": 503,
    "deadline": 504,
}
RETRY_SECONDS = 1


class Refusal(Exception):
    """Why a request has no prediction; `code` is one of STATUS, `message` one readable line."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message
        self.status = STATUS[code]

    @property
    def headers(self) -> dict[str, str]:
        match self.status:
            case 503:
                return {"retry-after": str(RETRY_SECONDS)}
            case 401:
                return {"www-authenticate": "Bearer"}
        return {}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: class names may hold what no encoding can write."""
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


def refuse(refusal: Refusal, path: str) -> Response:
    """The refusal as JSON; under /v2 with the error object of the Open Inference Protocol, a single string."""
    error = refusal.message if path.startswith("/v2") else {"code": refusal.code, "message": refusal.message}
    return json_response({"error": error}, refusal.status, refusal.headers)
