"""A trained network for images of other channels."""

import numpy as np
import pytest
import torch

from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.model.network import CoAtNet, create_model
from coatnet.model.resize import change_channels, first_convolution


def trained(variant: str, channels: int) -> CoAtNet:
    torch.manual_seed(0)
    return create_model(variant, num_classes=5, in_channels=channels, resolution=32).eval()


def changed(model: CoAtNet, channels: int, rgb: tuple[int, int, int] | None = None) -> CoAtNet:
    other = trained(model.variant.name, channels)
    first = first_convolution(model)
    weights = model.state_dict()
    other.load_state_dict(weights | {first: change_channels(weights[first], channels, rgb)})
    return other


@pytest.mark.parametrize("variant", ["coatnet-femto-64", "test_coatnet"])
@pytest.mark.parametrize(("before", "after"), [(3, 1), (3, 12), (1, 3), (4, 2)])
@torch.no_grad()
def test_a_gray_image_repeated_in_every_channel_gives_the_same_logits(variant: str, before: int, after: int) -> None:
    model, gray = trained(variant, before), torch.randn(2, 1, 32, 32)
    found = changed(model, after)(gray.repeat(1, after, 1, 1))
    torch.testing.assert_close(found, model(gray.repeat(1, before, 1, 1)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_channels_called_red_green_and_blue_keep_their_weights_and_the_others_say_nothing_yet() -> None:
    names = ("coastal", "Blue", "green", "RED", "nir")
    seen = Preprocessing(mean=(0.5,) * 5, std=(0.5,) * 5, value_range=(0, 1), channel_names=names)
    assert seen.rgb == (3, 2, 1)
    model, image = trained("coatnet-femto-64", 3), torch.randn(2, 5, 32, 32)
    torch.testing.assert_close(changed(model, 5, seen.rgb)(image), model(image[:, [3, 2, 1]]), rtol=1e-4, atol=1e-5)


def test_the_names_of_channels_are_kept_in_a_bundle(tmp_path: object) -> None:
    from coatnet.bundle import load

    seen = Preprocessing(
        resolution=(32, 48), mean=(0.5,) * 2, std=(0.5,) * 2, value_range=(-3, 8.5), channel_names=("vv", "vh")
    )
    bundle = Bundle(trained("coatnet-femto-64", 2), tuple("abcde"), seen)
    assert load(bundle.save(f"{tmp_path}/bundle")).preprocessing == seen
    assert "2 channels" in repr(bundle) and np.isclose(seen.value_range[0], -3)
