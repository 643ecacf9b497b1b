"""Images that are nearly the same: re-encoded, resized or retouched copies, found by perceptual hashes.

A hash has 64 bits: where the gray image, 8 x 9, grows brighter from left to right (dHash). Pairs whose hashes differ in
at most 4 bits agree in one of 5 bands of bits, so only images of one band are compared; small colored versions of the
images then decide.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from coatnet.data.channels import to_shown
from coatnet.data.datasets import Dataset
from coatnet.data.decode import BadImage
from coatnet.data.loader import to_image
from coatnet.data.splits import SplitRule, Splits, divide
from coatnet.data.transforms import Image, as_images
from coatnet.system.hardware import num_cores
from coatnet.system.progress import track

MAX_DISTANCE = 4  # bits of 64
# chosen: of identical hashes by the thousand, such as of white pages, each is compared with so many that follow it
MAX_COMPARED = 200
MAX_SEARCHED = 20_000  # chosen: images that are decoded before the first step, some 70 seconds for photographs
THUMBNAIL_SIDE = 16
# chosen: root mean square of the difference, in parts of the image's own contrast and in levels of 255
RELATIVE_DIFFERENCE, LEVELS = 0.1, 1.0
_SIDE = 32
_MIN_STEP = 2.0  # levels of 255, chosen: less is noise of a codec on an even background
_READ_SIDE = 256  # of larger images every n-th pixel is read


class Fingerprint(NamedTuple):
    """What is kept of an image: its hash, and a colored version of uint8 (3, 16, 16), or of all channels."""

    hash: int
    thumbnail: NDArray[np.uint8]


def pixel_digest(image: Image) -> bytes:
    """A digest that two images share if their pixels and shapes are equal: tensor (C, H, W) or array of uint8."""
    pixels = image.numpy() if isinstance(image, Tensor) else image
    return hashlib.blake2b(pixels.tobytes(), digest_size=16, key=str(pixels.shape).encode()).digest()


def fingerprint(pixels: Tensor) -> Fingerprint:
    """The fingerprint of an image (C, H, W), of uint8 or of levels."""
    return fingerprints(pixels[None])[0]


def fingerprints(pixels: Tensor) -> list[Fingerprint]:
    """The fingerprints of images of one size (B, C, H, W), of uint8 or of levels."""
    pixels = to_shown(pixels)
    step = max(1, min(pixels.shape[2:]) // _READ_SIDE)
    small = F.interpolate(pixels[:, :, ::step, ::step].float(), size=(_SIDE, _SIDE), mode="bilinear", antialias=True)
    rows = F.adaptive_avg_pool2d(small.mean(dim=1), (8, 9))  # (B, 8, 9)
    bits = np.packbits((rows[..., 1:] - rows[..., :-1] > _MIN_STEP).flatten(1).numpy(), axis=1)
    thumbnails = F.avg_pool2d(small, _SIDE // THUMBNAIL_SIDE).round().clamp(0, 255).byte()
    thumbnails = thumbnails.expand(-1, 3, -1, -1) if thumbnails.shape[1] == 1 else thumbnails
    hashes = (int.from_bytes(row.tobytes(), "big") for row in bits)
    return [Fingerprint(*each) for each in zip(hashes, thumbnails.numpy(), strict=True)]


def near_pairs(fingerprints: list[Fingerprint], *, between: int = 0) -> NDArray[np.int64]:
    """Find the pairs of images that are nearly the same: places (P, 2), the earlier first, in order.

    Args:
        between: only pairs of one of the first so many images and a later one; 0 for all pairs.
    """
    if len(fingerprints) < 2:
        return np.empty((0, 2), np.int64)
    pairs = close_hashes(np.array([each.hash for each in fingerprints], dtype=np.uint64))
    if between:
        pairs = pairs[(pairs[:, 0] < between) & (pairs[:, 1] >= between)]
    thumbnails = np.stack([each.thumbnail.ravel() for each in fingerprints])  # (N, 768)
    contrast = thumbnails.std(axis=1)
    same = [np.empty(0, bool)]
    for part in np.array_split(pairs, -(-len(pairs) // 10_000) or 1):
        one, other = (thumbnails[part[:, side]].astype(np.float32) for side in (0, 1))
        difference = np.sqrt(np.square(one - other).mean(axis=1))
        same.append(difference <= RELATIVE_DIFFERENCE * contrast[part].min(axis=1) + LEVELS)
    return pairs[np.concatenate(same)]


def close_hashes(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Pairs of hashes (N,) that differ in at most `MAX_DISTANCE` bits: places (P, 2), the earlier first, in order."""
    found, number = [np.empty(0, np.int64)], len(hashes)
    for bits in np.array_split(np.arange(64, dtype=np.uint64), MAX_DISTANCE + 1):
        keys = hashes & np.bitwise_or.reduce(np.uint64(1) << bits)
        order = np.lexsort((hashes, keys))
        sorted_keys, sorted_hashes = keys[order], hashes[order]
        left = np.arange(number)
        for shift in range(1, min(number, MAX_COMPARED + 1)):
            left = left[: np.searchsorted(left, number - shift)]
            left = left[sorted_keys[left] == sorted_keys[left + shift]]
            if not len(left):
                break
            distance = np.bitwise_count(sorted_hashes[left] ^ sorted_hashes[left + shift])
            close = left[distance <= MAX_DISTANCE]
            one, other = order[close], order[close + shift]
            found.append(np.minimum(one, other) * number + np.maximum(one, other))
    return np.stack(np.divmod(np.unique(np.concatenate(found)), number), axis=1)


