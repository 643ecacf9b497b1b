"""A small model on disk, and images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.inference.predictor import Predictor
from coatnet.model.network import create_model

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-64", num_classes=4, resolution=32).eval()
    torch.nn.init.normal_(model.get_classifier().weight, std=0.3)
    return Bundle(model, CLASSES, Preprocessing(resolution=32)).save(tmp_path_factory.mktemp("batch") / "bundle")


@pytest.fixture(scope="session")
def predictor(bundle: Path) -> Predictor:
    return Predictor(bundle, "torch", "fp32")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 of them, in two folders and beside them; one is cut off and one is none."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(150):
        path = root / ("", "bee", "cat")[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        size = generator.integers(20, 60, 2)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    cut = root / "bee" / "70.png"
    cut.write_bytes(cut.read_bytes()[:200])
    (root / "cat" / "page.jpg").write_text("<html>")
    return root
