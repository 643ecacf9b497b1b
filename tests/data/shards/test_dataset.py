"""Packed shards: any image takes one read, and everything wrong with them is found when they are opened."""

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.loaders import evaluate, train

from coatnet.cli.main import main
from coatnet.data.loader import sampler_of
from coatnet.data.open import open_dataset
from coatnet.data.shards.dataset import ShardDataset
from coatnet.data.shards.index import digest, from_npy, sample_columns, to_npy
from coatnet.data.shards.pack import pack
from coatnet.errors import UserError


@pytest.fixture(scope="module")
def packed(tmp_path_factory, encode) -> Path:
    """200 images of 12 x 16 in two classes, in shards of some 20 KB."""
    root = tmp_path_factory.mktemp("shards")
    for number in range(200):
        path = root / "images" / ("cat" if number % 3 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)))
    pack(root / "images", root / "packed", shard_bytes=20_000, num_workers=1)
    return root / "packed"


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def test_labels_read_and_counts_agree(packed):
    dataset = open_dataset(packed).training
    assert isinstance(dataset, ShardDataset)
    labels = [dataset.read(index)[1] for index in range(len(dataset))]
    assert np.array_equal(labels, dataset.labels) and dataset.labels.dtype == labels[0].dtype == np.int64
    assert np.array_equal(np.bincount(dataset.labels), dataset.class_counts)


def test_the_folder_may_move(folder):
    there = folder.rename(folder.with_name("elsewhere"))
    dataset = open_dataset(there).training
    assert dataset.describe(0).startswith("train-000000.tar/000000000-")


def test_the_description_says_what_is_there(packed):
    text = open_dataset(packed).describe()
    assert text.startswith("images: 200 images, 2 classes") and "packed from images in" in text


def test_a_dataset_can_be_pickled(packed):
    dataset = open_dataset(packed).training
    image, label = dataset.read(7)
    assert len(dataset.labels) == len(dataset)
    sent = pickle.dumps(dataset)
    assert len(sent) < 50_000  # open files, mapped tables and labels stay behind
    copy = pickle.loads(sent)
    assert copy.read(7) == (image, label) and np.array_equal(copy.labels, dataset.labels)


