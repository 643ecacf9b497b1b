"""A finished model that has learned something, in seconds, and real images."""

from pathlib import Path

import pytest
import torch

from coatnet.bundle import Bundle, load
from coatnet.data.builtin import open_fashion_mnist_small
from coatnet.data.transforms import Preprocessing
from coatnet.model.network import create_model


@pytest.fixture(scope="session")
def clothes(clothes_bundle: Path) -> Bundle:
    return load(clothes_bundle)


@pytest.fixture(scope="session")
def colorful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of color images, several labels each; its weights and statistics are such that all logits differ."""
    torch.manual_seed(0)
    model = create_model("coatnet-femto-64", num_classes=3, resolution=64)
    torch.nn.init.normal_(model.get_classifier().weight)
    model.train()(torch.randn(8, 3, 64, 64))
    seen = Preprocessing(resolution=64, interpolation="bilinear", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return Bundle(model.eval(), ("é", "<b>", "c"), seen, multilabel=True).save(
        tmp_path_factory.mktemp("colorful") / "bundle"
    )


@pytest.fixture(scope="session")
def images() -> dict[str, torch.Tensor]:
    """uint8 (B, 3, H, W): clothes as they are, and enlarged and cut to shapes of photographs."""
    clothes = torch.from_numpy(open_fashion_mnist_small().validation.images[::40])[:, None].expand(-1, 3, -1, -1)
    large = torch.nn.functional.interpolate(clothes[:2], size=(300, 400), mode="bicubic", antialias=True)
    return {"one": clothes[:1], "two": large, "five": clothes[5:10], "tall": large.mT.contiguous()[:1]}
