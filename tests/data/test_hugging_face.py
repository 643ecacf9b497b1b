"""Hugging Face `datasets`: columns and class names are recognized, and image files are read unchanged."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.loaders import train

from coatnet.data.decode import BadImage
from coatnet.data.hugging_face import HuggingFaceDataset, open_hugging_face
from coatnet.data.loader import BadImages
from coatnet.data.near_duplicates import keep_copies_together
from coatnet.data.open import open_dataset
from coatnet.data.shards.pack import pack
from coatnet.data.splits import SplitRule
from coatnet.errors import UserError
from coatnet.inference.batch import open_samples

datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def images(encode) -> list[bytes]:
    return [encode(np.random.default_rng(n).integers(0, 256, (12, 16, 3), dtype=np.uint8)) for n in range(30)]


def table(images, labels, feature, *, image="image", label="label", **columns):
    features = {image: datasets.Image(), label: feature}
    features.update({name: datasets.Value("string") for name in columns})
    cells = [{"bytes": data, "path": None} for data in images]
    return datasets.Dataset.from_dict({image: cells, label: labels, **columns}, datasets.Features(features))


ANIMALS = datasets.ClassLabel(names=["zebra", "cat", "emu"])


def saved(tmp_path: Path, **splits) -> Path:
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def one_line(source) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saved_folder_gives_the_bytes_labels_and_names_of_its_rows(images, tmp_path):
    labels = [n % 3 for n in range(20)]
    root = saved(tmp_path, train=table(images[:20], labels, ANIMALS), validation=table(images[20:], [1] * 10, ANIMALS))
    for source in (root, f"hf://{root}"):
        splits = open_dataset(source)
        assert splits.classes == ("zebra", "cat", "emu") and not splits.multilabel
        assert [splits.training.read(n) for n in range(20)] == list(zip(images[:20], labels, strict=True))
        assert [splits.validation.read(n) for n in range(10)] == [(data, 1) for data in images[20:]]
        assert splits.training.describe(3) == "saved/train[3]" and splits.name == "saved"


def test_one_split_is_divided_by_the_hash_of_the_row(images, tmp_path):
    table(images, [n % 3 for n in range(30)], ANIMALS).save_to_disk(tmp_path / "one")
    splits = open_dataset(tmp_path / "one", validation_fraction=0.3)
    rows = [[part.describe(n) for n in range(len(part))] for part in (splits.training, splits.validation)]
    assert len(rows[0]) + len(rows[1]) == 30 and 3 <= len(rows[1]) <= 15
    assert len(set(rows[0]) | set(rows[1])) == 30
    for part in (splits.training, splits.validation):
        for n in range(len(part)):
            row = int(part.describe(n).partition("[")[2][:-1])
            assert part.read(n) == (images[row], row % 3)


def test_a_selection_of_rows_is_used(images, tmp_path):
    chosen = table(images, [n % 3 for n in range(30)], ANIMALS).select(range(5, 25)).shuffle(seed=1)
    root = saved(tmp_path, train=chosen, test=table(images[:3], [0, 1, 2], ANIMALS))
    splits = open_dataset(root)
    assert sorted(splits.training.read(n)[0] for n in range(20)) == sorted(images[5:25])
    assert all(images.index(splits.training.read(n)[0]) % 3 == splits.training.labels[n] for n in range(20))


@pytest.mark.parametrize(
    ("values", "feature", "classes", "labels"),
    [
        (["b", "a", "b"], "string", ("a", "b"), [1, 0, 1]),
        ([10, 9, 10], "int64", ("9", "10"), [1, 0, 1]),
    ],
)
def test_plain_labels_are_classes_by_their_values(images, tmp_path, values, feature, classes, labels):
    part = table(images[:3], values, datasets.Value(feature))
    splits = open_dataset(saved(tmp_path, train=part, test=part))
    assert splits.classes == classes and splits.training.labels.tolist() == labels


def test_lists_of_labels_make_several_labels(images, tmp_path):
    part = table(images[:3], [[0, 2], [], [1]], datasets.Sequence(ANIMALS), label="labels")
    splits = open_dataset(saved(tmp_path, train=part, test=part))
    assert splits.multilabel and splits.training.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert splits.classes == ("zebra", "cat", "emu")


def test_a_rare_label_of_several_stays_in_training(images, tmp_path):
    whole = [table(images[:30], [[0]] * 30, datasets.Sequence(ANIMALS), label="labels")]
    folder = tmp_path / "one"
    held_out = open_dataset(saved(folder, train=whole[0]), validation_fraction=0.3).validation.describe(0)
    rare = int(held_out.rpartition("[")[2].rstrip("]"))
    labels = [[0, 2] if row == rare else [0] for row in range(30)]
    whole = [table(images[:30], labels, datasets.Sequence(ANIMALS), label="labels")]
    splits = open_dataset(saved(tmp_path, train=whole[0]), validation_fraction=0.3)
    assert splits.training.labels[:, 2].sum() == 1 and not splits.validation.labels[:, 2].any()
    assert len(splits.validation)


def test_columns_of_other_names_and_other_columns(images, tmp_path):
    part = table(images[:4], [0, 1, 2, 0], ANIMALS, image="photo", label="species", caption=["?"] * 4)
    splits = open_dataset(saved(tmp_path, train=part, test=part))
    assert splits.training.read(2) == (images[2], 2)
    assert "images are photo, labels species" in splits.notes[0]


def test_images_in_files_are_read_from_there(images, tmp_path):
    paths = [tmp_path / f"{n}.png" for n in range(4)]
    for path, data in zip(paths, images, strict=False):
        path.write_bytes(data)
    features = datasets.Features({"image": datasets.Image(), "label": ANIMALS})
    part = datasets.Dataset.from_dict({"image": list(map(str, paths)), "label": [0, 1, 2, 0]}, features)
    datasets.DatasetDict(train=part, test=part).save_to_disk(tmp_path / "saved", max_shard_size="1GB")
    splits = open_dataset(tmp_path / "saved")
    assert splits.training.read(1) == (images[1], 1)


def test_files_that_a_table_names_are_read_from_its_own_folder_only(images, tmp_path, monkeypatch):
    inside, outside = tmp_path / "data/0.png", tmp_path / "secret/1.png"
    for path in (inside, outside):
        path.parent.mkdir()
        path.write_bytes(images[0])
    (tmp_path / "data/link.png").symlink_to(outside)
    paths = ["0.png", str(inside), str(outside), "../secret/1.png", "link.png", "", "a\0b.png", "/dev/zero"]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    part = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": path} for path in paths]}, features)
    rows = np.arange(len(paths))
    found = HuggingFaceDataset("x", ("a", "b"), part, "image", rows, rows % 2, [str(tmp_path / "data")])
    assert [found.read(row)[0] for row in (0, 1)] == [images[0]] * 2
    for row in (2, 3, 4, 7):
        with pytest.raises(BadImage, match="is not in the data's folder; COATNET_DATA_ROOTS"):
            found.read(row)
    for row in (5, 6):
        with pytest.raises(BadImage, match=r"unreadable: (a folder|no name)"):
            found.read(row)
    monkeypatch.setenv("COATNET_DATA_ROOTS", str(tmp_path / "secret"))
    assert [found.read(row)[0] for row in (2, 3, 4)] == [images[0]] * 3


def test_one_class_and_a_test_split_alone_can_be_evaluated(images, tmp_path):
    root = saved(tmp_path, **{split: table(images[:4], [0, 0, 1, 2], ANIMALS) for split in ("test", "validation")})
    assert "no split is called train" in one_line(root)
    splits = open_dataset(root, evaluation=True)
    assert (len(splits.training), len(splits.validation)) == (0, 4) and splits.describe()
    table(images[:2], ["x", "x"], datasets.Value("string")).save_to_disk(tmp_path / "one")
    assert "one class" in one_line(tmp_path / "one")
    assert len(open_dataset(tmp_path / "one", evaluation=True).validation) == 1


def test_a_row_without_an_image_is_a_bad_image(images, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": ANIMALS})
    cells = [{"bytes": images[0], "path": None}, None]
    part = datasets.Dataset.from_dict({"image": cells, "label": [0, 1]}, features)
    training = open_dataset(saved(tmp_path, train=part, test=part)).training
    with pytest.raises(BadImage, match=r"saved/train\[1\]: empty"):
        training.read(1)
    found = BadImages(2, budget=1.0)
    train(training, num_steps=1, batch_size=2, bad_images=found)
    assert list(found.records) == ["saved/train[1]"]


def test_batches_do_not_depend_on_workers(images, tmp_path):
    part = table(images, [n % 3 for n in range(30)], ANIMALS)
    training = open_dataset(saved(tmp_path, train=part, test=part)).training
    assert len(pickle.dumps(training)) < 20_000  # the table is mapped again, not sent
    for batch, other in zip(train(training, num_workers=2), train(training), strict=True):
        assert all(torch.equal(one, another) for one, another in zip(batch, other, strict=True))


def test_a_saved_folder_can_be_packed(images, tmp_path):
    root = saved(
        tmp_path,
        train=table(images[:20], [n % 3 for n in range(20)], ANIMALS),
        test=table(images[20:], [1] * 10, ANIMALS),
    )
    pack(root, tmp_path / "packed", shard_bytes=10_000, num_workers=2)
    source, shards = open_dataset(root), open_dataset(tmp_path / "packed")
    assert shards.classes == source.classes
    assert sorted(shards.training.read(n)[0] for n in range(20)) == sorted(images[:20])


def test_a_folder_of_images_by_the_loader_of_hugging_face(make_folder):
    root = make_folder({"train/cat": 4, "train/dog": 4, "test/cat": 1, "test/dog": 1})
    splits = open_dataset(f"hf://{root}")
    assert splits.classes == ("cat", "dog")
    assert {splits.training.read(n)[0] for n in range(8)} == {path.read_bytes() for path in root.glob("train/*/*")}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: table(p[:3], [0, 1, -1], ANIMALS), "train, row 2: the label is -1"),
        (lambda p: table(p[:3], [0, None, 1], ANIMALS), "train, row 1: the label is None"),
        (
            lambda p: table(p[:3], [[0], [1, None], [2]], datasets.Sequence(ANIMALS)),
            "train, row 1: the label is [1, None]; remove the row",
        ),
        (
            lambda p: table(p[:3], [["a"], ["b"], [None, "a"]], datasets.Sequence(datasets.Value("string"))),
            "train, row 2: the label is [None, 'a']",
        ),
        (lambda p: table(p[:3], ["a"] * 3, datasets.Value("string")), "one class, 'a'"),
        (lambda p: table(p[:3], [0, 1, 2], ANIMALS).remove_columns("image"), "no column holds images"),
        (lambda p: table(p[:3], [0, 1, 2], ANIMALS).remove_columns("label"), "no column holds labels"),
        (
            lambda p: table(p[:3], [0, 1, 2], ANIMALS, label="one").add_column("two", [0, 1, 2], feature=ANIMALS),
            "one and two could all be labels; call one of them 'label'",
        ),
    ],
)
def test_columns_that_are_unclear_are_one_line(images, tmp_path, build, message):
    part = build(images)
    assert message in one_line(saved(tmp_path, train=part, test=part))


def test_labels_that_training_does_not_know_are_named_by_row(images, tmp_path):
    text = datasets.Value("string")
    root = saved(tmp_path, train=table(images[:2], ["a", "b"], text), test=table(images[:2], ["a", "c"], text))
    assert "test, row 1: the label 'c' is none of the 2 classes" in one_line(root)


def test_splits_without_a_training_split_are_refused(images, tmp_path):
    part = table(images[:3], [0, 1, 2], ANIMALS)
    assert "no split is called train; it has left, right" in one_line(saved(tmp_path, left=part, right=part))


def test_a_damaged_folder_and_an_unknown_name_are_one_line(images, tmp_path):
    part = table(images[:3], [0, 1, 2], ANIMALS)
    root = saved(tmp_path, train=part, test=part)
    for path in root.glob("train/*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    assert "cannot be opened" in one_line(root)
    assert "hf://nobody/nothing cannot be opened" in one_line("hf://nobody/nothing")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'coatnet\[datasets\]'"):
        open_hugging_face("hf://some/thing", 0.1)


def test_one_split_is_divided_by_folds_and_keeps_copies_together(images, tmp_path):
    cells = [*images, *[images[0]] * 6]
    root = saved(
        tmp_path, train=table(cells, [n % 2 for n in range(30)] + [0] * 6, datasets.ClassLabel(names=list("ab")))
    )
    plain = open_dataset(root)
    copies = {"saved/train[0]", *(f"saved/train[{n}]" for n in range(30, 36))}
    _, groups = keep_copies_together(plain, SplitRule(fold="1/3"), print)
    assert [set(group) for group in groups] == [copies]
    splits = open_dataset(root, rule=SplitRule(kept_together=groups))
    folds = [open_dataset(root, rule=SplitRule(fold=f"{n}/3", kept_together=groups)) for n in (1, 2, 3)]
    held_out = [{each.validation.describe(n) for n in range(len(each.validation))} for each in folds]
    assert len(set.union(*held_out)) == sum(map(len, held_out)) == 36
    assert {len(copies & each) for each in held_out} == {0, 7}
    names = {splits.validation.describe(n) for n in range(len(splits.validation))}
    assert len(copies & names) in (0, 7)
    # Nothing else moves, and an image goes with its label.
    assert names - copies == {plain.validation.describe(n) for n in range(len(plain.validation))} - copies
    for dataset in (folds[0].training, folds[0].validation):
        for n in range(len(dataset)):
            row = int(dataset.describe(n).rpartition("[")[2][:-1])
            assert dataset.read(n) == (cells[row], row % 2 if row < 30 else 0)
    two = saved(
        tmp_path / "two",
        train=table(images, [n % 3 for n in range(30)], ANIMALS),
        test=table(images, [1] * 30, ANIMALS),
    )
    with pytest.raises(UserError, match="is divided already, which fold would change: give the images without a split"):
        open_dataset(two, rule=SplitRule(fold="1/3"))


def test_other_images_in_the_same_rows_are_other_data(images, tmp_path):
    labels = [n % 3 for n in range(20)]
    found = []
    for name, part in (("one", images[:20]), ("two", images[10:])):
        root = saved(tmp_path / name, train=table(part, labels, ANIMALS), test=table(images[:5], [1] * 5, ANIMALS))
        splits = open_dataset(root)
        found.append(b"".join(splits.training.identity()))
    assert found[0] != found[1]


def test_splits_that_are_left_out_are_named(images, tmp_path, capsys):
    part = table(images[:6], [0, 1, 2] * 2, ANIMALS)
    splits = open_dataset(saved(tmp_path, train=part, validation=part, test=part))
    assert any(note.startswith("its splits train and validation, without test") for note in splits.notes)
    assert len(open_samples([str(tmp_path / "saved")])) == 12
    assert "saved: its splits train and validation, without test" in capsys.readouterr().err
