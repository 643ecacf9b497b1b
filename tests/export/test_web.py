"""The page of `--format web` in a real Chromium: answers of the bundle, no request elsewhere, offline too."""

import json
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from coatnet.bundle import load
from coatnet.cli.main import main
from coatnet.data.builtin import open_fashion_mnist_small
from coatnet.errors import UserError
from coatnet.export import web
from coatnet.export.signature import Signature
from coatnet.inference import Predictor
from coatnet.system.cache import cached_folder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    Visit = Callable[[Path], tuple[Page, "FileServer"]]

LIMIT = 1e-3  # of a probability, as the guide states: JPEG and transparency may differ by one gray level


@pytest.fixture(scope="module", autouse=True)
def runtime() -> None:
    """onnxruntime-web is in the cache, or npm fetches it."""
    try:
        cached_folder("onnxruntime-web", web.VERSION, web.fetch_runtime)
    except UserError as error:
        if "is another file" in str(error) or "cannot be unpacked" in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def page(clothes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web") / "page"
    assert main(["export", str(clothes_bundle), "--format", "web", "--out", str(out)]) == 0
    return out


class FileServer:
    """`python -m http.server`, and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        port = self.process.stdout.readline().split(" port ")[1].split()[0]
        self.url = f"http://127.0.0.1:{port}/"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def visit(chromium: "Browser") -> "Iterator[Visit]":
    """Opens the page of a folder; afterwards the console must be clean, and no request have gone elsewhere."""
    servers: list[FileServer] = []
    asked: list[str] = []
    said: list[str] = []
    context = chromium.new_context()
    context.on("request", lambda request: asked.append(request.url))

    def open_page(folder: Path) -> "tuple[Page, FileServer]":
        servers.append(FileServer(folder))
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(servers[-1].url)
        return tab, servers[-1]

    yield open_page
    context.close()
    for server in servers:
        server.stop()
    own = tuple(f"{scheme}{server.url}" for server in servers for scheme in ("", "blob:"))
    assert asked and not [url for url in asked if not url.startswith(own)]
    assert not said


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Garments as PNG, in gray and enlarged; one with transparent parts, a JPEG turned by EXIF data, and noise."""
    folder = tmp_path_factory.mktemp("garments")
    garments = [Image.fromarray(pixels) for pixels in open_fashion_mnist_small().validation.images[::300][:5]]
    garments[1:] = [each.resize((93, 70), Image.Resampling.BICUBIC).convert("RGB") for each in garments[1:]]
    alpha = np.tile(np.linspace(0, 255, 93).astype(np.uint8), (70, 1))
    garments[2].putalpha(Image.fromarray(alpha))
    upright = Image.Exif()
    upright[0x0112] = 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8))
    for number, garment in enumerate([*garments[:4], noise]):
        garment.save(folder / f"{number}.png")
    garments[4].save(folder / "turned.jpg", quality=95, exif=upright)
    return sorted(folder.iterdir())


# The answer of the page's own module, with every probability as it is.
ANSWER = """async (base64) => {
  const { Classifier } = await import("./classifier.js");
  window.classifier ??= Classifier.open();
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return (await window.classifier).classify(new Blob([bytes]));
}"""


def answer(tab: "Page", file: Path) -> dict[str, Any]:
    return tab.evaluate(ANSWER, b64encode(file.read_bytes()).decode())


def shown(tab: "Page", file: Path) -> tuple[str, list[str]]:
    """The headline and the classes on the page once it has answered."""
    tab.set_input_files("#files", str(file))
    tab.wait_for_function("name => document.getElementById('image').alt === name", arg=file.name)
    tab.wait_for_selector("#result[aria-busy=false]")
    return tab.inner_text("#headline"), tab.locator("#predictions .class").all_inner_texts()


@pytest.mark.slow
def test_the_page_answers_as_the_bundle_does_and_also_when_the_server_is_gone(
    clothes_bundle: Path, page: Path, files: list[Path], visit: "Visit"
) -> None:
    bundle = load(clothes_bundle)
    expected = Predictor(bundle, "torch", "fp32", reject=0.05)(files, top_k=10)
    tab, server = visit(page)
    online = answer(tab, files[0]) | {"milliseconds": 0}
    for file, right in zip(files, expected, strict=True):
        given = answer(tab, file)
        found = {each["class"]: each["probability"] for each in given["predictions"]}
        assert found == pytest.approx(dict(zip(right.classes, right.probabilities, strict=True)), abs=LIMIT), file.name
        assert given["predictions"][0]["class"] == right.classes[0]
        assert given["novelty"] == pytest.approx(right.novelty, abs=0.01) and given["unknown"] == right.unknown
        headline, classes = shown(tab, file)
        assert set(classes) <= set(right.classes) and classes == [each["class"] for each in given["predictions"]][:5]
        assert headline == "Unknown" if right.unknown else right.classes[0] in headline
    assert len({right.classes[0] for right in expected}) > 1 and expected[-1].novelty is not None

    tab.wait_for_selector("#offline:not([hidden])")
    server.stop()
    for address in (server.url, f"{server.url}index.html"):
        tab.goto(address)
        assert answer(tab, files[0]) | {"milliseconds": 0} == online
    assert shown(tab, files[0])[1][0] == expected[0].classes[0]


