"""Tars as another program writes them, with small images of three classes."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w", kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode, format=kind) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    """The members of so many samples, of the classes 0, 1 and 2 in turn."""
    members = []
    for number in range(first, first + count):
        members += [(f"{number:05d}.png", image(number)), (f"{number:05d}.cls", str(number % 3).encode())]
    return members
