"""Packing keeps the images, and its bytes do not depend on the number of processes."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.shards.mounts import run_with_mount

from coatnet.cli.main import main
from coatnet.data.datasets import ArrayDataset
from coatnet.data.decode import decode
from coatnet.data.open import open_dataset
from coatnet.data.shards.pack import pack
from coatnet.data.splits import Splits
from coatnet.errors import UserError


def images_of(dataset) -> list[tuple[bytes, int]]:
    return sorted((dataset.read(index)[0], int(dataset.read(index)[1])) for index in range(len(dataset)))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        found = {}
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None and member.name not in found
            found[member.name] = file.read()
        return found


def test_a_packed_folder_holds_the_bytes_labels_and_splits_of_its_source(make_folder, tmp_path):
    root = make_folder({"cat": 30, "dog": 20, "emu": 10})
    source = open_dataset(root)
    packed = pack(root, tmp_path / "packed", shard_bytes=20_000, num_workers=1)
    shards = open_dataset(tmp_path / "packed")
    assert shards.classes == source.classes
    assert images_of(shards.training) == images_of(source.training)
    assert images_of(shards.validation) == images_of(source.validation)
    assert (packed.num_images, packed.bad_images) == (60, {})
    assert packed.num_bytes == sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.tar"))
    assert packed.num_shards == len(list((tmp_path / "packed").glob("*.tar"))) > 4


def test_pixels_are_packed_without_loss(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (12, 9, 11, 3), dtype=np.uint8)
    grays = colors[..., 0]
    for name, pixels in (("color", colors), ("gray", grays)):
        part = ArrayDataset(name, ("a", "b"), pixels, np.arange(12) % 2)
        pack(Splits(name, part, part), tmp_path / name, num_workers=1)
        shards = open_dataset(tmp_path / name).training
        seen = []
        for index in range(12):
            data, label = shards.read(index)
            expected = pixels if pixels.ndim == 4 else np.repeat(pixels[..., None], 3, axis=-1)
            (original,) = (n for n in range(12) if np.array_equal(decode(data, "").permute(1, 2, 0), expected[n]))
            assert label == original % 2 and shards.describe(index).endswith(f"-{name}_{original}")
            seen.append(original)
        assert sorted(seen) == list(range(12)) and seen != list(range(12))


def test_the_tars_are_plain_webdataset_tars(make_folder, tmp_path):
    root = make_folder({"cat": 9, "dog": 9})
    (root / "cat/a name. with dots ä.png").write_bytes((root / "cat/0.png").read_bytes())
    pack(root, tmp_path / "packed", shard_bytes=15_000, num_workers=1)
    keys = []
    for split in ("train", "val"):
        for path in sorted((tmp_path / "packed").glob(f"{split}-*.tar")):
            members = members_of(path)
            names = list(members)
            for image, label in zip(names[::2], names[1::2], strict=True):
                key, _, suffix = image.partition(".")
                assert suffix == "png" and label == f"{key}.cls" and key.isascii()
                assert decode(members[image], image).shape == (3, 12, 16)
                assert members[label] in (b"0", b"1")
                keys.append((split, key))
    assert len(set(keys)) == len(keys) == 19
    assert any(key.endswith("-a_name_with_dots") for _, key in keys)


def test_a_member_has_the_suffix_of_its_format(make_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    root = make_folder({"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    suffixes = ("ppm", "tif", "jp2", "gif")
    for seed, suffix in enumerate(suffixes):
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"train/cat/of_{suffix}.{suffix}")
    pack(root, tmp_path / "packed", num_workers=1)
    members = members_of(tmp_path / "packed/train-000000.tar")
    for suffix in suffixes:
        (name,) = (name for name in members if name.endswith(f"-of_{suffix}.{suffix}"))
        assert members[name] == (root / f"train/cat/of_{suffix}.{suffix}").read_bytes()
    (tmp_path / "tars").mkdir()
    for path in (tmp_path / "packed").glob("*.tar"):  # without their index, read by the names of the members
        shutil.copy(path, tmp_path / "tars")
    packed, bare = open_dataset(tmp_path / "packed"), open_dataset(tmp_path / "tars")
    assert images_of(packed.training) == images_of(bare.training) == images_of(open_dataset(root).training)


def test_several_labels_become_json_and_come_back(tmp_path):
    matrix = np.random.default_rng(0).integers(0, 2, (40, 11), dtype=np.uint8)
    pixels = np.random.default_rng(1).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    part = ArrayDataset("several", [f"class {number}" for number in range(11)], pixels, matrix)
    pack(Splits("several", part, part), tmp_path / "packed", shard_bytes=30_000, num_workers=1)
    shards = open_dataset(tmp_path / "packed").training
    assert shards.multilabel and shards.labels.dtype == np.uint8
    for index in range(40):
        data, label = shards.read(index)
        original = int(shards.describe(index).rpartition("_")[2])
        assert np.array_equal(decode(data, "")[0], pixels[original])
        assert np.array_equal(label, matrix[original]) and np.array_equal(shards.labels[index], label)
    members = members_of(tmp_path / "packed/train-000000.tar")
    name, text = next((name, text) for name, text in members.items() if name.endswith(".json"))
    original = int(name.removesuffix(".json").rpartition("_")[2])
    assert json.loads(text) == {"labels": [f"class {number}" for number in np.flatnonzero(matrix[original])]}


def test_the_bytes_do_not_depend_on_the_number_of_processes(make_folder, tmp_path):
    root = make_folder({"cat": 30, "dog": 30})
    (root / "cat/3.png").write_bytes(b"not an image")
    for name, workers in (("one", 1), ("two", 2), ("three", 3)):
        pack(root, tmp_path / name, shard_bytes=15_000, num_workers=workers)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "three")
    assert not list(tmp_path.glob(".*"))


def test_packing_a_packed_folder_keeps_images_and_keys_short(make_folder, tmp_path):
    root = make_folder({"cat": 10, "dog": 10})
    pack(root, tmp_path / "one", num_workers=1)
    pack(tmp_path / "one", tmp_path / "two", num_workers=1)
    one, two = open_dataset(tmp_path / "one"), open_dataset(tmp_path / "two")
    assert images_of(one.training) == images_of(two.training)
    stems = [
        {part.describe(n).rpartition("/")[2].split("-")[1] for n in range(len(part))}
        for part in (one.training, two.training)
    ]
    assert stems[0] == stems[1] <= {str(number) for number in range(10)}


def test_the_shuffle_mixes_the_classes_of_a_sorted_source(make_folder, tmp_path):
    pack(make_folder({"cat": 100, "dog": 100}), tmp_path / "packed", shard_bytes=1_000_000, num_workers=1)
    labels = open_dataset(tmp_path / "packed").training.labels
    assert 60 < (labels[1:] != labels[:-1]).sum() < 120


def test_shards_have_about_the_given_size(make_folder, tmp_path):
    pack(make_folder({"cat": 150, "dog": 150}), tmp_path / "packed", shard_bytes=100_000, num_workers=1)
    sizes = [path.stat().st_size for path in (tmp_path / "packed").glob("train-*.tar")]
    assert len(sizes) > 3 and all(80_000 < size < 120_000 for size in sizes)


def test_bad_images_are_left_out_and_named_with_reasons(make_folder, tmp_path, capsys):
    root = make_folder({"train/cat": 20, "train/dog": 20, "val/cat": 5, "val/dog": 5})
    (root / "train/cat/3.png").write_bytes(b"")
    (root / "val/dog/1.png").write_bytes((root / "val/dog/1.png").read_bytes()[:200])
    assert main(["pack", str(root), str(tmp_path / "packed"), "--workers", "1"]) == 1
    printed = capsys.readouterr()
    assert "48 images in 2 shards" in printed.out
    assert printed.err.count("\n") == 2
    assert " train/cat/3.png: empty" in printed.err and " val/dog/1.png: truncated" in printed.err
    shards = open_dataset(tmp_path / "packed")
    assert (len(shards.training), len(shards.validation)) == (39, 9)
    assert shards.training.class_counts.tolist() == np.bincount(shards.training.labels).tolist() == [19, 20]
    assert any("2 images left out" in note for note in shards.notes)
    lines = [json.loads(line) for line in (tmp_path / "packed/left-out.jsonl").read_text().splitlines()]
    assert [line["picture"].rpartition("images/")[2] for line in lines] == ["train/cat/3.png", "val/dog/1.png"]


def test_a_source_without_a_usable_image_is_one_line_and_leaves_no_folder(make_folder, tmp_path, capsys):
    root = make_folder({"train/cat": 2, "train/dog": 2, "val/cat": 1})
    (root / "val/cat/0.png").write_bytes(b"")
    assert main(["pack", str(root), str(tmp_path / "packed"), "--workers", "1"]) == 2
    assert "val has no image that can be used" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "there"], "there exists already; give a new folder"),
        (["digits", "new", "--shard-size", "big"], "'big' is not a size; write it as 256MB or 2GB"),
        (["digits", "new", "--workers", "0"], "must be at least 1, got 256000000 and 0"),
        (["nowhere", "new"], "no dataset at 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    assert main(["pack", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("coatnet: error: ") and error.count("\n") == 1 and message in error
    assert files_of(tmp_path) == {"there/file": b"mine"}


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_an_empty_or_a_missing_folder_is_filled_where_it_leads(there, make_folder, tmp_path):
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    pack(make_folder({"cat": 4, "dog": 4}), tmp_path / "link", num_workers=1)
    assert (tmp_path / "link").is_symlink() and open_dataset(tmp_path / "real").classes == ("cat", "dog")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "link", "real"]


def test_a_mount_point_is_refused_before_the_work(tmp_path):
    program = "import sys; from coatnet.cli.main import main; sys.exit(main(['pack', 'digits', sys.argv[1]]))"
    done = run_with_mount(tmp_path / "disk", program)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(" is a mount point, which no folder can replace; give a new folder below it\n")
    assert done.stderr.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_packing_restores_the_number_of_threads(make_folder, tmp_path):
    before = torch.get_num_threads()
    pack(make_folder({"cat": 4, "dog": 4}), tmp_path / "packed", num_workers=1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("link", ["train/a/secret.png", "train/a/sub", "train"])
def test_links_out_of_the_data_are_not_packed_unless_their_folder_is_trusted(link, make_folder, tmp_path, monkeypatch):
    root = make_folder({"train/a": 6, "train/b": 6, "secret": 2})
    (root / "secret").rename(tmp_path / "secret")
    if link == "train":
        (root / "train").rename(tmp_path / "secret/train")
    target = {"train/a/secret.png": "secret/0.png", "train/a/sub": "secret", "train": "secret/train"}[link]
    (root / link).symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"is a link to .*secret/.*out of the data's folder.*COATNET_DATA_ROOTS"):
        pack(root, tmp_path / "packed", num_workers=1)
    assert not (tmp_path / "packed").exists() and not list(tmp_path.glob(".packed*"))
    monkeypatch.setenv("COATNET_DATA_ROOTS", str(tmp_path / "secret"))
    assert pack(root, tmp_path / "packed", num_workers=1).num_images >= 12


def test_copies_are_packed_into_one_split(make_folder, tmp_path):
    root = make_folder({"cat": 30, "dog": 30})
    for number in range(20):
        (root / f"cat/copy{number}.png").write_bytes((root / "cat/0.png").read_bytes())
    plain = open_dataset(root)
    assert any("copy" in plain.validation.describe(n) for n in range(len(plain.validation)))  # else nothing is tested
    pack(root, tmp_path / "packed", num_workers=1)
    packed = open_dataset(tmp_path / "packed")
    pixels = plain.training.read(0)[0]
    found = [sum(part.read(n)[0] == pixels for n in range(len(part))) for part in (packed.training, packed.validation)]
    assert sorted(found) == [0, 21], plain.training.describe(0)


def test_a_test_split_that_is_left_out_and_an_empty_split_are_told(make_folder, tmp_path, capsys):
    root = make_folder({f"{split}/{label}": 2 for split in ("train", "val", "test") for label in "ab"})
    pack(root, tmp_path / "shards")
    assert "4 images of the test split are not packed" in capsys.readouterr().err
    notes = open_dataset(tmp_path / "shards").notes
    assert any("4 images of the test split not packed" in note for note in notes)
    assert not any("measured once" in note for note in notes)
    some = ArrayDataset("some", ("a", "b"), np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1]))
    none = ArrayDataset("some", ("a", "b"), np.zeros((0, 8, 8), np.uint8), np.zeros(0, np.int64))
    with pytest.raises(UserError, match="some has no images in its validation split"):
        pack(Splits("some", some, none), tmp_path / "none")
    assert not (tmp_path / "none").exists()
