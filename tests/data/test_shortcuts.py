"""Classes that size, brightness or color give away are told, and others are not."""

import numpy as np
import torch

from coatnet.data.inspection import inspect
from coatnet.data.shortcuts import find_shortcuts, properties_of


def test_properties_are_those_of_the_image() -> None:
    image = torch.tensor([200, 100, 0], dtype=torch.uint8)[:, None, None].expand(3, 10, 40)
    height, width, ratio, brightness, contrast, red, blue = properties_of(image).tolist()
    assert (height, width, ratio, contrast) == (10, 40, 4, 0)
    np.testing.assert_allclose([brightness, red, blue], [100, 2 / 3, 0], atol=1e-3)


def test_an_interval_of_one_property_is_found_and_chance_is_not() -> None:
    generator = np.random.default_rng(0)
    properties = generator.normal(size=(300, 7)).astype(np.float32)
    labels = np.arange(300) % 3
    assert find_shortcuts(properties, labels, "abc") == []
    properties[labels == 1, 3] = generator.uniform(-0.01, 0.01, 100)  # in the middle of the others
    (found,) = find_shortcuts(properties, labels, "abc")
    assert (found.name, found.property) == ("b", "brightness") and found.accuracy > 0.97


def test_doctor_tells_that_one_class_has_a_size_of_its_own(make_folder, encode) -> None:
    root = make_folder({"a": 30, "b": 30})
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        (root / "b" / f"{number}.png").write_bytes(encode(pixels))
    found = inspect(root)
    assert {(each.name, each.property) for each in found.shortcuts} == {("a", "height"), ("b", "height")}
    assert "b is told from all others by its height alone (100 % balanced accuracy)" in found.describe()
