"""Resizing inside a graph gives the pixels that the bundle was measured on."""

import pytest
import torch

from coatnet.data.builtin import open_fashion_mnist_small
from coatnet.data.transforms import Preprocessing, match_channels, resize_and_crop
from coatnet.export.classifier import Fit

SIZES = ((28, 28), (375, 500), (500, 333), (40, 300), (224, 224), (1, 90), (101, 77), (33, 32))


def images_of(height: int, width: int) -> torch.Tensor:
    """uint8 (2, 3, H, W): noise, which shows every difference, and an image that is enlarged or made smaller."""
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    clothes = torch.from_numpy(open_fashion_mnist_small().validation.images[400]).expand(1, 3, -1, -1)
    return torch.cat([noise, torch.nn.functional.interpolate(clothes, size=(height, width), mode="nearest")])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "seen",
    [
        Preprocessing(224),
        Preprocessing(32, crop_fraction=1.0),
        Preprocessing(64, "squash", 0.9, "bilinear"),
        Preprocessing(97, "center", 0.95, "bilinear"),
        Preprocessing(32, mean=(0.5,), std=(0.5,)),
    ],
    ids=lambda seen: f"{seen.resolution}-{seen.crop}-{seen.interpolation}-{seen.channels}",
)
def test_pixels_are_those_of_the_preprocessing(seen: Preprocessing, size: tuple[int, int]) -> None:
    images = images_of(*size)
    expected = resize_and_crop(match_channels(images, seen), seen).int()
    found = Fit(seen)(images.permute(0, 2, 3, 1))
    assert found.dtype == torch.uint8
    apart = (found.permute(0, 3, 1, 2).int() - expected).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 2e-3  # sums that end on a half
