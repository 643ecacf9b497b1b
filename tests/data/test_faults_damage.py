"""Damaged and foreign files, injected one by one: each is decoded or refused by name."""

import itertools
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coatnet.data.datasets import FileDataset
from coatnet.data.decode import BadImage, decode
from coatnet.data.inspection import inspect
from coatnet.data.splits import Splits


def file_dataset(folder: Path, files: dict[str, bytes]) -> FileDataset:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return FileDataset("some", ("a", "b"), folder, list(files), np.arange(len(files)) % 2)


# A1: cut off


@pytest.mark.parametrize("kept", [0.5, -2, -1])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_cut_off_is_refused_as_truncated(photo, encode, kept, progressive, refused):
    data = encode(photo, "JPEG", progressive=progressive)
    end = int(len(data) * kept) if isinstance(kept, float) else kept
    refused(data[:end], "truncated")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_cut_off_are_refused(photo, encode, kind):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    data = encode(noise, kind)
    with pytest.raises(BadImage, match=r"truncated|corrupt"):
        decode(data[: len(data) // 2], "cut")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_header_cut_off_anywhere_is_refused_and_never_crashes(photo, encode, kind):
    data = encode(photo, kind)
    for end in range(1, min(len(data) // 2, 700), 3):
        with pytest.raises(BadImage):
            decode(data[:end], "cut")


def test_jpeg_with_data_after_its_end_is_decoded(photo, encode, distance):
    data = encode(photo, "JPEG", quality=95) + b"\xff\xda trailing video of a motion photo" * 10
    assert distance(decode(data, "motion"), photo) < 2


def test_jpeg_whose_thumbnail_is_whole_but_whose_scan_is_cut_is_truncated(photo, encode, refused):
    thumbnail = encode(photo[::2, ::2], "JPEG")
    data = encode(photo, "JPEG")
    application = b"\xff\xe2" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    refused(data[:2] + application + data[2 : len(data) // 2 + 200], "truncated")


# A2: flipped bytes


def scan_of(data: bytes) -> int:
    return data.index(b"\xff\xda") + 14


def test_jpeg_with_flipped_bytes_decodes_or_is_refused_but_never_crashes(photo, encode):
    data = bytearray(encode(photo, "JPEG"))
    decoded = 0
    for position in range(2, len(data), 7):
        damaged = data.copy()
        damaged[position] ^= 0xFF
        try:
            decoded += decode(bytes(damaged), "flipped").shape[0] == 3
        except BadImage as error:
            assert error.name == "flipped"
    assert decoded > 10


def test_strict_inspection_reports_warnings_of_the_jpeg_library(photo, encode, tmp_path):
    data = bytearray(encode(np.kron(photo, np.ones((5, 5, 1), np.uint8)), "JPEG"))
    middle = scan_of(data) + (len(data) - scan_of(data)) // 2
    data[middle : middle + 40] = b"\x00" * 40
    dataset = file_dataset(tmp_path, {"0.jpg": bytes(data), "1.jpg": encode(photo, "JPEG")})
    other = file_dataset(tmp_path, {"2.jpg": encode(photo[::-1], "JPEG"), "3.jpg": encode(255 - photo, "JPEG")})
    splits = Splits("some", dataset, other)
    assert decode(bytes(data), "flipped").shape == (3, 200, 300)
    assert inspect(splits).healthy
    strict = inspect(splits, strict=True)
    assert not strict.healthy
    assert list(strict.warnings) == ["0.jpg"]
    assert "Corrupt JPEG data" in strict.describe()


# A3: not an image, not a file


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "empty"), (b"<html><body>404</body></html>", "format"), (b"\xff\xd8\xff", "truncated")],
)
def test_empty_and_foreign_files_are_refused(data, code, refused):
    refused(data, code)


def test_directory_and_dangling_link_are_unreadable_by_name(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    dataset = FileDataset("some", ("a", "b"), tmp_path, ["folder.jpg", "link.jpg", "none.jpg"], np.array([0, 1, 0]))
    for index, name in enumerate(("folder.jpg", "link.jpg", "none.jpg")):
        with pytest.raises(BadImage, match=f"{re.escape(name)}: unreadable") as caught:
            dataset.read(index)
        assert caught.value.name == name


def test_file_without_permission_is_unreadable_by_name(tmp_path, photo, encode):
    dataset = file_dataset(tmp_path, {"mine.png": encode(photo)})
    (tmp_path / "mine.png").chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything; 65534 is nobody
        os.seteuid(65534)
    try:
        with pytest.raises(BadImage, match=r"mine\.png: unreadable: Permission denied"):
            dataset.read(0)
    finally:
        os.seteuid(user)


# A9: formats that are not on the list

FOREIGN = {
    "psd": b"8BPS\0\1" + b"\0" * 100,
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "fits": b"SIMPLE  =                    T" + b" " * 2850,
    "jpeg xl": b"\xff\x0a" + b"\0" * 100,
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf": b"%PDF-1.7\n",
    "film": b"\0\0\0\x20ftypisom" + b"\0" * 100,
    "icon": b"\0\0\1\0\1\0" + b"\0" * 100,
    "riff that is no webp": b"RIFF\0\0\0\0WAVEfmt ",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_format_that_is_not_supported_is_refused_without_parsing(kind, monkeypatch, refused):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a parser was invoked"))
    refused(FOREIGN[kind], "format")


def test_a_supported_format_is_parsed_by_its_own_parser_only(photo, encode, monkeypatch):
    seen = []
    real_open = Image.open
    monkeypatch.setattr(Image, "open", lambda file, formats: seen.append(formats) or real_open(file, formats=formats))
    decode(encode(photo, "PNG"), "photo.psd")
    assert seen == [("PNG",)]


# Everything else: random damage


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_random_damage_decodes_or_is_refused_but_never_raises_anything_else(photo, encode, kind):
    data = np.frombuffer(encode(photo, kind), dtype=np.uint8)
    random = np.random.default_rng(0)
    for _ in itertools.repeat(None, 150):
        damaged = data.copy()
        damaged[random.integers(0, len(data), random.integers(1, 8))] = random.integers(0, 256)
        try:
            decode(damaged.tobytes(), "damaged", max_pixels=1_000_000)
        except BadImage as error:
            assert error.name == "damaged"
