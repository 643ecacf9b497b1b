"""Folders of images: classes from folder names, splits from folders or from hashes."""

import os
import unicodedata

import numpy as np
import pytest

from coatnet.data.folder import natural_key
from coatnet.data.open import open_dataset
from coatnet.errors import UserError


def names(dataset) -> list[str]:
    return [os.path.relpath(dataset.describe(index), dataset.root) for index in range(len(dataset))]


def test_folders_are_classes_in_natural_order(make_folder):
    splits = open_dataset(make_folder({"cat10": 4, "cat2": 4, "Cat1": 4}))
    assert splits.classes == ("Cat1", "cat2", "cat10")
    for dataset in (splits.training, splits.validation):
        for name, label in zip(names(dataset), dataset.labels, strict=True):
            assert name.split("/")[0] == splits.classes[label]
    assert len(splits.training) + len(splits.validation) == 12


def test_images_are_found_at_any_depth_and_by_any_case_of_suffix(make_folder):
    root = make_folder({"cat/young/black": 3, "dog": 3})
    (root / "dog/0.png").rename(root / "dog/0.PNG")
    splits = open_dataset(root)
    assert splits.classes == ("cat", "dog")
    assert sorted(names(splits.training) + names(splits.validation)) == [
        "cat/young/black/0.png", "cat/young/black/1.png", "cat/young/black/2.png",
        "dog/0.PNG", "dog/1.png", "dog/2.png",
    ]  # fmt: skip


def test_no_image_is_on_both_sides_and_the_split_is_stable(make_folder):
    root = make_folder({"cat": 60, "dog": 60})
    first = open_dataset(root, validation_fraction=0.2)
    held_out = set(names(first.validation))
    assert not held_out & set(names(first.training))
    (root / "dog/another.png").write_bytes((root / "dog/0.png").read_bytes())
    assert set(names(open_dataset(root, validation_fraction=0.2).validation)) - {"dog/another.png"} == held_out


@pytest.mark.parametrize(
    ("training", "validation"),
    [("train", "val"), ("Train", "validation"), ("training", "valid"), ("train", "test")],
)
def test_split_folders_are_used(make_folder, training, validation):
    splits = open_dataset(
        make_folder({f"{training}/a": 3, f"{training}/b": 2, f"{validation}/b": 1, f"{validation}/a": 1})
    )
    assert splits.classes == ("a", "b")
    assert (splits.training.labels.tolist(), splits.validation.labels.tolist()) == ([0, 0, 0, 1, 1], [0, 1])


def test_val_is_preferred_to_test(make_folder):
    splits = open_dataset(make_folder({f"{split}/{name}": 2 for split in ("train", "val", "test") for name in "ab"}))
    assert names(splits.validation) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert splits.validation.root.name == "val"


def test_a_train_folder_without_val_is_split_by_hash(make_folder):
    splits = open_dataset(make_folder({"train/a": 5, "train/b": 5}))
    assert splits.classes == ("a", "b")
    assert len(splits.training) + len(splits.validation) == 10


def test_a_class_called_train_is_a_class(make_folder):
    assert open_dataset(make_folder({"bus": 3, "car": 3, "train": 3})).classes == ("bus", "car", "train")


def test_read_gives_the_bytes_of_the_file(make_folder):
    splits = open_dataset(make_folder({"a": 3, "b": 3}))
    for index in range(len(splits.training)):
        data, label = splits.training.read(index)
        assert data == splits.training.path(index).read_bytes()
        assert label == splits.training.labels[index]


# A11: file names


def test_unusual_file_names_are_indexed_and_read(make_folder, encode):
    root = make_folder({"a": 2, "b": 2})
    odd = [
        "with space.png",
        "emoji 🐈.png",
        unicodedata.normalize("NFD", "décomposé.png"),
        unicodedata.normalize("NFC", "composé.png"),
        "x" * 251 + ".png",
        "new\nline.png",
        "-dash.png",
        os.fsdecode(b"latin-\xe9.png"),
    ]
    image = encode(np.zeros((4, 4, 3), np.uint8))
    for name in odd:
        (root / "a" / name).write_bytes(image)
    splits = open_dataset(root)
    paths = [dataset.path(index) for dataset in (splits.training, splits.validation) for index in range(len(dataset))]
    assert {path.name for path in paths} >= set(odd)
    for dataset in (splits.training, splits.validation):
        for index in range(len(dataset)):
            assert dataset.read(index)[0]
            dataset.describe(index).encode("utf-8")


