"""Real images to check an export with: the user's own, or some that come with the package.

Shapes: H W any size, R resolution, C channels.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.decode import BadImage
from coatnet.data.loader import read_image
from coatnet.data.open import open_dataset
from coatnet.data.transforms import Preprocessing, as_images, center, resize
from coatnet.errors import UserError

CHECKED = 64  # images
BATCH_SIZES = (1, 2, 5)


def check_images(bundle: Bundle, data: str | None) -> tuple[str, list[Tensor]]:
    """The name of the data, and images uint8 (3, H, W) spread evenly over its validation split.

    Without data they are the clothes that come with the package, or its digits where the classes are digits.

    Raises:
        UserError: there is no such data, or none of the images looked at can be read.
    """
    if data is None:
        data = "digits" if set(bundle.classes) == set(map(str, range(10))) else "fashion-mnist-small"
    dataset = open_dataset(data).validation
    images = [image for image, _ in spread_images(dataset, CHECKED)]
    if not images:
        raise UserError(f"{data}: none of its validation images can be read; give other --data to check with")
    return data, images


def spread_images(dataset: Dataset, most: int) -> Iterator[tuple[Tensor, int]]:
    """At most that many images of a dataset, spread evenly, uint8 (3, H, W), and their indices; bad ones left out."""
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(np.int64)).tolist():
        try:
            image, _ = read_image(dataset, index)
        except BadImage:
            continue
        yield as_images(image).expand(3, -1, -1), index


def check_batches(images: list[Tensor]) -> Iterator[Tensor]:
    """The images, uint8 (B, 3, H, W), in batches of 1, 2 and 5 in turn, each cut to the smallest sides in it."""
    first, turn = 0, 0
    while first < len(images):
        part = images[first : first + BATCH_SIZES[turn % len(BATCH_SIZES)]]
        height, width = (min(image.shape[axis] for image in part) for axis in (1, 2))
        yield torch.stack([center(image, height, width) for image in part])
        first, turn = first + len(part), turn + 1


def at_several_sizes(batches: Iterator[Tensor], preprocessing: Preprocessing) -> Iterator[Tensor]:
    """The same, resized to the model's resolution, and from the fourth batch on by turns to one that is not square."""
    side = preprocessing.resolution
    sizes = ((side, side), (side * 5 // 4, side * 3 // 2))
    for number, batch in enumerate(batches):
        yield resize(batch, sizes[number // len(BATCH_SIZES) % 2], preprocessing.interpolation)
