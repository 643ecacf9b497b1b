"""What exports contain computes what the bundle computes."""

import pytest
import torch

from coatnet.bundle import Bundle
from coatnet.data.transforms import EvaluationTransform, Preprocessing, normalize
from coatnet.export.classifier import Classifier, bare_network
from coatnet.model.network import create_model

NETWORKS = {
    "paper": ("coatnet-femto-64", {}),
    "post": ("coatnet-femto-64", {"attention": "post"}),
    "mbconv-layer": ("coatnet-femto-64", {"mbconv_norm": "layer"}),
    "timm": ("test_coatnet", {}),
}


def bundle_of(name: str, multilabel: bool = False) -> Bundle:
    torch.manual_seed(0)
    variant, variations = NETWORKS[name]
    model = create_model(variant, num_classes=5, resolution=64, **variations)
    for parameter in model.parameters():
        if parameter.ndim == 3:  # relative biases that matter
            torch.nn.init.normal_(parameter)
    model.train()(torch.randn(4, 3, 64, 64))
    return Bundle(model.eval(), tuple("abcde"), Preprocessing(resolution=64), multilabel)


def noise(height: int, width: int) -> torch.Tensor:
    """uint8 (2, H, W, 3)."""
    return torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)


@pytest.mark.parametrize("multilabel", [False, True])
@torch.no_grad()
def test_images_become_the_probabilities_of_the_bundle(multilabel: bool) -> None:
    bundle, images = bundle_of("paper", multilabel), noise(90, 120)
    logits = bundle.model(EvaluationTransform(bundle.preprocessing).batch(images.permute(0, 3, 1, 2)))
    expected = logits.sigmoid() if multilabel else logits.softmax(1)
    torch.testing.assert_close(Classifier(bundle)(images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (65, 130)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_at_its_own_size_an_image_is_what_the_model_makes_of_it(name: str, size: tuple[int, int]) -> None:
    bundle, pixels = bundle_of(name), noise(*size)
    images = normalize(pixels.permute(0, 3, 1, 2), bundle.preprocessing)
    logits = bundle.model(images)
    torch.testing.assert_close(bare_network(bundle, any_size=True)(images), logits, rtol=1e-3, atol=1e-4)
    probabilities = Classifier(bundle, any_size=True)(pixels)
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=1e-3, atol=1e-4)
