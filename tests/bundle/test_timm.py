"""timm's networks as ours: the same logits, at any resolution, and the same weights after a round trip."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatnet.bundle.timm.folders import write_timm_folder
from coatnet.bundle.timm.names import from_timm, to_timm
from coatnet.data.open import open_dataset
from coatnet.data.transforms import Preprocessing
from coatnet.model.network import CoAtNet, create_model
from coatnet.model.timm.blocks import LayerScale, LogOffsetBias
from coatnet.model.timm.config import TIMM_VARIANTS

SMALL = ("test_coatnet", "coatnet_nano_rw_224", "coatnext_nano_rw_224", "coatnet_nano_cc_224")
TOLERANCE = 1e-4  # of the largest logit
# Made for 96 pixels, where the largest takes 26 billion multiply-accumulates an image and not 142.
LARGE = {f"coatnet_{name}" for name in ("3_rw_224", "rmlp_2_rw_384", "rmlp_3_rw_224", "3_224", "4_224", "5_224")}


def theirs(name: str, **arguments: object) -> nn.Module:
    """timm's network with random weights, BatchNorm statistics and gains far from where they begin."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    for part_name, value in model.named_parameters():
        if part_name.endswith("gamma"):
            nn.init.normal_(value, std=0.5)
        elif value.ndim == 1:
            value.data += 0.2 * torch.randn_like(value)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    return model


def ours(name: str, model: nn.Module, **arguments: object) -> CoAtNet:
    with torch.device("meta"):
        network = create_model(name, **arguments)
    network.load_state_dict(from_timm(network, model.state_dict()), assign=True)
    return network.eval()


def difference(model: nn.Module, network: nn.Module, images: Tensor) -> float:
    """The largest difference of two logits, in units of the largest logit; and the same answers."""
    with torch.no_grad():
        expected, found = model(images), network(images)
    assert torch.equal(expected.argmax(1), found.argmax(1))
    return float((expected - found).abs().max() / expected.abs().max())


def test_all_coatnets_of_timm_are_listed() -> None:
    named = {name for name in timm.list_models() if name.startswith(("coatnet", "coatnext", "test_coatnet"))}
    assert named == TIMM_VARIANTS.keys()


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_give_the_logits_of_timm(name: str) -> None:
    model = theirs(name, num_classes=37)
    side = TIMM_VARIANTS[name].resolution
    assert difference(model, ours(name, model, num_classes=37), torch.randn(2, 3, side, side)) < TOLERANCE


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TIMM_VARIANTS)
def test_every_network_gives_the_logits_of_timm_on_64_images_and_converts_back(name: str, tmp_path, capsys) -> None:
    side = 96 if name in LARGE else TIMM_VARIANTS[name].resolution
    model = theirs(name, num_classes=1000, img_size=side)
    network, images = ours(name, model, resolution=side), real_images(side)
    largest = max(difference(model, network, batch) for batch in images.split(8))
    with capsys.disabled():
        print(f"  {name:26} at {side} pixels: {largest:.1e} of the largest logit apart, 64 of 64 top-1 agree")
    assert largest < TOLERANCE

    seen = Preprocessing(resolution=network.resolution)
    write_timm_folder(network, [str(index) for index in range(1000)], seen, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert difference(model, again, images[:2]) == 0.0


def real_images(side: int) -> Tensor:
    """64 real images, `(64, 3, side, side)`."""
    dataset = open_dataset("fashion-mnist-small").validation
    chosen = torch.stack([torch.from_numpy(dataset.read(index)[0]) for index in range(0, 1984, 31)])
    images = F.interpolate(chosen[:, None] / 127.5 - 1, size=(side, side), mode="bicubic")
    return images.expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("name", TIMM_VARIANTS)
def test_the_converted_state_has_the_names_and_shapes_of_timm(name: str) -> None:
    with torch.device("meta"):
        model, network = timm.create_model(name, num_classes=5), create_model(name, num_classes=5)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in to_timm(network).items()} == expected


@pytest.mark.parametrize("name", ["test_coatnet", "coatnet_rmlp_nano_rw_224"])
def test_converting_there_and_back_is_the_identity(name: str) -> None:
    state = theirs(name, num_classes=5).state_dict()
    with torch.device("meta"):
        network = create_model(name, num_classes=5)
    network.load_state_dict(from_timm(network, state), assign=True)
    back = to_timm(network)
    assert all(torch.equal(back[key], value) for key, value in state.items()) and back.keys() == state.keys()


@pytest.mark.parametrize("name", ["test_coatnet", "coatnet_rmlp_nano_rw_224"])
def test_another_resolution_goes_through(name: str) -> None:
    network = ours(name, theirs(name, num_classes=5), num_classes=5)
    with torch.no_grad():
        for height, width in ((64, 64), (96, 160), (97, 131)):
            assert network(torch.randn(1, 3, height, width)).shape == (1, 5)


def test_a_bias_of_log_coordinates_equals_that_of_timm_at_another_resolution() -> None:
    name = "coatnet_rmlp_nano_rw_224"
    model = theirs(name, num_classes=5)
    network = ours(name, model, num_classes=5)
    model.set_input_size((128, 192))
    assert difference(model, network, torch.randn(2, 3, 128, 192)) < TOLERANCE


def test_the_bias_of_log_coordinates_depends_only_on_the_offset() -> None:
    bias = LogOffsetBias(3, 16).eval()
    with torch.no_grad():
        matrix = bias((4, 5), torch.float32).unflatten(1, (4, 5)).unflatten(3, (4, 5))
        larger = bias((6, 7), torch.float32).unflatten(1, (6, 7)).unflatten(3, (6, 7))
    assert torch.allclose(matrix[:, 1:, 1:, 1:, 1:], matrix[:, :-1, :-1, :-1, :-1], atol=1e-6)
    assert torch.allclose(larger[:, :4, :5, :4, :5], matrix, atol=1e-6)


def test_the_cached_bias_of_log_coordinates_follows_the_weights() -> None:
    bias = LogOffsetBias(3, 16).eval()
    with torch.no_grad():
        before = bias((4, 4), torch.float32).clone()
        bias.output.bias += 1.0
        assert torch.allclose(bias((4, 4), torch.float32), before + 1.0, atol=1e-6)


@pytest.mark.parametrize("name", ["test_coatnet", "coatnet_rmlp_nano_rw_224", "coatnext_nano_rw_224"])
def test_a_network_of_timm_learns(name: str) -> None:
    torch.manual_seed(0)
    network = create_model(name, num_classes=3, resolution=64, stochastic_depth=0.1).train()
    network.set_grad_checkpointing()
    network(torch.randn(2, 3, 64, 64)).square().sum().backward()
    silent = [key for key, value in network.named_parameters() if value.grad is None]
    assert not silent
    undecayed = network.no_weight_decay()
    assert undecayed and all(".relative_bias." in key for key in undecayed)


def test_layer_scale_multiplies_channels() -> None:
    scale = LayerScale(3, 0.5)
    assert torch.equal(scale(torch.ones(2, 3, 4, 4)), torch.full((2, 3, 4, 4), 0.5))


def test_options_of_the_paper_are_refused_for_networks_of_timm() -> None:
    with pytest.raises(ValueError, match="without the option downsample"):
        create_model("test_coatnet", downsample="expand")
