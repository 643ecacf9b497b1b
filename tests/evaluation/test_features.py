"""Features are the input of the classifier, and files hold exactly them."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.bundle import Bundle
from coatnet.data.datasets import ArrayDataset, FileDataset
from coatnet.data.folder import open_images
from coatnet.data.open import open_dataset
from coatnet.data.splits import Splits
from coatnet.data.transforms import EvaluationTransform, Preprocessing
from coatnet.errors import UserError
from coatnet.evaluation import features as features_module
from coatnet.evaluation.features import extract_features, write_features
from coatnet.model.network import create_model

CLASSES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=4, in_channels=1, resolution=8).eval()
    return Bundle(model, CLASSES, Preprocessing(resolution=8, mean=(0.5,), std=(0.5,)))


def dataset_of(num_images: int = 37, *, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> ArrayDataset:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 255, (num_images, 8, 8), dtype=np.uint8)
    return ArrayDataset("noise", classes, images, generator.integers(0, len(classes), num_images))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten images."""
    generator = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(generator.integers(0, 255, (9, 8, 3), np.uint8)).save(
                tmp_path / "in" / name / f"{number}.png"
            )
    return tmp_path / "in"


def test_features_are_the_input_of_the_classifier(bundle: Bundle) -> None:
    dataset = dataset_of(5)
    features, labels, names = extract_features(bundle, dataset).gather()
    transform = EvaluationTransform(bundle.preprocessing)
    assert features.shape == (5, bundle.model.num_features) and features.dtype == torch.float32
    for index in range(5):
        image = transform(dataset.read(index)[0])[None]
        with torch.no_grad():
            expected_features = bundle.model.forward_head(bundle.model.forward_features(image), pre_logits=True)
            logits = bundle.model(image)
        torch.testing.assert_close(features[index : index + 1], expected_features)
        torch.testing.assert_close(bundle.model.get_classifier()(features[index : index + 1]), logits)
    assert labels.tolist() == dataset.labels.tolist()
    assert names == tuple(f"noise[{index}]" for index in range(5))


def test_features_do_not_depend_on_the_batch_size(bundle: Bundle) -> None:
    whole, labels, names = extract_features(bundle, dataset_of(), batch_size=64).gather()
    for batch_size in (1, 8):
        parts = list(extract_features(bundle, dataset_of(), batch_size=batch_size))
        assert {len(part.names) for part in parts[:-1]} == {batch_size}
        torch.testing.assert_close(torch.cat([part.features for part in parts]), whole)
        assert torch.cat([part.labels for part in parts]).equal(labels)
        assert sum((part.names for part in parts), ()) == names


def test_images_are_read_one_batch_ahead_at_most(bundle: Bundle, folder: Path) -> None:
    class Counted(FileDataset):
        num_reads = 0

        def read(self, index: int) -> tuple[bytes, np.ndarray]:
            self.num_reads += 1
            return super().read(index)

    paths = [f"{name}/{number}.png" for name in "ab" for number in range(10)]
    dataset = Counted("counted", ("a", "b"), folder, paths, np.arange(20) // 10)
    batches = iter(extract_features(bundle, dataset, batch_size=3))
    assert dataset.num_reads == 0
    for number in range(1, 4):
        next(batches)
        assert 3 * number <= dataset.num_reads <= 3 * (number + 1)


def test_all_is_training_followed_by_validation(bundle: Bundle) -> None:
    splits = Splits("both", dataset_of(10), dataset_of(7, seed=1))
    parts = [extract_features(bundle, splits, split=split).gather()[0] for split in ("training", "validation")]
    torch.testing.assert_close(extract_features(bundle, splits).gather()[0], torch.cat(parts))
    with pytest.raises(UserError, match="there is no test split"):
        extract_features(bundle, splits, split="test")


def test_classes_unknown_to_the_model_are_accepted(bundle: Bundle) -> None:
    foreign = extract_features(bundle, dataset_of(classes=("zebra", "yak")))
    assert foreign.classes == ("zebra", "yak") and set(foreign.gather()[1].tolist()) == {0, 1}


def test_evaluation_mode_is_used_and_the_old_mode_restored(bundle: Bundle) -> None:
    expected = extract_features(bundle, dataset_of(6)).gather()[0]
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    bundle.model.train()
    try:
        torch.testing.assert_close(extract_features(bundle, dataset_of(6), batch_size=2).gather()[0], expected)
        next(iter(extract_features(bundle, dataset_of(6), batch_size=2)))  # given up in the middle
        assert bundle.model.training
    finally:
        bundle.model.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in bundle.model.state_dict().items())


