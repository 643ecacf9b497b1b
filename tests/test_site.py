"""The documentation builds without a warning, documents every public name, and needs no network."""

import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from playwright.sync_api import Browser

import coatnet

InventoryFile = pytest.importorskip("sphinx.util.inventory", reason="the dependency group docs").InventoryFile
ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("site")
    command = ["-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-b", "html", str(ROOT / "docs")]
    run = subprocess.run([sys.executable, *command, str(built)], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return built


def public_packages() -> list[str]:
    """The package and its folders, as far as they name what others may use."""
    folders = pkgutil.walk_packages(coatnet.__path__, "coatnet.")
    named = (found.name for found in folders if found.ispkg or found.name.startswith("coatnet.integrations."))
    names = ["coatnet", *named]
    return [name for name in names if hasattr(import_module(name), "__all__")]


def test_every_public_name_is_documented(site: Path) -> None:
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    documented = {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}
    for package in public_packages():
        module = import_module(package)
        for name in module.__all__:
            at_the_front = name in coatnet.__all__ and getattr(coatnet, name) is getattr(module, name)
            assert f"{'coatnet' if at_the_front else package}.{name}" in documented, f"{package}.{name}"


def test_every_page_is_complete_without_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"(https?:[^\"]+)\"", text)
        fetched += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preload|icon)\"[^>]*href=\"(https?:[^\"]+)\"", text)
        assert not fetched, page.name


def test_search_works_in_a_browser_without_a_server(site: Path, chromium: Browser) -> None:
    page = chromium.new_page()
    page.goto(f"{(site / 'search.html').as_uri()}?q=preemption")
    page.locator("#search-results a[href*='guides/scale']").first.wait_for()
    page.close()
