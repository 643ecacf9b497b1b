"""Windows of an image: which files are read window by window, and what is said of those that cannot be."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.data.decode import MAX_MEGAPIXELS, BadImage, Scale, decode
from coatnet.data.windows import open_windows

RANDOM = np.random.default_rng(0)


def test_a_large_tiff_says_which_package_reads_it_tile_by_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RANDOM.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(tmp_path / "a.tif")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for scale in (None, Scale(3, 0, 255)):
        with open_windows(tmp_path / "a.tif", scale) as windows:  # which is small enough to be decoded whole
            assert windows.size == (70, 90)
    monkeypatch.setenv(MAX_MEGAPIXELS, "0.001")
    missing = r"a\.tif: format: a TIFF that is read tile by tile needs tifffile: pip install 'coatnet\[tiff\]'"
    for scale in (None, Scale(3, 0, 255)):
        with pytest.raises(BadImage, match=missing), open_windows(tmp_path / "a.tif", scale):
            pass


def test_a_large_tiff_that_is_not_read_tile_by_tile_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tifffile")
    Image.fromarray(RANDOM.integers(0, 60_000, (70, 90)).astype(np.uint16)).save(tmp_path / "deep.tif")
    Image.fromarray(RANDOM.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(
        tmp_path / "turned.tif", tiffinfo={274: 6}
    )
    monkeypatch.setenv(MAX_MEGAPIXELS, "0.001")
    for name in ("deep.tif", "turned.tif"):
        with pytest.raises(BadImage, match="large: "), open_windows(tmp_path / name, None):
            pass


@pytest.mark.parametrize(
    "options",
    [
        {"rowsperstrip": 8},
        {"tile": (16, 32), "compression": "deflate"},
        {"planarconfig": "separate", "rowsperstrip": 8},
    ],
)
def test_transparent_parts_of_a_tiff_are_white_in_its_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = RANDOM.integers(0, 256, (70, 90, 4), dtype=np.uint8)
    given = np.moveaxis(pixels, -1, 0) if "planarconfig" in options else pixels
    tifffile.imwrite(tmp_path / "a.tif", given, photometric="rgb", extrasamples=["unassalpha"], **options)
    expected = decode((tmp_path / "a.tif").read_bytes(), "a.tif")
    monkeypatch.setenv(MAX_MEGAPIXELS, "0.006")  # less than all of it
    with open_windows(tmp_path / "a.tif", None) as windows:
        assert torch.equal(windows.read(3, 5, 30, 40), expected[:, 3:33, 5:45])


def test_other_fourth_channels_are_decoded_whole(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = RANDOM.integers(0, 256, (70, 90, 4), dtype=np.uint8)
    kinds = {"premultiplied.tif": ("rgb", ["assocalpha"]), "none.tif": ("rgb", ["unspecified"]), "cmyk.tif": (5, None)}
    for name, (photometric, extra) in kinds.items():
        tifffile.imwrite(tmp_path / name, pixels, photometric=photometric, extrasamples=extra)
        with open_windows(tmp_path / name, None) as windows:
            expected = decode((tmp_path / name).read_bytes(), name)
            assert torch.equal(windows.read(0, 0, 70, 90), expected), name
