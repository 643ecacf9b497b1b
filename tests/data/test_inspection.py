"""Inspection names every bad file and every leak, and calls a source without them healthy."""

import os

import numpy as np
import pytest

from coatnet.cli.main import main
from coatnet.data.inspection import inspect
from coatnet.data.open import open_dataset
from coatnet.errors import UserError


def test_a_healthy_folder_is_called_healthy(make_folder):
    inspection = inspect(make_folder({"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2}), strict=True)
    assert inspection.healthy
    assert inspection.describe().endswith("\nhealthy")


def test_bad_files_are_named_with_their_reason(make_folder):
    root = make_folder({"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    (root / "train/b/1.png").write_bytes(b"")
    (root / "val/a/0.png").write_bytes(b"<html>")
    inspection = inspect(root)
    assert not inspection.healthy
    assert list(inspection.bad) == ["train/b/1.png", "val/a/0.png"]
    assert "2 images cannot be used" in inspection.describe()
    assert "\n  train/b/1.png: empty: the file has 0 bytes" in inspection.describe()


def test_the_same_pixels_in_training_and_validation_are_a_leak(make_folder, encode):
    root = make_folder({"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    from PIL import Image

    with Image.open(root / "train/a/2.png") as image:
        (root / "val/b/copy.webp").write_bytes(encode(image.convert("RGB"), "WEBP", lossless=True))
    inspection = inspect(root)
    assert inspection.leaks == (("train/a/2.png", "val/b/copy.webp"),)
    assert not inspection.healthy
    assert "1 image of validation found in training too" in inspection.describe()


def test_duplicates_and_contradictions_in_training_are_reported_but_not_unhealthy(make_folder):
    root = make_folder({"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    (root / "train/a/again.png").write_bytes((root / "train/a/0.png").read_bytes())
    (root / "train/b/wrong.png").write_bytes((root / "train/a/1.png").read_bytes())
    inspection = inspect(root)
    assert inspection.num_repeated == 2
    assert inspection.contradictions == (("train/a/1.png", "train/b/wrong.png"),)
    assert inspection.healthy


def test_of_copies_in_both_splits_one_of_validation_stays(make_folder):
    root = make_folder({"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    for copy in ("again", "once-more"):
        (root / f"val/a/{copy}.png").write_bytes((root / "train/a/0.png").read_bytes())
    inspection = inspect(root)
    assert len(inspection.leaks) == 2
    places = {
        getattr(inspection.splits, split).describe(index): why for (split, index), why in inspection.left_out.items()
    }
    assert places == {"train/a/0.png": "in validation too", "val/a/once-more.png": "a copy"}


def test_the_images_of_a_test_split_are_inspected_too(make_folder, tmp_path):
    root = make_folder({f"{split}/{name}": 2 for split in ("train", "val", "test") for name in "ab"})
    for copy, of in (("val/b/x", "test/b/0"), ("train/a/x", "test/a/1"), ("train/b/y", "val/b/x")):
        (root / f"{copy}.png").write_bytes((root / f"{of}.png").read_bytes())
    (root / "test/a/0.png").write_bytes(b"")
    inspection = inspect(root)
    assert not inspection.healthy and list(inspection.bad) == ["test/a/0.png"]
    assert sorted(inspection.leaks) == [
        ("train/a/x.png", "test/a/1.png"),
        ("train/b/y.png", "test/b/0.png"),
        ("train/b/y.png", "val/b/x.png"),
        ("val/b/x.png", "test/b/0.png"),
    ]
    said = inspection.describe()
    assert "2 images of test found in training too\n  train/a/x.png = test/a/1.png" in said
    assert "1 image of test found in validation too\n  val/b/x.png = test/b/0.png" in said
    table = tmp_path / "clean.csv"
    assert main(["doctor", str(root), "--write", str(table)]) == 1
    clean = open_dataset(table)
    assert inspect(clean).healthy
    assert [len(part) for part in clean.parts.values()] == [4, 4, 3]


def test_of_copies_under_several_labels_none_is_kept(make_folder, tmp_path):
    root = make_folder({f"{split}/{name}": 4 for split in ("train", "val") for name in "ab"})
    for copy in ("val/a/x", "val/b/x"):
        (root / f"{copy}.png").write_bytes((root / "train/a/1.png").read_bytes())
    left_out = inspect(root).left_out
    assert sorted(left_out.values()) == ["a copy under another label"] * 3
    assert main(["doctor", str(root), "--write", str(tmp_path / "clean.csv")]) == 1
    clean = inspect(tmp_path / "clean.csv")
    assert clean.healthy and not clean.contradictions


def test_links_out_of_the_data_are_told_and_others_are_not(make_folder, tmp_path):
    root = make_folder({"train/a": 3, "train/b": 3, "val/a": 2, "outside/b": 2, "elsewhere": 1})
    for name in ("outside", "elsewhere"):
        (root / name).rename(tmp_path / name)
    (root / "val/b").symlink_to(tmp_path / "outside/b")
    (root / "train/a/near.png").symlink_to("0.png")
    (root / "train/a/far.png").symlink_to(tmp_path / "elsewhere/0.png")
    inspection = inspect(root)
    assert [name for name, _ in inspection.links_outside] == ["train/a/far.png", "val/b/0.png", "val/b/1.png"]
    assert inspection.healthy and f"  train/a/far.png -> {tmp_path}/elsewhere/0.png\n" in inspection.describe()


def test_special_files_among_the_images_are_bad_ones(make_folder):
    root = make_folder({"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    os.mkfifo(root / "train/a/pipe.jpg")
    for name in ("zero", "random", "tty"):
        (root / f"train/b/{name}.png").symlink_to(f"/dev/{name}")
    (root / "val/a/kernel.jpg").symlink_to("/proc/kmsg")
    found = inspect(root)
    assert found.bad["train/a/pipe.jpg"] == "unreadable: a named pipe, not a regular file"
    assert len(found.bad) == 5 and found.bad["train/b/zero.png"] == "unreadable: a device, not a regular file"


@pytest.mark.parametrize(("one", "other"), [("train/a", "val/b"), ("val/a", "val/b")])
def test_duplicates_with_other_labels_are_reported_in_both_splits(one, other, make_folder):
    root = make_folder({"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    (root / other / "wrong.png").write_bytes((root / one / "1.png").read_bytes())
    inspection = inspect(root)
    assert inspection.contradictions == ((f"{one}/1.png", f"{other}/wrong.png"),)
    assert (inspection.num_repeated, inspection.healthy) == (0, one != "train/a")


def test_images_of_other_shapes_with_the_same_bytes_are_no_duplicates(make_folder, encode):
    root = make_folder({"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1})
    (root / "train/a/wide.png").write_bytes(encode(np.zeros((2, 8, 3), np.uint8)))
    (root / "train/a/tall.png").write_bytes(encode(np.zeros((8, 2, 3), np.uint8)))
    assert inspect(root).num_repeated == 0


def test_a_source_without_one_readable_image_is_still_described(make_folder):
    root = make_folder({"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1})
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    inspection = inspect(root)
    assert len(inspection.bad) == 4
    assert "4 images cannot be used" in inspection.describe()


def test_sizes_are_those_of_images_that_decode_and_the_consequence_is_told(make_folder, encode):
    root = make_folder({"train/a": 6, "train/b": 6, "val/a": 1, "val/b": 1})
    cut = encode(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8))[:5000]  # the header is whole
    for path in (root / "train").glob("*/*.png"):
        if path.parent.name == "b" or path.name > "3":
            path.write_bytes(cut)
    text = inspect(root).describe()
    assert "16 x 12 pixels" in text and "99 x 99" not in text
    assert "training uses others in their place, evaluation leaves them out" in text
    assert "nothing is learned of b" in text
    for path in root.glob("*/*/*.png"):
        path.write_bytes(cut)
    assert "image can be used, so training is refused" in inspect(root).describe()
    with pytest.raises(UserError, match="none of 12 sampled images can be used"):
        open_dataset(root).describe()


@pytest.mark.slow
def test_an_image_of_other_channels_is_a_bad_one(tmp_path):
    for index in range(8):
        place = tmp_path / "images" / ("ant" if index % 2 else "bee") / f"{index}.npy"
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, np.full((6, 6, 3 if index == 5 else 4), index, np.uint16))
    inspection = inspect(tmp_path / "images")
    assert list(inspection.bad) == ["ant/5.npy"] and "channels" in inspection.bad["ant/5.npy"]


def test_the_embedded_sets_are_healthy():
    assert inspect("digits").healthy
    assert inspect("fashion-mnist-small").healthy


def test_a_source_that_cannot_be_opened_is_refused():
    with pytest.raises(UserError, match="no dataset"):
        inspect("nowhere")
