"""Heat maps: equal to other implementations, of the weights, and where the object is."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.inference.explanation import heat_maps, layercam
from coatnet.model.attention import MultiHeadProjection
from coatnet.model.network import create_model

torchcam = pytest.importorskip("torchcam.methods")


def make_bundle(model: str = "coatnet-femto-64", channels: int = 3, resolution: int = 30, **changes: object) -> Bundle:
    torch.manual_seed(0)
    network = create_model(model, num_classes=3, in_channels=channels, resolution=resolution, **changes)
    torch.nn.init.normal_(network.get_classifier().weight)
    preprocessing = Preprocessing(resolution=resolution, mean=(0.5,) * channels, std=(0.5,) * channels)
    return Bundle(network.eval(), ("ant", "bee", "cat"), preprocessing)


def images_for(bundle: Bundle, number: int = 2) -> Tensor:
    side, generator = bundle.preprocessing.resolution, torch.Generator().manual_seed(1)
    return torch.randn(number, bundle.preprocessing.channels, side, side, generator=generator)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_layercam_is_that_of_torchcam_at_every_stage(stage: int) -> None:
    bundle = make_bundle()
    images = images_for(bundle)
    targets = bundle.model(images).argmax(1)
    layer = bundle.model.stages[stage - 1] if stage else bundle.model.stem
    with torchcam.LayerCAM(bundle.model, layer) as extractor:
        scores = bundle.model(images.clone().requires_grad_())
        (cells,) = extractor(targets.tolist(), scores, normalized=False)
    stride = (1, 2, 4, 4)[stage]
    reference = F.interpolate(cells[:, None], scale_factor=stride, mode="bilinear")[:, 0, :30, :30]
    reference = reference / reference.amax((1, 2), keepdim=True)
    found = layercam(bundle, images, targets, stage)
    assert reference.std() > 0.05
    torch.testing.assert_close(found, reference.detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(layercam(bundle, images, targets, stage - 4), found)


def test_the_most_probable_class_is_explained_unless_another_is_named() -> None:
    bundle = make_bundle()
    images = images_for(bundle)
    best = bundle.model(images).argmax(1)
    for method in ("layercam", "occlusion"):
        assert torch.equal(heat_maps(bundle, images, method=method), heat_maps(bundle, images, best, method=method))
        other = heat_maps(bundle, images, (best + 1) % 3, method=method)
        assert (other - heat_maps(bundle, images, best, method=method)).abs().max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "post"},
        {"attention": "local", "window": 3},
        {"relative_bias": False},
        {"attention": "linear", "relative_bias": False},
    ],
)
def test_weights_of_every_attention_are_those_it_computes_with(changes: dict[str, object]) -> None:
    network = make_bundle(**changes).model
    layer = next(module for module in network.modules() if isinstance(module, MultiHeadProjection))
    for table in (value for name, value in layer.named_parameters() if name == "relative_bias.table"):
        torch.nn.init.normal_(table)
    x = torch.randn(2, layer.qkv.in_channels, 7, 5)
    with torch.no_grad():
        merged = layer.merge(layer.weights(x) @ layer.split(x)[2], (7, 5))
        torch.testing.assert_close(merged, layer(x), atol=1e-5, rtol=1e-4)
