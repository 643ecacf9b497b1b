"""What every test finds: few threads, no terminal tricks, no downloads, nothing left behind."""

import os
import shutil
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A script's background jobs begin with SIGINT ignored, and so would the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Data and caches of the person who runs the tests do not reach them."""
    monkeypatch.delenv("COATNET_DATA_DIR", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "110")


BROWSER_OPTIONS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
BROWSER_OPTIONS += "--disable-component-update --disable-sync"


@pytest.fixture(scope="session")
def chromium() -> "Iterator[Browser]":
    """One browser for all tests of a process: Playwright runs one event loop."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("needs a browser: apt-get install chromium (or Google Chrome)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=BROWSER_OPTIONS.split())
        yield browser
        browser.close()