def test_batches_do_not_depend_on_workers(packed):
    dataset = open_dataset(packed).training
    for (images, labels), (others, other_labels) in zip(train(dataset), train(dataset, num_workers=2), strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
    indices = torch.cat([indices for _, _, indices in evaluate(dataset)])
    assert torch.equal(indices, torch.arange(len(dataset)))


def test_resumed_batches_equal_uninterrupted_batches(packed):
    dataset = open_dataset(packed).training
    whole = train(dataset, num_steps=10)
    for batch, other in zip(train(dataset, first_step=4, num_steps=6), whole[4:], strict=True):
        assert all(torch.equal(one, another) for one, another in zip(batch, other, strict=True))


def test_blocks_are_about_eight_mebibytes(packed, monkeypatch):
    dataset = open_dataset(packed).training
    size = dataset.table["num_bytes"].sum() / len(dataset)
    assert dataset.block_size * size == pytest.approx(8 * 2**20, rel=0.01)
    monkeypatch.setattr("coatnet.data.shards.dataset.BLOCK_BYTES", 10_000)
    assert open_dataset(packed).training.block_size == round(10_000 / size)


def test_training_reads_the_images_of_a_window_from_many_shards(packed, monkeypatch):
    monkeypatch.setattr("coatnet.data.shards.dataset.BLOCK_BYTES", 5_000)
    dataset = open_dataset(packed).training
    order = sampler_of(dataset, seed=3)
    assert np.array_equal(np.sort(order.indices(np.arange(len(dataset)))), np.arange(len(dataset)))
    shards = np.searchsorted(np.cumsum(dataset.table["num_samples"]), order.indices(np.arange(len(dataset))), "right")
    num_shards = len(dataset.table)
    assert (shards[1:] == shards[:-1]).mean() < 2.5 / num_shards
    assert len(np.unique(shards[:32])) > num_shards / 2


def test_shards_without_images_are_allowed(make_folder, tmp_path):
    root = make_folder({"train/cat": 6, "train/dog": 6, "val/cat": 1, "val/dog": 1})
    for name in [f"cat/{number}" for number in range(5)] + [f"dog/{number}" for number in range(5)]:
        (root / f"train/{name}.png").write_bytes(b"")
    pack(root, tmp_path / "packed", shard_bytes=1, num_workers=1)
    dataset = open_dataset(tmp_path / "packed").training
    assert sorted(dataset.table["num_samples"].tolist()) == [0] * 10 + [1] * 2
    assert {dataset.read(index)[0] for index in range(2)} == {
        (root / f"train/{name}/5.png").read_bytes() for name in ("cat", "dog")
    }
    assert sorted(dataset.labels.tolist()) == [0, 1]


def one_line(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def forge(folder: Path, change: Callable[[np.ndarray], None], *, of: str) -> None:
    """Change a table of samples, or the table of shards, and all checksums that belong to it."""
    head = json.loads((folder / "coatnet-shards.json").read_text())
    shards = np.load(folder / "train.shards.npy")
    if of == "samples":
        samples = np.load(folder / "train-000000.npy")
        change(samples)
        (folder / "train-000000.npy").write_bytes(data := to_npy(samples))
        shards["index_sha256"][0] = digest(data)
    else:
        change(shards)
    (folder / "train.shards.npy").write_bytes(data := to_npy(shards))
    head["splits"]["train"]["table_sha256"] = digest(data)
    (folder / "coatnet-shards.json").write_text(json.dumps(head))


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [
        ("offset", 0, -1),
        ("offset", -1, 2**62),
        ("offset", 1, 0),
        ("length", 1, 2**63 - 1),
        ("length", 0, -5),
        ("label", 2, 99),
        ("label", 0, -7),
    ],
)
def test_rows_that_point_outside_are_found_at_open(folder, column, row, value):
    def change(samples):
        samples[column][row] = value

    forge(folder, change, of="samples")
    found = one_line(folder)
    number = row % len(np.load(folder / "train-000000.npy"))
    assert f"train-000000.npy: row {number:,} points outside" in found


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a//b.tar", "passwd", "a\\b.tar"])
def test_a_shard_elsewhere_is_refused(folder, name):
    forge(folder, lambda shards: shards["name"].__setitem__(0, name.encode()), of="shards")
    assert "is not the name of a tar in this folder" in one_line(folder)


@pytest.mark.parametrize(("column", "value"), [("num_samples", -1), ("num_bytes", -1), ("index_bytes", 2**63 - 1)])
def test_sizes_that_cannot_be_are_refused(folder, column, value):
    forge(folder, lambda shards: shards[column].__setitem__(0, value), of="shards")
    assert f"the column {column} has values that cannot be" in one_line(folder)


@pytest.mark.parametrize("kind", ["O", "<f8", "<i4", ">i8", "<i8,<i8"])
def test_columns_of_other_types_are_refused(kind):
    rows = np.zeros(2, [("offset", kind), ("length", "<i8"), ("label", "<i4"), ("key", "S3")])
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, rows, version=(1, 0))
    with pytest.raises(UserError, match="not the expected index"):
        from_npy(buffer.getvalue(), sample_columns(3, multilabel=False), 2, "some.npy")


def test_a_header_that_is_nested_deeply_is_refused():
    header = b"(" * 9_000
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with pytest.raises(UserError, match="not the expected index"):
        from_npy(data, sample_columns(3, multilabel=False), 2, "some.npy")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_shard_is_found_at_open(folder, split):
    shard = sorted(folder.glob(f"{split}-*.tar"))[-1]
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    assert one_line(folder) == (
        f"{shard}: truncated, it has {size - 1:,} bytes where the index says {size:,}; fetch or pack it again"
    )


def test_a_shard_of_another_size_is_found_at_open(folder):
    with (folder / "train-000001.tar").open("ab") as file:
        file.write(bytes(512))
    assert f"{folder}/train-000001.tar: changed, it has" in one_line(folder)


def test_a_missing_shard_is_found_at_open(folder):
    (folder / "train-000002.tar").unlink()
    assert f"{folder}/train-000002.tar: missing" in one_line(folder)


