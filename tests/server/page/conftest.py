"""The real server, the real page, and a Chromium that no request leaves."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from tests.server.page.serving import Server, draw, save_bundle
from tests.server.page.visiting import Visit

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload=window.hacked=1>',
    "**bold** [link](javascript:window.hacked=1) `code` | cell",
    "w" * 300,
)
TOKEN = "open-sesame"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One model, no token, at most a megabyte an image."""
    bundle = save_bundle(tmp_path_factory.mktemp("plain") / "animals", CLASSES)
    running = Server(str(bundle), "--max-megabytes", "1")
    yield running
    running.kill()


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Three models behind a token: classes that are named to break a page; plain ones; the same, any number of which
    may apply."""
    folder = tmp_path_factory.mktemp("guarded")
    bundles = [save_bundle(folder / "hostile", HOSTILE), save_bundle(folder / "animals", CLASSES)]
    bundles.append(save_bundle(folder / "labels", CLASSES, multilabel=True))
    running = Server(*map(str, bundles), token=TOKEN)
    yield running
    running.kill()


@pytest.fixture(scope="session")
def images(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four images, of which any two in a row have different answers, all of them clear."""
    folder, found, before = tmp_path_factory.mktemp("pictures"), [], ""
    for seed in range(200):
        image = draw(folder / f"image-{seed}.png", seed)
        (best, probability), (_, second) = (each.values() for each in server.answer(image)[:2])
        if best != before and second < 0.8 * probability:
            found, before = [*found, image], best
        if len(found) == 4:
            return found
    raise AssertionError("the network gives every image the same class")


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens the page of a server; afterwards the console must be clean, and no request have gone elsewhere."""
    visits: list[Visit] = []

    def open_page(server: Server, **options: object) -> Visit:
        visits.append(Visit(chromium, server.url, **options))
        return visits[-1]

    yield open_page
    for one in visits:
        one.leave()
    for one in visits:
        assert not one.complaints, f"the console says {one.complaints}"
        assert not one.outside, f"the page asked {one.outside}"
