"""The requests of the guide to serving that are not Python (tests/test_docs.py runs that), and its complete lists."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.pages import ROOT, blocks
from tests.server.serving import Address, image, make_predictor, running

from coatnet.server.errors import STATUS

PAGE = ROOT / "docs/guides/serving.md"
GUIDE = PAGE.read_text(encoding="utf-8")
CLASSES = ("daisy", "rose", "tulip", "dandelion")


def texts(language: str) -> list[str]:
    return [block.text for block in blocks(PAGE, language)]


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with running({"mine": make_predictor(classes=CLASSES)}) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "image.jpg").write_bytes(image())
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    return found.stdout


def here(block: str, address: Address) -> str:
    assert "127.0.0.1:8080" in block
    return block.replace("127.0.0.1:8080", f"127.0.0.1:{address.port}")


def best(address: Address) -> tuple[str, float]:
    first = address.predict(image()).json["predictions"][0]
    return first["class"], first["probability"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(address: Address, folder: Path) -> None:
    predict, infer = [block for block in texts("sh") if "curl" in block]
    answer = json.loads(run(["bash", "-c", here(predict, address)], folder))
    assert len(answer["predictions"]) == 3 and answer["predictions"][0]["class"] == best(address)[0]
    (shown,) = map(json.loads, texts("json"))
    assert shown.keys() == answer.keys() and shown["milliseconds"].keys() == answer["milliseconds"].keys()
    outputs = json.loads(run(["bash", "-c", here(infer, address)], folder))["outputs"]
    assert outputs[1]["data"] == [best(address)[0]]


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_javascript(address: Address, folder: Path) -> None:
    (block,) = texts("js")
    (folder / "ask.mjs").write_text(here(block, address), encoding="utf-8")
    lines = run(["node", "ask.mjs"], folder).splitlines()
    assert len(lines) == 3 and lines[0].endswith(best(address)[0])


def test_every_code_of_an_error_is_explained() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| (.*?) \|", GUIDE, re.MULTILINE)
    explained = {(code, status) for statuses, codes in rows for code in re.findall("`(.*?)`", codes) for status in
                 map(int, statuses.split(", "))}  # fmt: skip
    assert {(code, status) for code, status in STATUS.items() if code != "unreadable"} <= explained


def test_every_figure_is_listed(address: Address) -> None:
    exposed = re.findall(r"^# TYPE (coatnet_\w+) ", address.ask("GET", "/metrics").body.decode(), re.MULTILINE)
    listed = set(re.findall(r"`(coatnet_\w+)`", GUIDE))
    missing = {name for name in exposed if not name.endswith("_created")} - listed
    assert missing <= {"coatnet_model_info", "coatnet_upload_bytes"}
