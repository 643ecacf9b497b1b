"""What holds for every answer, whoever wrote it: security headers, and no answer lost behind an unread body."""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The page shows images that were dropped on it as blobs.
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# Swagger UI writes style elements and has its icons as data.
DOCS_POLICY = PAGE_POLICY.replace("img-src 'self' blob:", "img-src 'self' data:; style-src 'self' 'unsafe-inline'")
LINGER_SECONDS = 2.0


class Guard:
    """The outermost layer of the application.

    An answer that is given while the client still sends is followed by reading, and forgetting, the rest for
    `LINGER_SECONDS`: closing at once would reset the connection, and the client would lose the answer.
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
                    async with asyncio.timeout(LINGER_SECONDS):
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
