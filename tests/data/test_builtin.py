"""The built-in data sets have the documented images; IDX files are read, and damaged ones refused by name."""

import gzip
import struct
from importlib.resources import files

import numpy as np
import pytest

from coatnet.data import builtin
from coatnet.data.builtin import read_idx
from coatnet.data.open import open_dataset
from coatnet.errors import UserError


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    """Ten training and four validation images of 5 x 6, half of the files gzipped."""
    folder = tmp_path / "some-idx"
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("t10k", 4)):
        images = random.integers(0, 256, (count, 5, 6), dtype=np.uint8)
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 3))
    return folder


def test_fashion_mnist_small_has_1000_and_200_images_of_each_class():
    splits = open_dataset("fashion-mnist-small")
    assert splits.classes == builtin.FASHION_CLASSES and len(splits.classes) == 10
    assert splits.training.images.shape == (10_000, 28, 28)
    assert splits.validation.images.shape == (2_000, 28, 28)
    assert np.bincount(splits.training.labels).tolist() == [1000] * 10
    assert np.bincount(splits.validation.labels).tolist() == [200] * 10
    assert splits.gray and splits.native_resolution == 28


def test_digits_hold_1797_images_as_scikit_learn_has_them():
    datasets = pytest.importorskip("sklearn.datasets")
    splits = open_dataset("digits")
    images = np.concatenate([splits.training.images, splits.validation.images])
    labels = np.concatenate([splits.training.labels, splits.validation.labels])
    reference = datasets.load_digits()
    expected = np.round(reference.images * 255 / 16).astype(np.uint8)
    as_rows = {(label, image.tobytes()) for label, image in zip(labels.tolist(), images, strict=True)}
    assert as_rows == {
        (label, image.tobytes()) for label, image in zip(reference.target.tolist(), expected, strict=True)
    }
    assert len(labels) == 1797
    assert len(splits.validation) == pytest.approx(180, abs=30)


def test_a_folder_of_the_same_name_is_told_and_read_by_its_path(make_folder, monkeypatch):
    monkeypatch.chdir(make_folder({"digits/a": 3, "digits/b": 3}))
    splits = open_dataset("digits")
    assert len(splits.classes) == 10
    assert "digits is the data set of that name; what lies here is ./digits" in str(splits)
    assert open_dataset("./digits").classes == ("a", "b")


def test_embedded_images_weigh_at_most_6_megabytes_and_name_their_licences():
    folder = files("coatnet.data") / "embedded"
    assert sum(len(entry.read_bytes()) for entry in folder.iterdir()) < 6e6
    text = (folder / "README.md").read_text()
    assert "MIT License" in text and "CC BY 4.0" in text


def test_images_are_named_by_their_number_in_the_whole_set():
    splits = open_dataset("fashion-mnist-small")
    assert splits.training.describe(17) == "fashion-mnist-small[17]"
    assert splits.validation.describe(0) == "fashion-mnist-small[10000]"
    names = [
        dataset.describe(index) for dataset in (splits.training, splits.validation) for index in range(len(dataset))
    ]
    assert len(set(names)) == 12_000


def test_a_folder_of_idx_files_is_read(idx_folder):
    splits = open_dataset(idx_folder)
    assert splits.name == "some-idx"
    assert splits.classes == ("0", "1", "2")
    assert (len(splits.training), len(splits.validation)) == (10, 4)
    image, label = splits.validation.read(2)
    assert np.array_equal(image, read_idx(idx_folder / "t10k-images-idx3-ubyte.gz")[2])
    assert label == 2


def test_fashion_mnist_is_found_where_the_environment_says(idx_folder, monkeypatch):
    idx_folder.rename(idx_folder.parent / "fashion-mnist")
    monkeypatch.setenv("COATNET_DATA_DIR", str(idx_folder.parent))
    splits = open_dataset("fashion-mnist")
    assert splits.classes == builtin.FASHION_CLASSES
    assert len(splits.training) == 10


def test_fashion_mnist_that_is_nowhere_says_how_to_get_it(tmp_path, monkeypatch):
    import torchvision.datasets

    def fail(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(builtin, "_DEBIAN", tmp_path / "nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist") as caught:
        open_dataset("fashion-mnist")
    assert "no route to host" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\0", "not an IDX file of bytes"),
        (idx(np.zeros((3, 2, 2), np.uint8))[:-1], "11 bytes where its header says"),
        (bytes([0, 0, 8, 4]) + b"\xff" * 16, "0 bytes where its header says"),
        (gzip.compress(b"x" * 1000, mtime=0)[:-20], "not a readable IDX file"),
    ],
)
def test_broken_idx_files_are_refused_by_name(idx_folder, data, message):
    (idx_folder / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(idx_folder)
    assert "train-images-idx3-ubyte.gz" in str(caught.value)


def test_idx_folder_without_a_file_says_which(idx_folder):
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte"):
        open_dataset(idx_folder)


def test_idx_counts_must_agree(idx_folder):
    (idx_folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(9, np.uint8)))
    with pytest.raises(UserError, match="counts must agree"):
        open_dataset(idx_folder)


def test_labels_beyond_the_classes_are_refused(idx_folder):
    (idx_folder / "train-labels-idx1-ubyte").write_bytes(idx(np.full(10, 11, np.uint8)))
    (idx_folder / "classes.txt").write_text("\n".join(builtin.FASHION_CLASSES))
    with pytest.raises(UserError, match="a label is 11 where there are 10 classes"):
        open_dataset(idx_folder)


def test_a_folder_of_idx_files_may_name_its_classes(idx_folder):
    (idx_folder / "classes.txt").write_text("zero\n\none \r\ntwo\n")
    assert open_dataset(idx_folder).classes == ("zero", "one", "two")
    # The folder's own name decides nothing.
    assert open_dataset(idx_folder.rename(idx_folder.parent / "fashion")).classes == ("zero", "one", "two")


@pytest.mark.parametrize("source", ["nowhere/at/all", "fashion_mnist", ""])
def test_a_source_that_is_not_there_is_refused_with_what_there_is(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"digits, fashion-mnist|no folders with images"):
        open_dataset(source)


def test_a_file_that_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "one.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="a single image is not a dataset"):
        open_dataset(tmp_path / "one.jpg")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(UserError, match="validation_fraction"):
        open_dataset("digits", validation_fraction=fraction)


@pytest.mark.parametrize(("split", "count"), [("train", 10), ("t10k", 4)])
def test_idx_files_of_one_split_can_be_measured_but_not_trained_on(idx_folder, split, count):
    for path in idx_folder.iterdir():
        if not path.name.startswith(split):
            path.unlink()
    splits = open_dataset(idx_folder, evaluation=True)
    assert (len(splits.training), len(splits.validation)) == (0, count)
    with pytest.raises(UserError, match="needs t"):
        open_dataset(idx_folder)


def test_names_of_classes_are_unique_text_in_utf_8(idx_folder):
    names = [f"é{number}" for number in range(10)]
    (idx_folder / "classes.txt").write_text("\n".join(names), encoding="utf-8-sig")  # as editors of Windows write it
    assert open_dataset(idx_folder).classes == tuple(names)
    (idx_folder / "classes.txt").write_text("\n".join(names), encoding="latin-1")
    with pytest.raises(UserError, match=r"classes\.txt is not text in UTF-8"):
        open_dataset(idx_folder)
    (idx_folder / "classes.txt").write_text("\n".join([*names, names[3]]), encoding="utf-8")
    with pytest.raises(UserError, match="class 'é3' is named twice"):
        open_dataset(idx_folder)