def test_a_head_can_be_trained_on_features(bundle: Bundle) -> None:
    features, labels, _ = extract_features(bundle, dataset_of(6)).gather()
    head = torch.nn.Linear(features.shape[1], 4)
    torch.nn.functional.cross_entropy(head(features), labels).backward()
    assert head.weight.grad.norm() > 0


def test_a_model_needs_only_the_public_methods() -> None:
    class Other(torch.nn.Module):
        num_classes, in_channels, num_features = 4, 1, 3

        def __init__(self) -> None:
            super().__init__()
            self.convolution = torch.nn.Conv2d(1, 3, 1)

        def forward_features(self, images: torch.Tensor) -> torch.Tensor:
            return self.convolution(images)

        def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            assert pre_logits
            return x.mean((2, 3))

    other = Bundle(Other(), CLASSES, Preprocessing(resolution=8, mean=(0.5,), std=(0.5,)))
    assert extract_features(other, dataset_of(5)).gather()[0].shape == (5, 3)


def test_unreadable_files_are_left_out_and_named(bundle: Bundle, folder: Path) -> None:
    bad = folder / "b" / "4.png"
    bad.write_bytes(bad.read_bytes()[:60])
    features = extract_features(bundle, folder, batch_size=3)
    table, labels, names = features.gather()
    assert len(features) == 20 and len(table) == len(labels) == len(names) == 19
    assert list(features.bad_images) == ["b/4.png"] and "b/4.png" not in names


def test_data_without_images_is_refused(bundle: Bundle, folder: Path) -> None:
    with pytest.raises(UserError, match="noise: the all split holds no images"):
        extract_features(bundle, dataset_of(0)).gather()
    with pytest.raises(UserError, match="batch_size is 0"):
        extract_features(bundle, dataset_of(), batch_size=0)
    for path in folder.rglob("*.png"):
        path.write_text("not an image")
    with pytest.raises(
        UserError, match=r"none of the 20 images of the all split could be read, the last one .*: format: "
    ):
        extract_features(bundle, folder).gather()


def test_features_that_are_not_finite_are_an_error(bundle: Bundle) -> None:
    broken = create_model("coatnet-femto-16", num_classes=4, in_channels=1, resolution=8)
    torch.nn.init.constant_(broken.head.hidden.weight, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        extract_features(Bundle(broken, CLASSES, bundle.preprocessing), dataset_of(3)).gather()


def test_images_without_labels_are_in_the_order_of_the_paths(bundle: Bundle, folder: Path) -> None:
    single = folder / "b" / "7.png"
    features = extract_features(bundle, open_images([single, folder / "a"]))
    table, labels, names = features.gather()
    assert names == ("b/7.png", *(f"a/{number}.png" for number in range(10)))
    assert features.classes == () and set(labels.tolist()) == {-1}
    labelled = extract_features(bundle, folder).gather()
    place = {name: index for index, name in enumerate(labelled[2])}
    torch.testing.assert_close(table, labelled[0][[place[name] for name in names]])


def test_a_path_without_images_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"missing\.png: no such file"):
        open_images([folder, "missing.png"])
    with pytest.raises(UserError, match="empty: no images in this folder"):
        open_images([tmp_path / "empty"])


