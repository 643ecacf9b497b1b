"""Re-encoded and resized copies are found, others are not, and none of 100,000 is compared with all others."""

import io
import time

import numpy as np
import torch
from PIL import Image

from coatnet.data.inspection import inspect
from coatnet.data.near_duplicates import close_hashes, fingerprint, groups_of, near_pairs


def drawing(seed: int) -> Image.Image:
    """A smooth colored image, 96 x 64."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((96, 64), Image.Resampling.BICUBIC)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def as_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_copies_are_found_and_others_are_not() -> None:
    originals = [drawing(seed) for seed in range(30)]
    worse = Image.open(io.BytesIO(as_jpeg(originals[3], 40)))
    smaller = originals[4].resize((61, 40), Image.Resampling.LANCZOS)
    gray = originals[5].convert("L")  # the same shapes in no color are another image
    brighter = originals[6].point(lambda value: min(255, value + 3))
    images = [*originals, worse, smaller, gray, brighter]
    pairs = near_pairs([fingerprint(as_tensor(image)) for image in images])
    assert pairs.tolist() == [[3, 30], [4, 31], [6, 33]]


def test_flat_images_are_told_apart_by_their_color() -> None:
    flat = [torch.full((3, 20, 20), value, dtype=torch.uint8) for value in (10, 10, 200)]
    assert near_pairs([fingerprint(image) for image in flat]).tolist() == [[0, 1]]


def test_bands_find_what_comparing_all_pairs_finds() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 600, dtype=np.uint64)
    for row in range(300):  # each of these is up to 6 bits from another
        bits = generator.choice(64, row % 7, replace=False).astype(np.uint64)
        hashes[row] = hashes[row + 300] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    distance = np.bitwise_count(hashes[:, None] ^ hashes)
    expected = np.argwhere(np.triu(distance <= 4, 1))
    assert close_hashes(hashes).tolist() == expected.tolist() and len(expected) > 200


def test_a_hundred_thousand_images_are_not_compared_with_all_others() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[-1] = hashes[0] ^ np.uint64(0b1011)
    hashes[50_000:52_000] = 7  # as many white pages
    started = time.process_time()
    pairs = close_hashes(hashes)
    assert [0, 99_999] in pairs.tolist()
    assert time.process_time() - started < 20  # 2 here; all pairs would be 5 billion


def test_groups_join_what_is_paired_with_the_same() -> None:
    pairs = np.array([[0, 3], [3, 5], [1, 2], [5, 6]])
    assert groups_of(7, pairs).tolist() == [0, 1, 1, 0, 4, 0, 0]


def test_doctor_names_near_copies_across_the_split_and_under_other_labels(tmp_path) -> None:
    for seed, name in enumerate(("train/a/0", "train/a/1", "train/b/0", "train/b/1", "val/a/0", "val/b/0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        drawing(seed).save(tmp_path / f"{name}.png")
    (tmp_path / "val/b/copy.jpg").write_bytes(as_jpeg(drawing(2), 80))
    (tmp_path / "train/b/other.jpg").write_bytes(as_jpeg(drawing(0), 80))
    found = inspect(tmp_path)
    assert found.near_leaks == (("train/b/0.png", "val/b/copy.jpg"),)
    assert found.near_contradictions == (("train/a/0.png", "train/b/other.jpg"),)
    assert found.healthy and not found.leaks
    assert "1 image of validation nearly the same as one of training\n  train/b/0.png = val/b/copy" in found.describe()
    assert [found.name(place) for place in found.left_out] == ["train/b/0.png"]
