"""A person at the page: what they do with images, and what they see."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Request, Route

MAKE_TRANSFER = """files => {
    const transfer = new DataTransfer();
    for (const { name, type, bytes } of files) {
        const decoded = Uint8Array.from(atob(bytes), (one) => one.charCodeAt(0));
        transfer.items.add(new File([decoded], name, { type }));
    }
    return transfer;
}"""
PASTE = """transfer => document.dispatchEvent(
    new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }))"""


class Visit:
    """One tab of its own, without memory of others. `complaints` is what the console says that was not expected."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.expected: tuple[str, ...] = ()  # parts of what the console may say
        self.complaints: list[str] = []
        self.outside: list[str] = []
        self.predictions: list[Request] = []
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(60_000)  # a busy machine takes its time
        self.context.route(lambda address: not address.startswith((url, "blob:")), self._stop)
        self.page = self.context.new_page()
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._note)
        # Chromium hands over its file dialogs from now on; begun at the first dialog, it could come too late.
        self.page.on("filechooser", lambda _: None)
        self.page.goto(url)

    def leave(self) -> None:
        self.context.close()

    def see(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def drop(self, *files: Path, kind: str = "image/png") -> None:
        """Drag files over the page and let go, in the middle of it."""
        transfer = self._transfer(files, kind)
        for event in ("dragenter", "dragover", "drop"):
            self.page.dispatch_event("main", event, {"dataTransfer": transfer})

    def paste(self, *files: Path) -> None:
        self.page.evaluate(PASTE, self._transfer(files, "image/png"))

    def settle(self) -> None:
        """Wait until nothing moves any more."""
        self.page.evaluate("Promise.all(document.getAnimations().map((animation) => animation.finished))")

    def on_predict(self, answer: Callable[[Route], object]) -> None:
        """Something between page and server deals with every image that is sent."""
        self.page.route("**/predict?*", lambda route: answer(route))  # not `answer`: it may be a list's append

    def _transfer(self, files: Sequence[Path], kind: str) -> Any:
        contents = [
            {"name": file.name, "type": kind, "bytes": base64.b64encode(file.read_bytes()).decode()} for file in files
        ]
        return self.page.evaluate_handle(MAKE_TRANSFER, contents)

    def _stop(self, route: Route) -> None:
        self.outside.append(route.request.url)
        route.abort()

    def _note(self, request: Request) -> None:
        if "/predict" in request.url:
            self.predictions.append(request)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(part in message.text for part in self.expected):
            self.complaints.append(message.text)