def test_a_shard_that_is_not_in_the_index_is_found_at_open(folder):
    shutil.copy(folder / "train-000000.tar", folder / "train-000000 (copy).tar")
    assert f"{folder}/train-000000 (copy).tar: not in the index" in one_line(folder)


@pytest.mark.parametrize("harm", ["missing", "flipped", "another", "short"])
def test_a_table_of_samples_that_does_not_belong_is_found_at_open(folder, harm):
    table = folder / "train-000001.npy"
    data = table.read_bytes()
    match harm:
        case "missing":
            table.unlink()
        case "flipped":
            table.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        case "another":
            shutil.copy(folder / "train-000002.npy", table)
        case "short":
            table.write_bytes(data[:-10])
    assert f"{folder}/train-000001.npy: " in one_line(folder)


def test_a_table_of_shards_that_does_not_belong_is_found_at_open(folder):
    shutil.copy(folder / "val.shards.npy", folder / "train.shards.npy")
    assert f"{folder}/train.shards.npy: does not belong to coatnet-shards.json" in one_line(folder)
    (folder / "train.shards.npy").unlink()
    assert f"{folder}/train.shards.npy: missing" in one_line(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.update(version=2), "version 2 of the index; this coatnet reads 1"),
        (lambda head: head.update(format="something"), "format is 'something'"),
        (lambda head: head.pop("classes"), "not the index of a folder of shards (classes is missing)"),
        (lambda head: head.update(classes=["cat"]), "classes is ['cat']; List should have at least 2 items"),
        (lambda head: head.update(classes=["cat", 3]), "classes is 3; it must be a valid string"),
        (lambda head: head["splits"].pop("val"), "not the index of a folder of shards (val is missing)"),
        (lambda head: head["splits"]["val"].update(num_samples=-1), "num_samples is -1; it must be"),
        (lambda head: head["splits"]["val"].update(num_samples=999), "samples where coatnet-shards.json says 999"),
        (lambda head: head["splits"]["val"].update(num_shards=10**12), "1,000,000,000,000 rows were expected"),
        (lambda head: head["splits"]["val"].update(num_shards=10**4_000), "num_shards is 1000"),
        (lambda head: head["splits"]["val"].update(class_counts=[10**30] * 3), "class_counts is 1000"),
        (lambda head: head.update(classes=["cat"] * len(head["classes"])), "class 'cat' is named twice"),
        (lambda head: head.update(classes=[["cat"]] * 10**5), "classes is"),
        (lambda head: head.update(name="x" * 10**6, notes=7), "notes is 7"),
    ],
)
def test_a_head_that_is_wrong_is_one_line(folder, change, message):
    path = folder / "coatnet-shards.json"
    head = json.loads(path.read_text())
    change(head)
    path.write_text(json.dumps(head))
    assert message in one_line(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", "[" * 100_000, "\xff"])
def test_a_file_that_is_not_a_head_is_one_line(folder, text):
    (folder / "coatnet-shards.json").write_text(text, encoding="latin-1")
    assert "not the index of a folder of shards" in one_line(folder)


def test_verifying_finds_a_flipped_byte_and_names_the_shard(folder):
    dataset = open_dataset(folder).training
    assert sum(dataset.verify()) == dataset.table["num_bytes"].sum()
    path = folder / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(f"{path}: changed, its checksum differs")):
        list(open_dataset(folder).training.verify())


def test_doctor_compares_the_checksum_of_every_shard(folder, capsys):
    assert main(["doctor", str(folder)]) == 0
    path = folder / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # behind all images
    path.write_bytes(data)
    assert main(["doctor", str(folder)]) == 2
    assert f"{path}: changed, its checksum differs; fetch or pack it again" in capsys.readouterr().err


def test_a_shard_that_shrinks_during_a_run_ends_it_in_one_line(folder):
    dataset = open_dataset(folder).training
    for path in folder.glob("train-*.tar"):
        os.truncate(path, 512)
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"train-\d+\.tar: has become shorter; fetch or pack it again") as caught:
            train(dataset, num_workers=workers)
        assert "\n" not in str(caught.value)