def test_the_browser_itself_refuses_what_would_leave(page: Path, chromium: "Browser") -> None:
    server = FileServer(page)
    tab = chromium.new_page()
    tab.goto(server.url)
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    refused = """url => new Promise((resolve) => {
      document.addEventListener("securitypolicyviolation", (event) => resolve(event.blockedURI));
      fetch(url).catch(() => {});
    })"""
    assert tab.evaluate(refused, elsewhere) == elsewhere
    tab.context.close()
    server.stop()


def test_a_file_that_is_no_image_is_refused_and_the_next_one_answered(
    page: Path, files: list[Path], visit: "Visit"
) -> None:
    tab, _ = visit(page)
    text = page / "parity.md"
    headline, classes = shown(tab, text)
    assert headline == "This image cannot be used" and classes == []
    assert len(shown(tab, files[0])[1]) == 5


def test_the_folder_names_all_its_files_for_offline_use_and_has_the_licenses(page: Path) -> None:
    worker = (page / "sw.js").read_text(encoding="utf-8")
    named = worker.partition('..."')[2].partition('"')[0].split()
    there = {str(path.relative_to(page)) for path in page.rglob("*") if path.is_file()}
    aside = {"sw.js", "parity.md", "parity.json", "classify.py", "example.png", "runtime/ThirdPartyNotices.txt"}
    assert set(named) == there - aside
    assert "MIT License" in (page / "runtime/LICENSE.txt").read_text(encoding="utf-8")
    assert json.loads((page / "runtime/package.json").read_text(encoding="utf-8"))["version"] == web.VERSION
    for name in named:
        if name.endswith((".js", ".html")) and not name.startswith("runtime"):
            assert "://" not in (page / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")


@pytest.mark.nightly
def test_weights_of_16_bits_are_half_the_size_and_answer_alike(
    clothes_bundle: Path,
    page: Path,
    files: list[Path],
    visit: "Visit",
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "half"
    assert main(["export", str(clothes_bundle), "--format", "web", "--fp16", "--out", str(out)]) == 0
    size = (out / "model.onnx").stat().st_size
    assert f"model {size / 1e6:.1f} MB, runtime 14.3 MB" in capsys.readouterr().out
    assert size < 0.6 * (page / "model.onnx").stat().st_size
    assert (out / "sw.js").read_text() != (page / "sw.js").read_text()
    model = onnxruntime.InferenceSession(out / "model.onnx")
    tab, _ = visit(out)
    for file in files:
        given = answer(tab, file)
        (right,) = Predictor(load(clothes_bundle), "torch", "fp32")([file], top_k=1)
        best = given["predictions"][0]
        assert best["class"] == right.classes[0]
        assert best["probability"] == pytest.approx(right.probabilities[0], abs=10 * LIMIT)
    assert model.get_modelmeta().custom_metadata_map["weights"] == "float16"


def test_a_model_of_other_values_than_a_browser_reads_is_refused(clothes_bundle: Path, tmp_path: Path) -> None:
    bundle = load(clothes_bundle)
    values = replace(bundle, preprocessing=replace(bundle.preprocessing, value_range=(0.0, 1.0)))
    with pytest.raises(UserError, match="a browser reads 8-bit RGB images"):
        web.write(values, Signature(), {}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "and there is none: install Node.js"),
        ("echo 'npm error code ENOTFOUND' >&2; exit 1", "(npm error code ENOTFOUND): `npm pack"),
        ("echo other > $6/onnxruntime-web.tgz", "is another file than was released"),
    ],
)
def test_without_the_runtime_one_line_says_what_is_missing(
    clothes_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str | None,
    said: str,
) -> None:
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    else:
        fake_npm(tmp_path / "bin", script, monkeypatch)
    out = tmp_path / "out"
    assert main(["export", str(clothes_bundle), "--format", "web", "--out", str(out)]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1
    assert not out.exists() and not (tmp_path / "cache/onnxruntime-web" / web.VERSION).exists()
