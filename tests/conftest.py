"""What every test finds: few threads, no terminal tricks, no downloads, nothing left behind."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
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
    # How long something takes here is not what the tests are about: what is printed does not depend on it.
    monkeypatch.setattr("coatnet.system.terminal.REPORTED_WAIT_SECONDS", 3600)


@pytest.fixture(scope="session")
def clothes_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained bundle: a network of 16 pixels that has seen 2,500 images of clothes in gray."""
    import coatnet

    run = tmp_path_factory.mktemp("clothes") / "run"
    seen = {"data": "fashion-mnist-small", "resolution": 16, "epochs": 0.25, "num_workers": 0}
    coatnet.train(coatnet.Recipe(model="coatnet-femto-16", **seen), run)
    return run / "bundle"


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
