"""Folders of images: classes from folder names, splits from folders or from hashes."""

import os
import subprocess
import unicodedata

import numpy as np
import pytest

from coatnet.data.folder import expand_paths, natural_key, open_images
from coatnet.data.open import open_dataset
from coatnet.errors import UserError


def names(dataset) -> list[str]:
    return [os.path.relpath(dataset.path(index), dataset.root) for index in range(len(dataset))]


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


def test_an_empty_path_is_not_the_current_folder(make_folder, monkeypatch):
    monkeypatch.chdir(make_folder({"cat": 1}))
    for paths in ("", [""], ["cat", ""]):
        with pytest.raises(UserError, match="a path is empty: give an image or a folder, such as"):
            list(expand_paths(paths))
        with pytest.raises(UserError, match="a path is empty"):
            open_images(paths)
    assert len(open_images(".")) == 1


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
    assert splits.validation.root.name == "val" and splits.validation.describe(0) == "val/a/0.png"


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


@pytest.mark.parametrize(
    "folders",
    [
        ("training_set", "test_set"),
        ("seg_train", "seg_test", "seg_pred"),
        ("train", "dev"),
        ("trainImages", "ValImages"),
        ("train2017", "val2017"),
        ("images_tr", "images_ts"),
        ("val", "unlabeled"),
    ],
)
@pytest.mark.parametrize("inside", ["/cat", ""])
def test_folders_that_are_called_as_splits_are_not_taken_for_classes(make_folder, folders, inside):
    root = make_folder({f"{name}{inside}": 3 for name in folders})
    with pytest.raises(UserError, match=r"look like splits, not like classes: call them train/ and val/") as caught:
        open_dataset(root)
    assert folders[0] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a/cat": 3, "a/dog": 3, "b/cat": 3, "b/dog": 3}, "the folders a, b hold the same subfolders cat, dog"),
        ({"a/cat": 3, "a/dog": 3, "a/fox": 3, "b/cat": 3, "b/dog": 3}, "hold the same subfolders cat, dog, fox"),
        ({f"{c}/{s}": 3 for c in ("cat", "dog") for s in ("train", "val")}, "above the classes, as in train/cat/"),
        ({f"set/{name}": 3 for name in ("cat", "dog")}, "did you mean '.*/set'"),
        ({"test/cat": 3, "test/dog": 3}, "test/ and no train/"),
    ],
)
def test_folders_in_another_order_are_refused_with_the_right_one(make_folder, counts, message):
    with pytest.raises(UserError, match=message):
        open_dataset(make_folder(counts))


@pytest.mark.parametrize(
    "names",
    [("bus", "train"), ("train station", "test track"), ("cat/images", "dog/images"), ("cat/1", "dog/1", "dog/2")],
)
def test_classes_that_resemble_splits_stay_classes(make_folder, names):
    assert len(open_dataset(make_folder(dict.fromkeys(names, 3))).classes) == 2


SYSTEM_FOLDERS = (
    ".git",
    ".cache",
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "#recycle",
)


def test_system_folders_are_no_classes_and_leave_a_lone_train_folder_alone(make_folder):
    lone = {"train/a": 3, "train/b": 3, "empty": 0, **dict.fromkeys(SYSTEM_FOLDERS, 1)}
    inside = {f"train/{name}": 1 for name in SYSTEM_FOLDERS} | {f"train/a/{name}": 1 for name in SYSTEM_FOLDERS}
    splits = open_dataset(make_folder(lone | inside))
    assert splits.classes == ("a", "b") and len(splits.training) + len(splits.validation) == 6


def test_images_beside_the_splits_are_noted(make_folder):
    splits = open_dataset(
        make_folder({f"{split}/{name}": 2 for split in ("train", "val", "test", "x") for name in "ab"})
    )
    assert "left out, as they are not among them: x/" in splits.notes
    assert "test/ is measured once, at the end of a training" in splits.notes
    assert [splits.test.describe(index) for index in range(4)] == [
        f"test/{name}.png" for name in ("a/0", "a/1", "b/0", "b/1")
    ]


def test_split_folders_that_differ_in_case_are_noted(make_folder):
    splits = open_dataset(make_folder({f"{split}/{name}": 2 for split in ("Train", "train", "val") for name in "ab"}))
    assert splits.training.describe(0) == "train/a/0.png" and len(splits.training) == 4
    assert "left out, as they are not among them: Train/" in splits.notes


def test_a_test_folder_with_other_classes_is_left_out(make_folder):
    splits = open_dataset(
        make_folder({f"{split}/{name}": 2 for split in ("train", "val") for name in "ab"} | {"test/c": 1})
    )
    assert splits.test is None and any("left out, as they are not among them: test/" in note for note in splits.notes)


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ({"cat": 5}, (4, 1)),
        ({"cat": 1, "dog": 1}, (0, 2)),
        ({"test/cat": 3, "test/dog": 1}, (0, 4)),
        ({"val/cat": 3, "test/dog": 1}, (0, 3)),
        ({"train/cat": 3, "val/cat": 1, "val/dog": 1}, (3, 2)),
    ],
)
def test_what_is_too_little_to_train_on_can_be_evaluated(make_folder, counts, sizes):
    splits = open_dataset(make_folder(counts), evaluation=True)
    assert (len(splits.training), len(splits.validation)) == sizes and splits.describe()


def test_many_nested_folders_links_in_circles_and_files_without_suffix(make_folder, tmp_path):
    root = make_folder({"a": 2, "b": 2})
    (root / "a/0.png").rename(root / "a/zero")
    (root / "a/notes").write_text("no image")
    (root / "a/loop").symlink_to("loop")
    deep = root / "b"
    for _ in range(1500):
        deep /= "d"
        deep.mkdir()
    (root / "b/1.png").rename(deep / "1.png")
    (root / "b/up").symlink_to(root)
    splits = open_dataset(root)
    assert len(splits.training) + len(splits.validation) == 6  # those of a are found below b/up/a too
    assert any("4 without suffix" in note for note in splits.notes)
    found = [str(path.relative_to(root)) for path, error in expand_paths([root]) if error is None]
    assert len(found) == 4 and found[:2] == ["a/1.png", "a/zero"]
    subprocess.run(["rm", "-r", root / "b/d"], check=True)  # Python's own function may not go so deep


def test_natural_key_sorts_numbers_by_value():
    unsorted = ["img12", "img2", "Img1", "img", "2img", "10img", ""]
    assert sorted(unsorted, key=natural_key) == ["", "2img", "10img", "img", "Img1", "img2", "img12"]


def test_a_table_beside_images_names_the_option_that_reads_it(tmp_path):
    (tmp_path / "a.csv").write_text("path,label\n")
    ((_, error),) = expand_paths([tmp_path / "a.csv"])
    assert error.startswith("a table: predict --out FILE")
