"""WebDataset tars that another program wrote, as a source: splits, classes, and an index that is made once."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.data.shards.tars import image, samples, write_tar

from coatnet.data.open import open_dataset
from coatnet.data.shards.dataset import is_shard_folder
from coatnet.data.shards.pack import pack
from coatnet.data.shards.webdataset import Sample, _Tar, _write_samples, split_of
from coatnet.errors import UserError
from coatnet.inference.batch import open_samples


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    return folder


def one_line(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tars_of_another_program_are_read_as_they_are(root):
    write_tar(root / "some-train-0.tar", samples(0, 5))
    write_tar(root / "some-train-1.tar", samples(5, 4))
    write_tar(root / "some-val-0.tar", samples(9, 3))
    splits = open_dataset(root)
    assert splits.classes == ("0", "1", "2") and not splits.multilabel
    assert (len(splits.training), len(splits.validation)) == (9, 3)
    for number in range(9):
        assert splits.training.read(number) == (image(number), number % 3)
        shard = 0 if number < 5 else 1
        assert splits.training.describe(number) == f"some-train-{shard}.tar/{number:05d}"
    assert splits.validation.read(2) == (image(11), 11 % 3)


def test_packed_shards_without_their_index_give_the_same_images(make_folder, root, tmp_path):
    pack(make_folder({"cat": 30, "dog": 30}), tmp_path / "packed", shard_bytes=20_000, num_workers=1)
    for path in (tmp_path / "packed").glob("*.tar"):
        shutil.copy(path, root)
    known, found = open_dataset(tmp_path / "packed"), open_dataset(root)
    for one, other in ((known.training, found.training), (known.validation, found.validation)):
        assert len(one) == len(other)
        assert [one.read(index) for index in range(len(one))] == [other.read(index) for index in range(len(one))]
        assert np.array_equal(one.labels, other.labels) and np.array_equal(one.class_counts, other.class_counts)


def test_class_names_and_json_labels(root):
    cells = [("cls", "cat"), ("cls", "dog"), ("json", {"label": "cat"}), ("json", {"cls": "emu", "caption": "?"})]
    members = []
    for number, (kind, value) in enumerate(cells):
        text = value if isinstance(value, str) else json.dumps(value)
        members += [(f"{number}.png", image(number)), (f"{number}.{kind}", text.encode())]
    write_tar(root / "train/0.tar", members)
    write_tar(root / "val/0.tar", members[:2])
    splits = open_dataset(root)
    assert splits.classes == ("cat", "dog", "emu")
    assert splits.training.labels.tolist() == [0, 1, 0, 2]


def test_lists_of_labels_make_several_labels(root):
    lists = [["a", "c"], [], ["b"]]
    members = []
    for number, labels in enumerate(lists):
        members += [(f"{number}.png", image(number)), (f"{number}.json", json.dumps({"labels": labels}).encode())]
    write_tar(root / "train-0.tar", members)
    write_tar(root / "val-0.tar", members[:2])
    splits = open_dataset(root)
    assert splits.multilabel and splits.training.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert splits.training.read(0)[1].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet-train-0003.tar", "train"), ("TRAINING_1.tar", "train"), ("val.tar", "val"),
        ("x_validation-12.tar", "val"), ("test0.tar", "val"), ("trainer-1.tar", None), ("000.tar", None),
    ],
)  # fmt: skip
def test_splits_follow_from_names(name, split):
    assert split_of(name) == split


def test_without_a_validation_split_whole_tars_are_held_out(root):
    for number in range(10):
        write_tar(root / f"{number:03d}.tar", samples(number * 6, 6))
    splits = open_dataset(root, validation_fraction=0.2)
    assert (len(splits.training), len(splits.validation)) == (48, 12)
    keys = [{part.describe(n) for n in range(len(part))} for part in (splits.training, splits.validation)]
    assert not keys[0] & keys[1]
    assert any("held out: " in note for note in splits.notes)


def test_test_tars_are_left_out_where_there_are_others_for_validation(root, capsys):
    for number, name in enumerate(("train", "val", "test")):
        write_tar(root / f"{name}.tar", samples(number * 6, 6))
    splits = open_dataset(root)
    assert (len(splits.training), len(splits.validation)) == (6, 6)
    assert splits.validation.read(0)[0] == image(6)
    assert "held out: val.tar, without test.tar" in splits.describe()
    assert len(open_samples([str(root)])) == 12 and "without test.tar" in capsys.readouterr().err


def test_test_tars_are_left_out_beside_tars_without_a_split_in_their_name(root):
    for number, name in enumerate(("shard-000", "val-000", "test-000")):
        write_tar(root / f"{name}.tar", samples(number * 6, 6))
    splits = open_dataset(root)
    assert (len(splits.training), len(splits.validation)) == (6, 6)
    assert splits.validation.read(0)[0] == image(6) and "without test-000.tar" in splits.describe()


def test_a_name_that_is_not_utf_8_is_one_line(root):
    write_tar(root / "train.tar", samples(0, 6))
    write_tar(Path(os.fsdecode(os.fsencode(root) + b"/val-\xe9.tar")), samples(6, 6))
    assert "is not UTF-8" in one_line(root)


def test_tars_without_checksums_are_others_once_they_are_written_anew(root, tmp_path):
    def state(folder):
        return b"".join(open_dataset(folder).training.state())

    write_tar(root / "train.tar", samples(0, 6))
    write_tar(root / "val.tar", samples(6, 6))
    shutil.copytree(root, tmp_path / "copy")
    before = state(root)
    assert before == state(root) != state(tmp_path / "copy")
    os.utime(root / "train.tar", ns=(1, 1))  # as where members of the same size have other pixels
    assert state(root) != before


def test_images_beside_a_tar_are_a_folder_of_images(root):
    write_tar(root / "all.tar", samples(0, 6))
    assert is_shard_folder(root)
    (root / "1.png").write_bytes(image(1))
    assert not is_shard_folder(root)


def test_the_tars_are_read_once(root, cache):
    write_tar(root / "train.tar", samples(0, 6))
    write_tar(root / "val.tar", samples(6, 3))
    open_dataset(root)
    heads = list(cache.glob("indexes/*/coatnet-shards.json"))
    made = heads[0].stat().st_mtime_ns
    open_dataset(root)
    assert list(cache.glob("indexes/*/coatnet-shards.json")) == heads and heads[0].stat().st_mtime_ns == made
    assert not list(root.glob("*.json")) and not list(root.glob("*.npy"))


def test_a_tar_that_changes_is_read_again(root):
    write_tar(root / "train.tar", samples(0, 6))
    write_tar(root / "val.tar", samples(6, 3))
    assert open_dataset(root).training.read(1)[0] == image(1)
    before = (root / "train.tar").stat()
    write_tar(root / "train.tar", samples(30, 6))
    assert open_dataset(root).training.read(1)[0] == image(31)
    assert (root / "train.tar").stat().st_size == before.st_size


def test_a_damaged_tar_is_found_at_open(root):
    path = write_tar(root / "train.tar", samples(0, 3))
    write_tar(root / "val.tar", samples(3, 3))
    path.write_bytes(path.read_bytes()[:2000])
    assert one_line(root).startswith(f"{path}: truncated")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x"), ("a.cls", b"99999999999")], "the highest class index is 99,999,999,999"),
        ([("a.txt", b"x")], "train has no image that can be used"),
    ],
)
def test_unusable_tars_are_one_line(root, members, message):
    write_tar(root / "train.tar", members)
    write_tar(root / "val.tar", samples(0, 3))
    assert message in one_line(root)


def test_a_duplicate_tar_is_found_at_open(root):
    write_tar(root / "train-0.tar", samples(0, 3))
    write_tar(root / "train-1.tar", samples(3, 3))
    shutil.copy(root / "train-1.tar", root / "val-0.tar")
    assert f"{root}/val-0.tar: holds the same keys as train-1.tar; remove one" in one_line(root)


def test_a_single_tar_is_refused(root):
    write_tar(root / "all.tar", samples(0, 9))
    assert "one tar, so none can be held out" in one_line(root)


@pytest.mark.parametrize(
    ("tars", "classes"), [(["val-0.tar", "test-1.tar"], 3), (["all.tar"], 3), (["val.tar"], 1), (["a.tar", "b.tar"], 1)]
)
def test_tars_can_be_measured_that_cannot_be_trained_on(root, tars, classes):
    for number, name in enumerate(tars):
        members = samples(3 * number, 3)
        write_tar(root / name, [(key, b"0" if classes == 1 and key.endswith("cls") else data) for key, data in members])
    splits = open_dataset(root, evaluation=True)
    assert splits.classes == tuple(map(str, range(classes)))
    assert len(splits.training.labels) + len(splits.validation.labels) == 3 * len(tars)
    assert splits.describe().startswith("shards: ")
    assert splits.validation.read(2)[0] in (image(2), image(5))
    one_line(root)  # also with the index that was made for evaluation


def test_links_to_themselves_are_no_tars(root):
    for name in ("train", "loop", "loop.txt"):
        (root / name).symlink_to(name)
    assert not is_shard_folder(root)
    write_tar(root / "train-0.tar", samples(0, 3))
    write_tar(root / "val-0.tar", samples(3, 3))
    assert is_shard_folder(root) and len(open_dataset(root).training) == 3


def test_a_failed_reading_leaves_nothing(root, cache):
    write_tar(root / "train.tar", samples(0, 3)[:-1])
    write_tar(root / "val.tar", samples(3, 3))
    one_line(root)
    assert [path.suffix for path in (cache / "indexes").iterdir()] == [".lock"]


@pytest.mark.parametrize("layout", [("cat", "dog"), ("train/cat", "train/dog", "val/cat", "val/dog")])
@pytest.mark.parametrize("place", ["backup.tar", "train/backup.tar"])
def test_a_folder_of_classes_with_a_tar_in_it_is_a_folder_of_images(make_folder, layout, place):
    root = make_folder(dict.fromkeys(layout, 4))
    if (root / place).parent.is_dir():
        write_tar(root / place, samples(0, 3))
    assert open_dataset(root).classes == ("cat", "dog")


@pytest.mark.parametrize("label", [b"[1, 1000000]", b"[1, 99999999999999]", b"[" + b"9" * 4_200 + b"]"])
def test_labels_of_more_classes_than_there_may_be_are_one_line(root, label):
    for name in ("train", "val"):
        write_tar(root / f"{name}-0.tar", [(f"{name}.png", image(0)), (f"{name}.json", label)])
    said = one_line(root).replace(str(root), "")
    assert "label" in said or "it must be from 1 to 999,999" in said


@pytest.mark.slow
def test_several_of_many_labels_take_one_bit_each(root):
    for name in ("train", "val"):
        write_tar(root / f"{name}-0.tar", [(f"{name}.png", image(0)), (f"{name}.json", b"[3, 999999, 3]")])
    training = open_dataset(root).training
    assert np.flatnonzero(training.label(0)).tolist() == [3, 999_999] and training.class_counts.sum() == 2
    rows = [Sample(str(number), 0, 0, (3,)) for number in range(5_000)]
    with pytest.raises(UserError, match=r"some\.tar: 5,000 images with several of 1,000,000 labels"):
        _write_samples(root, _Tar("some.tar", 0, rows), {str(number): number for number in range(1_000_000)}, True)