def test_class_names_that_are_not_utf_8_are_made_printable(make_folder):
    root = make_folder({"a": 2, "b": 2})
    os.rename(os.fsencode(root / "b"), os.fsencode(root) + b"/caf\xe9")
    assert open_dataset(root).classes == ("a", "caf\\xe9")


def test_classes_that_differ_only_in_case_stay_apart_with_a_note(make_folder):
    splits = open_dataset(make_folder({"Cat": 3, "cat": 3}))
    assert splits.classes == ("Cat", "cat")
    assert any("differ only in case: Cat, cat" in note for note in splits.notes)


def test_composed_and_decomposed_accents_are_one_class(make_folder):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    splits = open_dataset(make_folder({f"train/{composed}": 2, "train/tea": 2, f"val/{decomposed}": 1, "val/tea": 1}))
    assert splits.classes == (composed, "tea")
    assert splits.validation.labels.tolist() == [0, 1]


# A12: odd contents


def test_empty_class_is_left_out_with_a_note(make_folder):
    splits = open_dataset(make_folder({"a": 3, "b": 3, "nothing": 0}))
    assert splits.classes == ("a", "b")
    assert any("nothing" in note for note in splits.notes)


def test_hidden_and_other_files_are_left_out_with_a_note(make_folder):
    root = make_folder({"a": 3, "b": 3, ".thumbnails": 3})
    (root / "a/.DS_Store").write_bytes(b"x")
    (root / "a/notes.txt").write_text("x")
    (root / "top.png").write_text("x")
    splits = open_dataset(root)
    assert splits.classes == ("a", "b")
    assert len(splits.training) + len(splits.validation) == 6
    assert any("1 .txt" in note and "1 .png at the top" in note for note in splits.notes)


def test_links_to_folders_are_followed_once(make_folder, tmp_path):
    root = make_folder({"a": 3, "elsewhere/b": 3})
    (root / "elsewhere").rename(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere/b")
    (root / "a/circle").symlink_to(root / "a")
    splits = open_dataset(root)
    assert splits.classes == ("a", "b")
    assert len(splits.training) + len(splits.validation) == 6


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 3}, "one class with images, 'a'"),
        ({".": 3}, "no folders with images"),
        ({}, "no dataset"),
        ({"a": 0, "b": 0}, "no folders with images"),
        ({"a": 1, "b": 1}, "no class has two images"),
        (
            {"train/a": 1, "train/b": 1, "val/c": 1},
            "val/ has the class 'c', which train/ has not; it has a, b",
        ),
        ({"train/a": 1, "train/b": 1, "val": 0}, "val/ holds no images"),
        ({"train/a": 1, "val/a": 1}, "one class with images, 'a'"),
    ],
)
def test_a_folder_without_classes_or_images_is_refused(make_folder, counts, message):
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(make_folder(counts))
    assert "\n" not in str(caught.value)


def test_class_missing_in_validation_and_class_of_one_image_are_noted(make_folder):
    splits = open_dataset(make_folder({"train/a": 2, "train/b": 2, "val/a": 1}))
    assert any("for b: nothing is measured" in note for note in splits.notes)


def test_class_of_one_image_is_trained_on_with_a_note(make_folder):
    splits = open_dataset(make_folder({"a": 9, "b": 1}))
    assert splits.training.labels.tolist().count(1) == 1
    assert any("only one image" in note and "b" in note for note in splits.notes)


def test_natural_key_sorts_numbers_by_value():
    unsorted = ["img12", "img2", "Img1", "img", "2img", "10img", ""]
    assert sorted(unsorted, key=natural_key) == ["", "2img", "10img", "img", "Img1", "img2", "img12"]
