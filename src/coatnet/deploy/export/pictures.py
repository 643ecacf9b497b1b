"""Real pictures to check an export with: the user's own, or some that come with the package.

Shapes: H W any size, R resolution, C channels.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.data.batches import read_picture
from coatnet.data.datasets import Dataset
from coatnet.data.decoding import BadImage
from coatnet.data.sources import open_dataset
from coatnet.data.transforms import Preprocessing, as_pictures, center, resize
from coatnet.errors import UserError

CHECKED = 64  # pictures
BATCH_SIZES = (1, 2, 5)


def check_pictures(bundle: Bundle, data: str | None) -> tuple[str, list[Tensor]]:
    """The name of the data, and pictures uint8 (3, H, W) spread evenly over its validation split.

    Without data they are the clothes that come with the package, or its digits where the classes are digits.

    Raises:
        UserError: there is no such data, or none of the pictures looked at can be read.
    """
    if data is None:
        data = "digits" if set(bundle.classes) == set(map(str, range(10))) else "fashion-mnist-small"
    dataset = open_dataset(data).validation
    pictures = [picture for picture, _ in spread_pictures(dataset, CHECKED)]
    if not pictures:
        raise UserError(f"{data}: none of its validation pictures can be read; give other --data to check with")
    return data, pictures


def spread_pictures(dataset: Dataset, most: int) -> Iterator[tuple[Tensor, int]]:
    """At most that many pictures of a dataset, spread evenly, uint8 (3, H, W), and their indices; bad ones left out."""
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(np.int64)).tolist():
        try:
            picture, _ = read_picture(dataset, index)
        except BadImage:
            continue
        yield as_pictures(picture).expand(3, -1, -1), index


def check_batches(pictures: list[Tensor]) -> Iterator[Tensor]:
    """The pictures, uint8 (B, 3, H, W), in batches of 1, 2 and 5 in turn, each cut to the smallest sides in it."""
    first, turn = 0, 0
    while first < len(pictures):
        part = pictures[first : first + BATCH_SIZES[turn % len(BATCH_SIZES)]]
        height, width = (min(picture.shape[axis] for picture in part) for axis in (1, 2))
        yield torch.stack([center(picture, height, width) for picture in part])
        first, turn = first + len(part), turn + 1


def at_several_sizes(batches: Iterator[Tensor], preprocessing: Preprocessing) -> Iterator[Tensor]:
    """The same, resized to the model's resolution, and from the fourth batch on by turns to one that is not square."""
    side = preprocessing.resolution
    sizes = ((side, side), (side * 5 // 4, side * 3 // 2))
    for number, batch in enumerate(batches):
        yield resize(batch, sizes[number // len(BATCH_SIZES) % 2], preprocessing.interpolation)
