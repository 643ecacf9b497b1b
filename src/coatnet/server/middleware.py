"""Middleware around every answer: security headers, and reading the rest of a body that was answered early."""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The page shows images that were dropped on it from blob URLs.
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# Swagger UI writes style elements and has its icons in data URLs.
DOCS_POLICY = PAGE_POLICY.replace("img-src 'self' blob:", "img-src 'self' data:; style-src 'self' 'unsafe-inline'")
DRAIN_SECONDS = 2.0


class Middleware:
    """The outermost layer of the application.

    If an answer is sent before the client has sent its whole body, the rest is read and discarded for up to
    `DRAIN_SECONDS`: closing at once would reset the connection, and the client would lose the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        unread = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])

        async def listen() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = _headers(scope["path"]) + [(b"connection", b"close")] * unread
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_SECONDS):
                        while unread:
                            await listen()
                message = {"type": "http.response.body"}
            await send(message)

        await self.app(scope, listen, answer)


def _headers(path: str) -> list[tuple[bytes, bytes]]:
    policy = DOCS_POLICY if path.startswith("/docs") else PAGE_POLICY
    return [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]
