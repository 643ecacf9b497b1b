"""Untrusted files, read by real processes in little memory: one line each, and nothing left behind."""

import json
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.data.test_faults_size import gif_header, progressive, tiff, webp_header

from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.model.network import create_model

MEMORY = 7_000_000_000  # bytes of addresses: torch alone takes some three


def coatnet(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coatnet", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COATNET_CACHE_DIR": str(folder / "cache")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=2).eval()
    return Bundle(model, ("cat", "dog"), Preprocessing(resolution=8)).save(tmp_path / "bundle")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.fault("D1", "a bundle with {key} = {value}", "one line before memory is taken, exit 2")
@pytest.mark.parametrize(
    ("key", "value"), [("crop_pct", 1e-5), ("input_size", [3, 8192, 8192]), ("std", [5e-324] * 3)], ids=str
)
def test_a_bundle_that_asks_for_much(key, value, bundle: Path, image: Path, tmp_path: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config["pretrained_cfg"][key] = value
    (bundle / "config.json").write_text(json.dumps(config))
    ended = coatnet("predict", bundle, image, folder=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith(f"coatnet: error: {bundle}/config.json: ")


@pytest.mark.fault("D2", "weights of 3e38, finite by themselves", "an error of the image, no NaN in JSON, exit 1")
def test_an_answer_that_is_none(bundle: Path, image: Path, tmp_path: Path) -> None:
    weights = load_file(bundle / "model.safetensors")
    weights["head.classifier.weight"].fill_(3e38)
    save_file(weights, bundle / "model.safetensors")
    ended = coatnet("predict", bundle, image, "--json", folder=tmp_path)
    line = json.loads(ended.stdout, parse_constant=pytest.fail)
    assert ended.returncode == 1 and line["probabilities"] == {} and "not finite" in line["error"]


def header(size: int, kind: bytes) -> bytes:
    """A header of a tar, with the size as it is told to `tarfile`."""
    member = tarfile.TarInfo("a.png")
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


TARS = {
    "a header of a terabyte": (header(2**40, b"L"), 1),
    "a size below zero": (header(-1024, b"0") + header(0, b"0"), 1),
    "100,000 headers of one member": (header(512, b"L") + b"x" * 511 + b"\0", 100_000),
}


@pytest.mark.fault("D3", "a tar with {kind}", "one line at open, in bounded memory, exit 2")
@pytest.mark.parametrize("kind", TARS)
def test_a_tar_whose_headers_lie(kind: str, tmp_path: Path) -> None:
    content, times = TARS[kind]
    for name in ("train.tar", "val.tar"):
        (tmp_path / "tars").mkdir(exist_ok=True)
        (tmp_path / "tars" / name).write_bytes(content * times)
    ended = coatnet("doctor", tmp_path / "tars", folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "") and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"coatnet: error: {tmp_path}/tars/train.tar: truncated")


@pytest.mark.fault("D8", "images that inflate beyond their size", "each refused in a line by doctor and predict")
def test_decompression_bombs_among_images(bundle: Path, tmp_path: Path) -> None:
    bombs = {
        "tile.tif": tiff({256: 100, 257: 100, 258: 8, 259: 8, 262: 1, 277: 1, 322: 45_008, 323: 45_008}, b""),
        "scans.jpg": progressive(4000, 300),
        "large.gif": gif_header(65_000, 65_000),
        "large.webp": webp_header(16_000, 16_000),
    }
    for name in ("cat", "dog"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 20), (40 * number, 90, 200)).save(folder / f"{number}.png")
    for name, data in bombs.items():
        (tmp_path / "images/cat" / name).write_bytes(data)
    for ended in (
        coatnet("doctor", tmp_path / "images", folder=tmp_path),
        coatnet("predict", bundle, tmp_path / "images", folder=tmp_path),
    ):
        assert ended.returncode == 1 and "Traceback" not in ended.stderr
        lines = (ended.stdout + ended.stderr).splitlines()
        for name in bombs:
            assert [": large: " in line for line in lines if f"cat/{name}:" in line] == [True]
    assert "training uses others in their place" in coatnet("doctor", tmp_path / "images", folder=tmp_path).stdout


@pytest.mark.fault("D9", "valid images of 60 megapixels", "they train, at half their size, and doctor finds nothing")
def test_large_images_train(tmp_path: Path) -> None:
    for number, name in enumerate(("a/0.jpg", "a/1.png", "b/0.jpg", "b/1.png")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9504, 6336), 60 * number).save(path, quality=30, compress_level=1)
    assert coatnet("doctor", tmp_path / "images", folder=tmp_path).returncode == 0
    brief = ("--epochs", 1, "--num_workers", 0, "--model", "coatnet-femto-16", "--resolution", 16)
    ended = coatnet("train", "--data", tmp_path / "images", "--out", tmp_path / "run", *brief, folder=tmp_path)
    assert ended.returncode == 0 and "unreadable" not in ended.stderr
    refused = coatnet("predict", tmp_path / "run", tmp_path / "images/a/1.png", "--max-megapixels", 50, folder=tmp_path)
    assert refused.returncode == 1 and "--max-megapixels 61 or COATNET_MAX_MEGAPIXELS=61 admits it" in refused.stderr
