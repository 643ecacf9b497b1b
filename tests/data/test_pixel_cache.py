"""Images kept decoded: the same batches as without, shared, bounded, and nothing left behind."""

import math
import os
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.data import pixel_cache
from coatnet.data.datasets import ArrayDataset, Dataset, FileDataset
from coatnet.data.decode import BadImage
from coatnet.data.loader import BadImages, evaluation_batches, training_batches
from coatnet.data.pixel_cache import Reduction, attach, fingerprint, keep_images
from coatnet.data.transforms import Augmentation, Preprocessing
from coatnet.errors import UserError
from coatnet.system import hardware

COLOR = Preprocessing(resolution=16, crop_fraction=0.8)
GRAY = Preprocessing(resolution=16, mean=(0.5,), std=(0.5,), interpolation="bilinear")
SQUASH = Preprocessing(resolution=16, crop="squash")
CROP = Augmentation("crop", crop_scale=(0.25, 1.0))
# Height and width: smaller than what is kept, larger, and far longer than high.
SIZES = [(12, 30), (90, 64), (33, 33), (20, 200), (21, 20), (16, 19), (300, 41), (64, 64)]


@pytest.fixture
def varied(tmp_path):
    """Eight images of different sizes, and one that cannot be read, in 2 classes."""
    (tmp_path / "varied").mkdir()
    for number, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "varied" / f"{number}.png")
    (tmp_path / "varied" / "8.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    paths = [f"{number}.png" for number in range(9)]
    return FileDataset("varied", ("a", "b"), tmp_path / "varied", paths, np.arange(9) % 2)


def test_gray_arrays_of_any_size_are_themselves_for_a_model_of_colors():
    class Gray(Dataset):
        name, classes, labels, multilabel, in_memory = "gray", ("a", "b"), np.arange(4) % 2, False, False

        def __len__(self):
            return 4

        def read(self, index):
            return np.full((40, 40 + index), 5 + 10 * index, np.uint8), self.labels[index]

        def describe(self, index):
            return str(index)

    with closing(keep_images(Gray(), Reduction(COLOR), "memory")) as kept:
        assert kept.kept.all()
        for index in range(4):
            pixels, _ = kept.read(index)
            assert pixels.shape[-1] == 3 and np.unique(pixels).tolist() == [5 + 10 * index]


def evaluate(dataset, preprocessing, num_workers=0):
    bad = BadImages(len(dataset))
    batches = evaluation_batches(
        dataset, preprocessing=preprocessing, batch_size=4, num_workers=num_workers, bad_images=bad
    )
    return list(batches), bad.records


def train(dataset, preprocessing, augmentation, num_workers=0):
    bad = BadImages(len(dataset))
    batches = training_batches(
        dataset, preprocessing=preprocessing, augmentation=augmentation, batch_size=6, seed=3, first_step=0,
        num_steps=4, num_workers=num_workers, bad_images=bad,
    )  # fmt: skip
    return list(batches), bad.records


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    assert one[1] == other[1]


@pytest.mark.parametrize("preprocessing", [COLOR, GRAY, SQUASH])
def test_evaluation_sees_the_same_pixels(varied, preprocessing):
    kept = keep_images(varied, Reduction(preprocessing), "memory")
    assert kept.kept.tolist() == [True] * 8 + [False]
    assert_same(evaluate(kept, preprocessing), evaluate(varied, preprocessing))
    assert kept.read(1)[0].shape[:2] == {COLOR: (28, 20), GRAY: (25, 18), SQUASH: (18, 18)}[preprocessing]


@pytest.mark.parametrize("placement", ["shift", "none"])
def test_training_without_crops_sees_the_same_pixels(varied, placement):
    augmentation = Augmentation(placement, flip_rate=0.5)
    kept = keep_images(varied, Reduction.for_training(COLOR, augmentation), "memory")
    assert_same(train(kept, COLOR, augmentation), train(varied, COLOR, augmentation))


def test_worker_processes_read_the_same_file(varied):
    kept = keep_images(varied, Reduction.for_training(COLOR, CROP), "memory")
    for index in range(8):
        os.unlink(varied.path(index))  # so they cannot have decoded them
    assert_same(train(kept, COLOR, CROP, num_workers=1), train(kept, COLOR, CROP))


def test_only_images_with_more_pixels_than_the_smallest_crop_needs_are_reduced(varied):
    reduction = Reduction.for_training(COLOR, CROP)
    assert reduction.side == 32  # a quarter of a square of 32 pixels is a square of 16
    for index, (height, width) in enumerate(SIZES):
        pixels, _ = keep_images(varied, reduction, "memory").read(index)
        if min(height, width) <= 32:
            assert np.array_equal(pixels, np.array(Image.open(varied.path(index))))
        else:
            assert min(pixels.shape[:2]) == 32
            assert pixels.shape[0] / pixels.shape[1] == pytest.approx(height / width, rel=0.02)
        assert reduction.bytes_of(height, width) == pytest.approx(pixels.size, rel=0.02)


def test_crops_of_reduced_images_look_like_those_of_the_whole(tmp_path, photo):
    large = Image.fromarray(photo).resize((600, 400), Image.Resampling.BICUBIC)
    large.save(tmp_path / "0.png")
    dataset = FileDataset("one", ("a",), tmp_path, ["0.png"], np.zeros(1))
    kept = keep_images(dataset, Reduction.for_training(COLOR, CROP), "memory")
    for (ours, _), (whole, _) in zip(train(kept, COLOR, CROP)[0], train(dataset, COLOR, CROP)[0], strict=True):
        assert (ours - whole).abs().mean() < 0.04  # of 2; the boxes are whole pixels


def test_what_has_no_room_is_decoded_each_time_to_the_same_pixels(varied, monkeypatch):
    reduction = Reduction.for_training(COLOR, CROP)
    whole = keep_images(varied, reduction, "memory")
    monkeypatch.setattr(pixel_cache, "available_memory", lambda: 20_000)
    part = keep_images(varied, reduction, "memory")
    assert 0 < part.kept.sum() < 8 and part.num_bytes <= 10_000
    assert_same(train(part, COLOR, CROP), train(whole, COLOR, CROP))
    monkeypatch.setattr(os, "access", lambda *_: False)  # no folder can be written
    assert_same(train(keep_images(varied, reduction, "memory"), COLOR, CROP), train(whole, COLOR, CROP))


def test_a_full_memory_keeps_what_fits(varied, monkeypatch):
    written = []

    def pwrite(file, data, offset):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(offset)
        return original(file, data, offset)

    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    kept = keep_images(varied, Reduction(COLOR), "memory")
    assert kept.kept.sum() == 3
    assert_same(evaluate(kept, COLOR), evaluate(varied, COLOR))


def test_the_address_leads_to_the_file_until_it_is_gone(varied):
    kept = keep_images(varied, Reduction(COLOR), "memory")
    os.unlink(varied.path(1))
    again = attach(varied, kept.reduction, kept.address())
    assert again.kept.sum() == 8
    assert np.array_equal(again.read(1)[0], kept.read(1)[0])
    address = kept.address()
    kept.close()
    assert attach(varied, again.reduction, address).kept.sum() == 0
    assert again.read(1)[0].shape == (28, 20, 3)


def test_a_process_that_dies_leaves_nothing(varied, monkeypatch):
    place, _ = pixel_cache.memory_room()
    before, written, pwrite = set(os.listdir(place)), [], os.pwrite

    def listing(file, *rest):
        written.append({name for name in set(os.listdir(place)) - before if not name.startswith(("sem.", "torch_"))})
        return pwrite(file, *rest)

    monkeypatch.setattr(pixel_cache.os, "pwrite", listing)
    keep_images(varied, Reduction(COLOR), "memory").close()
    assert written and set().union(*written) == set()  # the file has no name while it is filled


def test_the_disk_keeps_images_for_later_runs_until_a_file_changes(varied, tmp_path, monkeypatch):
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    reduction = Reduction(COLOR)
    first, direct = keep_images(varied, reduction, "disk"), evaluate(varied, COLOR)
    assert_same(evaluate(first, COLOR), direct)
    (folder,) = (path for path in (tmp_path / "cache" / "decoded-images").iterdir() if path.is_dir())
    made = (folder / "pixels.bin").stat().st_ino
    assert_same(evaluate(keep_images(varied, reduction, "disk"), COLOR), direct)
    assert (folder / "pixels.bin").stat().st_ino == made
    name = fingerprint(varied, reduction)
    assert name == folder.name != fingerprint(varied, Reduction(GRAY))
    Image.new("RGB", (30, 30), "red").save(varied.path(0))
    changed = keep_images(varied, reduction, "disk")
    assert fingerprint(varied, reduction) != name
    assert_same(evaluate(changed, COLOR), evaluate(varied, COLOR))


def test_a_disk_without_room_is_one_line_and_leaves_nothing(varied, tmp_path, monkeypatch):
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(pixel_cache, "SHARE_OF_DISK", 0.0)
    with pytest.raises(UserError, match=r"free room .* COATNET_CACHE_DIR"):
        keep_images(varied, Reduction(COLOR), "disk")
    assert [path for path in (tmp_path / "cache" / "decoded-images").iterdir() if path.suffix != ".lock"] == []


def test_a_disk_that_is_too_small_is_found_before_the_images_are_decoded(tmp_path, monkeypatch):
    read = []

    class Many(ArrayDataset):
        in_memory = False

        def read(self, index):
            read.append(index)
            return super().read(index)

    source = Many("many", ("a", "b"), np.zeros((1000, 12, 16), np.uint8), np.arange(1000) % 2)
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    room = SimpleNamespace(free=2 * 900 * 12 * 16 * 3)  # of which half is used: 900 images in color
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    with pytest.raises(UserError, match=r"free room .* COATNET_CACHE_DIR"):
        keep_images(source, Reduction(COLOR), "disk")
    assert len(read) == pixel_cache.SAMPLED_IMAGES
    room.free = 2 * 1000 * 12 * 16 * 3
    with closing(keep_images(source, Reduction(COLOR), "disk")) as kept:
        assert kept.kept.all()


def test_an_image_that_cannot_be_read_stays_one(varied):
    with pytest.raises(BadImage, match=r"8\.png"):
        keep_images(varied, Reduction(COLOR), "memory").read(8)


def test_the_memory_of_a_control_group_counts(tmp_path, monkeypatch):
    whole = hardware.available_memory()
    assert whole > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("active_file 7\ninactive_file 1000\n")
    monkeypatch.setattr(hardware, "CONTROL_GROUP", tmp_path)
    assert hardware.available_memory() > 1000
    (tmp_path / "memory.max").write_text("9000\n")
    assert hardware.available_memory() == 5000


def test_a_crop_of_any_part_has_the_pixels_of_the_resolution():
    for resolution in (64, 128, 224):
        for smallest in (0.08, 0.35, 1.0):
            side = Reduction(Preprocessing(resolution), smallest).side
            assert resolution <= side * math.sqrt(smallest) < resolution + 2
