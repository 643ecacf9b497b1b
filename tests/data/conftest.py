"""Small images in any format, and folders of them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.data.datasets import FileDataset
from coatnet.data.decode import BadImage, decode


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A smooth colored image (40, 60, 3), different in every corner, so that JPEG hardly changes it."""
    down, right = np.mgrid[0:1:40j, 0:1:60j]
    return np.stack([255 * down, 255 * right, 255 * (1 - down) * right], axis=-1).astype(np.uint8)


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """`encode(array or image, "PNG", **options of Pillow's save)`."""

    def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
        image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def make_folder(tmp_path: Path, encode: Callable[..., bytes]) -> Callable[[dict[str, int]], Path]:
    """`make_folder({"cat": 3, "train/dog": 2})` writes so many little images, all different."""

    def make_folder(counts: dict[str, int]) -> Path:
        root = tmp_path / "images"
        for number, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = np.random.default_rng((number, index)).integers(0, 256, (12, 16, 3), dtype=np.uint8)
                (root / name / f"{index}.png").write_bytes(encode(pixels))
        return root

    return make_folder


@pytest.fixture(scope="session")
def distance() -> Callable[[torch.Tensor, np.ndarray], float]:
    """`distance(pixels, expected)` is the mean difference of decoded pixels from an array (H, W, 3)."""

    def distance(pixels: torch.Tensor, expected: np.ndarray) -> float:
        assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape[0] == 3
        array = pixels.permute(1, 2, 0).numpy()
        assert array.shape == expected.shape
        return float(np.abs(array.astype(float) - expected).mean())

    return distance


@pytest.fixture(scope="session")
def refused() -> Callable[..., BadImage]:
    """`refused(data, code)` gives the one-line error of data that must not decode."""

    def refused(data: bytes, code: str, **limits: int) -> BadImage:
        with pytest.raises(BadImage) as caught:
            decode(data, "some/image.jpg", **limits)
        assert caught.value.code == code, caught.value.reason
        assert caught.value.name == "some/image.jpg"
        assert str(caught.value) == f"some/image.jpg: {caught.value.reason}"
        assert "\n" not in str(caught.value)
        return caught.value

    return refused


@pytest.fixture
def files(make_folder) -> FileDataset:
    """24 readable images of 12 x 16 in 2 classes."""
    root = make_folder({"a": 16, "b": 8})
    paths = [f"a/{index}.png" for index in range(16)] + [f"b/{index}.png" for index in range(8)]
    return FileDataset("some", ("a", "b"), root, paths, np.array([0] * 16 + [1] * 8))