def keep_copies_together(
    splits: Splits, rule: SplitRule, say: Callable[[str], None]
) -> tuple[Splits, tuple[tuple[str, ...], ...]]:
    """Images divided as a rule says, copies and near copies on one side, and the groups of those: see `find_copies`."""
    groups = find_copies(splits, rule, say)
    return divide(splits, replace(rule, kept_together=groups)), groups


def find_copies(splits: Splits, rule: SplitRule, say: Callable[[str], None]) -> tuple[tuple[str, ...], ...]:
    """Groups of names of copies and near copies that a division by a rule would part.

    Images in memory, and those that have a split of their own, are not searched.

    Args:
        splits: divided by the rule's `validation_fraction` alone.
        say: what a line is for that says that there are too many images to search.
    """
    groups: tuple[tuple[str, ...], ...] = ()
    num_images = len(splits.training) + len(splits.validation)
    if splits.by_name and not splits.training.in_memory:
        if num_images <= MAX_SEARCHED:
            every = groups_to_keep_together(splits)
            if rule.fold or rule.test_fraction:
                groups = every
            else:  # only those that the split would part; keeping one together may part another
                divided = splits
                while parted := _parted(every, divided) - set(groups):
                    groups = tuple(group for group in every if group in parted or group in groups)
                    divided = divide(splits, replace(rule, kept_together=groups, training_images=0))
        else:
            say(f"copies are not looked for among {num_images:,} images; `coatnet doctor` does")
    return groups


def _parted(groups: Sequence[tuple[str, ...]], splits: Splits) -> set[tuple[str, ...]]:
    """The groups with images on both sides."""
    sides = [{part.describe(index) for index in range(len(part))} for part in (splits.training, splits.validation)]
    return {group for group in groups if not any(side.isdisjoint(group) for side in sides)}


def groups_to_keep_together(splits: Splits) -> tuple[tuple[str, ...], ...]:
    """Groups of names of images that are copies or near copies of each other and have one label, in order.

    Images that cannot be read are in none. A class that would be one group alone is left as it is.
    """
    places, digests, fingerprints = [], [], []
    for part in (splits.training, splits.validation):
        threads = ThreadPoolExecutor(num_cores() if part.thread_safe else 1, "decoding")
        try:
            identities = threads.map(functools.partial(_identify, part), range(len(part)))
            for index, identity in enumerate(track(identities, "looking for copies", len(part))):
                if identity is not None:
                    places.append((part, index))
                    digests.append(identity[0])
                    fingerprints.append(identity[1])
        finally:
            threads.shutdown(cancel_futures=True)
    if len(places) < 2:
        return ()
    first: dict[bytes, int] = {}
    same = [(first.setdefault(digest, row), row) for row, digest in enumerate(digests)]
    pairs = np.concatenate([np.array(same), near_pairs(fingerprints)])
    labels = np.array([part.label(index) for part, index in places]).reshape(len(places), -1)
    pairs = pairs[(labels[pairs[:, 0]] == labels[pairs[:, 1]]).all(axis=1) & (pairs[:, 0] != pairs[:, 1])]
    groups = groups_of(len(places), pairs)
    found = []
    for head in np.unique(groups[pairs[:, 0]]).tolist():
        members = np.flatnonzero(groups == head)
        whole_class = ((labels == labels[head]).all(axis=1) <= (groups == head)).all()
        if not whole_class:
            found.append(tuple(places[row][0].describe(places[row][1]) for row in members.tolist()))
    return tuple(found)


def _identify(dataset: Dataset, index: int) -> tuple[bytes, Fingerprint] | None:
    """Digest and fingerprint of an image; None if it cannot be read."""
    try:
        pixels = as_images(to_image(dataset, index, dataset.read(index)[0]))
    except BadImage:
        return None
    return pixel_digest(pixels), fingerprint(pixels)


def groups_of(num_images: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The group of each image, (N,), named by its first image: pairs are in one group, and what is paired with them."""
    groups = np.arange(num_images)
    while len(pairs):
        lowest = groups.copy()
        np.minimum.at(lowest, pairs[:, 0], groups[pairs[:, 1]])
        np.minimum.at(lowest, pairs[:, 1], groups[pairs[:, 0]])
        lowest = lowest[lowest]
        if (lowest == groups).all():
            break
        groups = lowest
    return groups
