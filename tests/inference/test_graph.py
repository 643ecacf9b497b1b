"""Folding: the outputs of the network do not change, and its BatchNorms are gone."""

import pytest
import torch
from torch import nn

from coatnet.inference.graph import ConstantBias, fold
from coatnet.model.network import CoAtNet, create_model
from coatnet.model.relative_bias import GlobalRelativeBias

# Every kind of block: ours with both places of the stride and LayerNorm; timm's with early and late gates, a pool in
# front of the expansion, BatchNorm in front of attention, ConvNeXt blocks and relative biases made by a network.
NETWORKS = [
    ("coatnet-femto", {}),
    ("coatnet-femto", {"downsample": "depthwise", "attention": "post"}),
    ("coatnet-femto", {"mbconv_norm": "layer"}),
    ("coatnet-femto-64", {"attention": "local"}),
    ("coatnet_nano_rw_224", {}),
    ("coatnet_pico_rw_224", {}),
    ("coatnet_bn_0_rw_224", {}),
    ("coatnet_nano_cc_224", {}),
    ("coatnet_0_224", {}),
    ("coatnext_nano_rw_224", {}),
    ("coatnet_rmlp_nano_rw_224", {}),
]


def used(name: str, **variations: object) -> CoAtNet:
    """A network whose norms and biases are none that folding could forget without being seen."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, resolution=64, **variations)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.2)
        if isinstance(module, GlobalRelativeBias):
            for parameter in module.parameters():
                nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize(("name", "variations"), NETWORKS, ids=[f"{name} {more}" for name, more in NETWORKS])
@torch.no_grad()
def test_folded_equals_unfolded(name: str, variations: dict[str, object]) -> None:
    model, images = used(name, **variations), torch.randn(2, 3, 64, 64)
    expected, found = model(images), fold(model)(images)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["coatnet-femto", "coatnet_0_224"])
def test_folding_leaves_no_batch_norm_and_no_bias_table(name: str) -> None:
    left = {type(module) for module in fold(used(name)).modules()}
    assert nn.BatchNorm2d not in left and ConstantBias in left
    assert not any(issubclass(kind, GlobalRelativeBias) for kind in left)


@torch.no_grad()
def test_biases_are_computed_for_the_size_of_the_images() -> None:
    """A model and its preprocessing may have different resolutions: the tables are resampled, as in the network."""
    model, images = used("coatnet-femto"), torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(fold(model, resolution=96)(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_batch_norm_between_activation_and_gate_stays() -> None:
    left = [
        name for name, module in fold(used("coatnet_bn_0_rw_224")).named_modules() if "BatchNorm" in repr(module)[:9]
    ]
    assert {name.rpartition(".")[2] for name in left} == {"norm", "depthwise_norm"}
    assert {name.split(".")[1] for name in left} == {
        "0",
        "1",
    }  # in front of an activation, behind a gate: in MBConv only


@torch.no_grad()
def test_bias_tables_stay_when_any_size_is_accepted() -> None:
    model, images = used("coatnet-femto"), torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(fold(model, any_size=True)(images), model(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        fold(model)(images)


def test_folding_does_not_change_the_model() -> None:
    model = used("coatnet-femto").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold(model)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
