"""Batch prediction writes one row per image, in order, from every kind of source."""

import csv
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.shards.range_server import RangeServer

from coatnet.bundle import Bundle
from coatnet.data.datasets import ArrayDataset
from coatnet.data.decode import MAX_MEGAPIXELS
from coatnet.data.folder import expand_paths
from coatnet.data.shards.pack import pack
from coatnet.errors import UserError
from coatnet.inference.batch.parts import Parts, PredictionFile
from coatnet.inference.batch.run import predict_to_file
from coatnet.inference.batch.samples import SampleSource, open_samples, prepare_ahead
from coatnet.inference.predictor import Predictor

parquet = pytest.importorskip("pyarrow.parquet")


def predicted(predictor: Predictor, source: Path | str, out: Path, **settings) -> list[dict]:
    written = predict_to_file(predictor, open_samples([str(source)]), out, **settings)
    assert isinstance(written, PredictionFile)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")] == []
    rows = parquet.read_table(out).to_pylist()
    assert written.num_images == len(rows)
    assert written.num_bad == sum(row["error"] is not None for row in rows)
    return rows


def test_rows_equal_predictions_in_the_order_of_the_folder(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    rows = predicted(predictor, images, tmp_path / "new" / "out.parquet", top_k=3)
    paths = [str(path) for path, _ in expand_paths([images])]
    assert len(paths) == 151 and [str(images / row["path"]) for row in rows] == paths
    for row, prediction in zip(rows, predictor(paths, top_k=3), strict=True):
        assert row["error"] == prediction.error and row["label"] is None
        assert tuple(row["classes"]) == prediction.classes and row["top1"] == next(iter(prediction.classes), None)
        assert row["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)
        assert row["probability"] == (row["probabilities"] or [None])[0]
    reasons = {Path(row["path"]).name: row["error"].partition(":")[0] for row in rows if row["error"]}
    assert reasons == {"70.png": "truncated", "page.jpg": "format"}
    plan = json.loads(parquet.read_schema(tmp_path / "new" / "out.parquet").metadata[b"coatnet"])
    assert (plan["num_images"], plan["engine"], plan["precision"], plan["top_k"]) == (151, "torch", "fp32", 3)


def test_a_csv_has_the_rows_of_the_parquet_file(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    expected = predicted(predictor, images, tmp_path / "out.parquet", top_k=3)
    out = tmp_path / "out.csv"
    written = predict_to_file(predictor, open_samples([str(images)]), out, top_k=3)
    assert written is not None and (written.num_images, written.num_bad) == (151, 2)
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(expected[0])
    for row, other in zip(rows, expected, strict=True):
        for name in ("classes", "probabilities"):
            assert json.loads(row.pop(name)) == pytest.approx(other.pop(name))
        assert float(row.pop("probability") or "nan") == pytest.approx(
            other.pop("probability") or math.nan, nan_ok=True
        )
        read = {"": None, "false": False, "true": True}
        assert {name: read.get(value, value) for name, value in row.items()} == other
    before = out.stat().st_mtime_ns
    assert predict_to_file(predictor, open_samples([str(images)]), out, top_k=3) == written  # read, not computed again
    assert out.stat().st_mtime_ns == before
    assert sorted(path.name for path in (tmp_path / ".out.csv.parts").iterdir()) == ["joined.sha256", "plan.json"]
    with pytest.raises(UserError, match="made with top k 3 where this has 2"):
        predict_to_file(predictor, open_samples([str(images)]), out, top_k=2)
    out.write_text("path,label\n")
    with pytest.raises(UserError, match="not made by this program or changed"):
        predict_to_file(predictor, open_samples([str(images)]), out, top_k=3)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_rows_do_not_depend_on_the_batch_size(
    predictor: Predictor, images: Path, tmp_path: Path, batch_size: int
) -> None:
    rows = predicted(predictor, images, tmp_path / "a.parquet")
    others = predicted(predictor, images, tmp_path / "b.parquet", batch_size=batch_size)
    for row, other in zip(rows, others, strict=True):
        assert row.pop("probability") == pytest.approx(other.pop("probability"), abs=1e-5)
        assert row.pop("probabilities") == pytest.approx(other.pop("probabilities"), abs=1e-5)
        assert row == other


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_follow_a_manifest_and_carry_its_labels(
    predictor: Predictor, images: Path, tmp_path: Path, suffix: str
) -> None:
    shutil.copytree(images, tmp_path / "in")
    cells = [("cat/2.png", "cat", "val"), ("0.png", "", "test"), ("gone.png", "bee;cat", "train"), ("0.png", "x", "")]
    manifest = tmp_path / "in" / f"table{suffix}"
    if suffix == ".csv":
        manifest.write_text("path,label,split\n" + "".join(",".join(row) + "\n" for row in cells))
    else:
        import pyarrow

        columns = dict(zip(("path", "label", "split"), map(list, zip(*cells, strict=True)), strict=True))
        parquet.write_table(pyarrow.table(columns), manifest)
    rows = predicted(predictor, manifest, tmp_path / "out.parquet")
    assert [Path(row["path"]).name for row in rows] == ["2.png", "0.png", "gone.png", "0.png"]
    assert [row["label"] for row in rows] == ["cat", None, "bee;cat", "x"]
    assert [row["error"] is None for row in rows] == [True, True, False, True]
    assert rows[1]["probabilities"] == rows[3]["probabilities"]


def test_a_manifest_needs_no_labels(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "in")
    (tmp_path / "in" / "list.tsv").write_text("path\n0.png\ncat/2.png\n")
    rows = predicted(predictor, tmp_path / "in" / "list.tsv", tmp_path / "out.parquet")
    assert len(rows) == 2 and all(row["label"] is row["error"] is None for row in rows)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that come with the package, 1,797 of them, in several shards."""
    folder = tmp_path_factory.mktemp("packed") / "digits"
    pack("digits", folder, shard_bytes=300_000, num_workers=1)
    return folder


@pytest.mark.slow
def test_shards_are_read_in_order_from_disk_and_from_a_url(
    predictor: Predictor, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="fsspec needs it for http://")
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rows = predicted(predictor, packed, tmp_path / "here.parquet")
    assert len(rows) == len({row["path"] for row in rows}) == 1797
    assert all(row["error"] is None and row["label"] in "0123456789" for row in rows)
    shards = [row["path"].partition(".tar/")[0] for row in rows]
    assert len(set(shards)) > 3 and sum(a != b for a, b in pairwise(shards)) == len(set(shards)) - 1  # one by one
    with RangeServer(packed) as server:
        others = predicted(predictor, server.url, tmp_path / "there.parquet")
        blocks = server.ranges(".tar")
    assert len(blocks) == len(set(blocks))  # each once
    for row, other in zip(rows, others, strict=True):
        assert other.pop("path").removeprefix(server.url) == row.pop("path").removeprefix(str(packed))
        assert other == row


def test_builtin_data_and_several_paths_are_accepted(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    assert len(predicted(predictor, "digits", tmp_path / "digits.parquet")) == 1797
    both = open_samples([str(images / "bee"), str(images / "0.png")])
    assert len(both) == 51 and both.read(50).name == "0.png"
    with pytest.raises(UserError, match="alone"):
        open_samples([str(images), "digits"])


@pytest.mark.parametrize("name", ["nowhere", "nowhere.csv", "empty"])
def test_missing_data_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        open_samples([str(tmp_path / name)])


def test_a_complete_file_is_kept_and_reported_again(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    predicted(predictor, images, out)
    before = out.stat()
    again = predict_to_file(predictor, open_samples([str(images)]), out)
    assert again is not None and again.num_bad == 2 and {Path(name).name for name, _ in again.bad} >= {"page.jpg"}
    assert out.stat() == before


def test_an_existing_other_file_is_kept_and_refused(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    data = open_samples([str(images)])
    out.write_text("mine")
    with pytest.raises(UserError, match="is not a file of predictions"):
        predict_to_file(predictor, data, out)
    assert out.read_text() == "mine"
    out.unlink()
    predict_to_file(predictor, data, out, top_k=2)
    with pytest.raises(UserError, match="made with top k 2 where this has 1"):
        predict_to_file(predictor, data, out, top_k=1)
    with pytest.raises(UserError, match="made with other images"):
        predict_to_file(predictor, open_samples([str(images / "bee")]), out, top_k=2)
    with pytest.raises(UserError, match=r"made with views one where this has flip \(--views one is the same\); give"):
        predict_to_file(Predictor(predictor.bundle, "torch", "fp32", views="flip"), data, out, top_k=2)
    with pytest.raises(UserError, match=r"\.parquet"):
        predict_to_file(predictor, data, tmp_path / "out.xlsx")


def test_parts_of_another_plan_are_refused(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    staged = tmp_path / ".out.parquet.parts"
    staged.mkdir()
    plan = {"model": "another"}
    (staged / "plan.json").write_text(json.dumps(plan))
    (staged / "part-000000.parquet").write_bytes(b"rows")  # a plan of which nothing was computed would give way
    with pytest.raises(UserError, match="begun with another model"):
        predict_to_file(predictor, open_samples([str(images)]), tmp_path / "out.parquet")
    assert json.loads((staged / "plan.json").read_text()) == plan


def test_another_version_is_told_from_another_model(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, out = open_samples([str(images)]), tmp_path / "out.parquet"
    with monkeypatch.context() as stopped:
        stopped.setattr(Parts, "join_if_complete", lambda parts: None)
        assert predict_to_file(predictor, samples, out) is None
    with monkeypatch.context() as upgraded:
        upgraded.setattr(torch, "__version__", "9.9")
        with pytest.raises(UserError, match=r"was begun with coatnet \S+ and torch \S+ where this has .* torch 9\.9: "):
            predict_to_file(predictor, samples, out)
    written = predict_to_file(predictor, samples, out)
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert written is not None and predict_to_file(predictor, samples, out) == written  # finished, of one version


def test_another_limit_of_pixels_is_another_file(
    predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, out = open_samples([str(images)]), tmp_path / "out.parquet"
    monkeypatch.setenv(MAX_MEGAPIXELS, "0.001")
    small = predict_to_file(predictor, samples, out)
    assert small is not None and small.num_bad > 2 and any(error.startswith("large: ") for _, error in small.bad)
    monkeypatch.delenv(MAX_MEGAPIXELS)
    with pytest.raises(UserError, match=r"made with max megapixels 0\.001 where this has 200\.0"):
        predict_to_file(predictor, samples, out)
    begun = tmp_path / "begun.parquet"
    with monkeypatch.context() as stopped:
        stopped.setattr(Parts, "join_if_complete", lambda parts: None)
        assert predict_to_file(predictor, samples, begun) is None
    monkeypatch.setenv(MAX_MEGAPIXELS, "0.001")
    with pytest.raises(UserError, match=r"was begun with max megapixels 200\.0 where this has 0\.001"):
        predict_to_file(predictor, samples, begun)


def test_batches_are_as_large_as_they_are_asked_for(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = SampleSource([ArrayDataset("black", ("a", "b"), np.zeros((300, 8, 8), np.uint8), np.zeros(300, int))])
    run, sizes = predictor.engine.run, []
    monkeypatch.setattr(predictor.engine, "run", lambda images: (sizes.append(len(images)), run(images))[1])
    assert predict_to_file(predictor, samples, tmp_path / "out.parquet", batch_size=128) is not None
    assert sizes == [128, 128, 44]


@pytest.mark.parametrize("name", ["out.parquet", "out.csv"])
def test_corrected_labels_are_not_those_of_a_finished_file(
    predictor: Predictor, images: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(images, tmp_path / "in")
    manifest, out = tmp_path / "in" / "table.csv", tmp_path / name

    def predict(first: str, second: str) -> PredictionFile | None:
        manifest.write_text(f"path,label\n0.png,{first}\ncat/2.png,{second}\n")
        return predict_to_file(predictor, open_samples([str(manifest)]), out)

    written = predict("ant", "bee")
    assert predict("ant", "bee") == written
    for corrected in (("ant", "ant"), ("bee", "ant"), ("ant", "cat"), ("ant", "")):
        with pytest.raises(UserError, match="made with other images or labels"):
            predict(*corrected)


def test_labels_between_bars_are_joined_by_semicolons(predictor: Predictor, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "in")
    manifest = tmp_path / "in" / "table.csv"
    manifest.write_text("path,label\n0.png,bee|cat\ncat/2.png,bee;cat\n0.png,bee | cat\n")
    rows = predicted(predictor, manifest, tmp_path / "out.parquet")
    assert [row["label"] for row in rows] == ["bee;cat"] * 3


@pytest.mark.parametrize("name", ["out.parquet", "out.csv"])
def test_class_names_that_utf_8_cannot_encode_are_escaped(
    predictor: Predictor, images: Path, tmp_path: Path, name: str
) -> None:
    classes = ("ant", "bee", "c\udc80", "dog")
    bundle = Bundle(predictor.bundle.model, classes, predictor.bundle.preprocessing)
    samples = SampleSource([ArrayDataset("one", classes, np.zeros((1, 8, 8), np.uint8), np.array([2]))])
    assert predict_to_file(Predictor(bundle, "torch", "fp32"), samples, tmp_path / name) is not None
    if name == "out.csv":
        (row,) = csv.DictReader((tmp_path / name).read_text(encoding="utf-8").splitlines())
        found = json.loads(row["classes"])
    else:
        (row,) = parquet.read_table(tmp_path / name).to_pylist()
        found = row["classes"]
    assert row["label"] == r"c\udc80" and sorted(found) == ["ant", "bee", r"c\udc80", "dog"]


def test_prepared_images_in_memory_are_limited(predictor: Predictor) -> None:
    pixels = np.zeros((500, 8, 8), np.uint8)
    samples = SampleSource([ArrayDataset("black", ("a", "b"), pixels, np.zeros(500, int))])
    taken: list[int] = []
    original = samples.read
    samples.read = lambda index: (taken.append(index), original(index))[1]  # type: ignore[method-assign]
    stream = prepare_ahead(predictor, samples, range(500), max_held=10)
    for number in range(1, 100):
        assert next(stream).views is not None
        assert len(taken) <= number + 10
    stream.close()
    assert len(taken) < 120