def rows_of(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_npy_and_csv_equal_the_extracted_features(bundle: Bundle, folder: Path) -> None:
    (folder / "b" / "4.png").write_bytes(b"")
    features = extract_features(bundle, folder, batch_size=3)
    out = folder.parent / "found" / "all.npy"
    assert write_features(features, out) == 19
    assert {path.name for path in out.parent.iterdir()} == {"all.npy", "all.csv"}
    table, labels, names = features.gather()
    for mode in (None, "r"):
        array = np.load(out, mmap_mode=mode)
        assert array.dtype == np.float32 and np.array_equal(array, table.numpy())
    header, *rows = rows_of(out.with_suffix(".csv"))
    assert header == ["path", "label"]
    assert rows == [[name, "ab"[label]] for name, label in zip(names, labels.tolist(), strict=True)]


def test_the_csv_is_a_manifest(bundle: Bundle, folder: Path) -> None:
    write_features(extract_features(bundle, folder), folder / "all.npy")  # its paths begin at the data
    splits = open_dataset(folder / "all.csv")
    assert splits.classes == ("a", "b") and len(splits.training) + len(splits.validation) == 20


def test_parquet_equals_the_extracted_features_in_row_groups(
    bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(features_module, "MIN_ROW_GROUP_IMAGES", 7)
    features = extract_features(bundle, folder, batch_size=3)
    out = folder.parent / "all.parquet"
    assert write_features(features, out) == 20
    table, labels, names = features.gather()
    with parquet.ParquetFile(out) as file:
        assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [9, 9, 2]
        read = file.read()
    assert read.schema.field("features").type == pyarrow.list_(pyarrow.float32(), bundle.model.num_features)
    assert np.array_equal(np.stack(read["features"].to_numpy()), table.numpy())
    assert read["path"].to_pylist() == list(names)
    assert read["label"].to_pylist() == ["ab"[label] for label in labels.tolist()]


def test_multilabel_and_missing_labels_in_files(bundle: Bundle, folder: Path) -> None:
    from pyarrow import parquet

    images = dataset_of(3).images
    labels = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    several = extract_features(bundle, ArrayDataset("noise", CLASSES, images, labels))
    write_features(several, folder / "several.npy")
    assert [row[1] for row in rows_of(folder / "several.csv")[1:]] == ["a;c", "", "b"]
    write_features(extract_features(bundle, open_images([folder / "a" / "1.png"])), folder / "none.parquet")
    assert parquet.read_table(folder / "none.parquet")["label"].to_pylist() == [None]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", ["f.npy", "f.parquet"])
def test_a_file_name_that_is_not_unicode_is_written_escaped(bundle: Bundle, folder: Path, name: str) -> None:
    strange = Path(os.fsdecode(os.fsencode(folder) + b'/\xff,"\n.png'))
    (folder / "a" / "1.png").rename(strange)
    assert write_features(extract_features(bundle, open_images([strange])), folder / name) == 1
    if name == "f.npy":
        assert rows_of(folder / "f.csv")[1] == ['\\xff,"\\n.png', ""]


@pytest.mark.parametrize("name", ["f.npy", "f.parquet"])
def test_a_failure_leaves_no_files(bundle: Bundle, folder: Path, tmp_path: Path, name: str) -> None:
    for path in (folder / "a").iterdir():
        path.write_bytes(b"")
    for path in (folder / "b").iterdir():
        path.write_bytes(b"")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="none of the 20 images"):
        write_features(extract_features(bundle, folder), tmp_path / "out" / name)
    assert not list((tmp_path / "out").iterdir())


def test_an_existing_file_is_not_replaced(bundle: Bundle, tmp_path: Path) -> None:
    features = extract_features(bundle, dataset_of(2))
    for present, out in (("f.npy", "f.npy"), ("g.csv", "g.npy"), ("h.parquet", "h.parquet")):
        (tmp_path / present).write_text("mine")
        with pytest.raises(UserError, match=f"{present} is there already"):
            write_features(features, tmp_path / out)
        assert (tmp_path / present).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_an_invalid_output_path_is_a_one_line_error(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = extract_features(bundle, dataset_of(2))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="could not be written"):
        write_features(features, tmp_path / "file" / "f.npy")
    with pytest.raises(UserError, match=r"f\.txt: features are written to a \.npy"):
        write_features(features, tmp_path / "f.txt")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'coatnet\[parquet\]'"):
        write_features(features, tmp_path / "f.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
