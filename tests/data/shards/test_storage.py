"""Shards behind a URL equal the folder they come from, each block is fetched once, and faults are one line."""

import itertools
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.loaders import train
from tests.data.shards.range_server import RangeServer

import coatnet
from coatnet.data.open import open_dataset
from coatnet.data.shards.pack import pack
from coatnet.errors import UserError

pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def packed(tmp_path_factory, encode) -> Path:
    """80 images in two classes, in shards of some 20 KB."""
    root = tmp_path_factory.mktemp("remote")
    for number in range(80):
        path = root / "images" / ("cat" if number % 3 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)))
    pack(root / "images", root / "packed", shard_bytes=20_000, num_workers=1)
    return root / "packed"


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, blocks of four or five images, and no proxy."""
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("coatnet.data.shards.dataset.BLOCK_BYTES", 12_000)
    monkeypatch.setattr("coatnet.data.shards.storage._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("coatnet.data.shards.storage._LAST_PAUSE", 0.02)
    return tmp_path / "cache" / "blocks"


@pytest.fixture
def server(packed, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec needs it for http://")
    with RangeServer(Path(shutil.copytree(packed, tmp_path / "served"))) as running:
        yield running


def everything(dataset) -> list[tuple[bytes, int]]:
    return [(data, int(label)) for data, label in (dataset.read(index) for index in range(len(dataset)))]


def one_line(source) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal(remote, local) -> None:
    assert remote.classes == local.classes and remote.name == local.name
    for one, other in ((remote.training, local.training), (remote.validation, local.validation)):
        assert everything(one) == everything(other)
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.sampler(3).indices(np.arange(50)), other.sampler(3).indices(np.arange(50)))


@pytest.mark.parametrize("suffix", ["", "/", "/coatnet-shards.json"])
def test_a_url_equals_the_folder_behind_it(server, packed, suffix):
    assert_equal(open_dataset(server.url + suffix), open_dataset(packed))


@pytest.mark.parametrize("suffix", ["", "/", "/coatnet-shards.json"])
def test_what_a_url_was_given_with_goes_with_every_request(server, suffix):
    dataset = open_dataset(f"{server.url}{suffix}?sig=planted").training
    dataset.read(0)
    assert len(server.log) > 3 and all(path.endswith("?sig=planted") for _, path, _ in server.log)


def test_other_file_systems_of_fsspec_work(packed):
    assert_equal(open_dataset(f"file://{packed}"), open_dataset(packed))


def test_opening_fetches_no_images_and_no_tables_of_samples(server):
    splits = open_dataset(server.url)
    assert len(splits.training) == sum(splits.training.class_counts)
    assert not server.ranges(".tar") and not [path for path, _ in server.ranges(".npy") if "shards" not in path]


def test_reading_one_image_fetches_one_block(server):
    dataset = open_dataset(server.url).training
    dataset.read(0)
    ((path, given),) = server.ranges(".tar")
    first, last = map(int, given.split("-"))
    assert path == "/train-000000.tar" and last - first < 14_000
    for index in range(dataset.block_size):
        dataset.read(index)
    assert len(server.ranges(".tar")) == 1


def test_an_epoch_fetches_every_byte_of_every_image_once(server):
    dataset = open_dataset(server.url).training
    for index in dataset.sampler(5).indices(np.arange(len(dataset))).tolist():
        dataset.read(index)
    ranges = server.ranges(".tar")
    assert len(ranges) == len(set(ranges))
    for shard in range(len(dataset.table)):
        name = f"/{dataset.shard_name(shard)}"
        edges = sorted(tuple(map(int, given.split("-"))) for path, given in ranges if path == name)
        assert all(last < first for (_, last), (first, _) in itertools.pairwise(edges))


READER = """
import sys, pickle
import numpy as np
dataset, seed = pickle.loads(sys.stdin.buffer.read())
for index in dataset.sampler(seed).indices(np.arange(len(dataset))).tolist():
    data, _ = dataset.read(index)
    assert data.startswith(b"\\x89PNG") and data.endswith(b"IEND\\xaeB`\\x82")
"""


def read_in_processes(dataset, seeds) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(coatnet.__file__).parents[1])}
    readers = [subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, env=environment) for _ in seeds]
    for reader, seed in zip(readers, seeds, strict=True):
        assert reader.stdin is not None
        reader.stdin.write(pickle.dumps((dataset, seed)))
        reader.stdin.close()
    assert [reader.wait(60) for reader in readers] == [0] * len(readers)


@pytest.mark.slow
def test_two_processes_that_share_a_cache_fetch_each_block_once(server):
    read_in_processes(open_dataset(server.url).training, (1, 2))
    ranges = server.ranges(".tar")
    assert len(ranges) == len(set(ranges)) > 20


@pytest.mark.slow
def test_a_small_cache_stays_within_its_limit_and_reads_are_right(server, surroundings, monkeypatch):
    monkeypatch.setenv("COATNET_CACHE_SIZE", "40KB")
    read_in_processes(open_dataset(server.url).training, (1, 2))
    assert sum(path.stat().st_size for path in surroundings.iterdir() if path.is_file()) <= 40_000
    assert len(server.ranges(".tar")) > len(set(server.ranges(".tar")))


def test_training_batches_equal_those_of_the_folder(server, packed):
    for batch, other in zip(
        train(open_dataset(server.url).training, num_workers=2), train(open_dataset(packed).training), strict=True
    ):
        assert all(torch.equal(one, another) for one, another in zip(batch, other, strict=True))


def test_another_version_behind_the_same_url_is_not_read_from_the_cache(server, make_folder):
    open_dataset(server.url).training.read(0)
    shutil.rmtree(server.folder)
    pack(make_folder({"cat": 60, "dog": 60}), server.folder, shard_bytes=20_000, num_workers=1)
    assert_equal(open_dataset(server.url), open_dataset(server.folder))


def test_requests_that_fail_are_repeated(server):
    dataset = open_dataset(server.url).training
    server.failures = 2
    assert dataset.read(0)[0].startswith(b"\x89PNG")


def test_a_server_that_keeps_failing_is_one_line(server, surroundings):
    dataset = open_dataset(server.url).training
    server.failures = 1000
    with pytest.raises(UserError, match=r"train-000000.npy: cannot be fetched, after several attempts: 503") as caught:
        dataset.read(0)
    assert "\n" not in str(caught.value)
    assert not [path for path in surroundings.iterdir() if path.is_file()]
    server.failures = 0
    assert dataset.read(0)[0].startswith(b"\x89PNG")


def test_a_server_that_is_down_is_one_line(packed):
    pytest.importorskip("aiohttp")
    with RangeServer(packed) as server:
        url = server.url
    assert f"{url}/coatnet-shards.json: cannot be fetched" in one_line(url)


def test_a_server_that_ignores_range_requests_is_one_line(server):
    dataset = open_dataset(server.url).training
    server.ignores_ranges = True
    with pytest.raises(UserError, match="ignores range requests and sends whole files"):
        dataset.read(0)


def test_a_run_whose_server_fails_ends_in_one_line(server):
    dataset = open_dataset(server.url).training
    server.ignores_ranges = True
    with pytest.raises(UserError, match=r"ignores range requests.*supports them$") as caught:
        train(dataset, num_workers=1)
    assert "\n" not in str(caught.value)


def test_a_truncated_shard_behind_a_url_is_found_at_open(server):
    os.truncate(server.folder / "train-000001.tar", 1000)
    assert f"{server.url}/train-000001.tar: truncated, it has 1,000 bytes" in one_line(server.url)
    (server.folder / "train-000001.tar").unlink()
    assert f"{server.url}/train-000001.tar: missing" in one_line(server.url)


def test_a_table_behind_a_url_that_does_not_belong_is_named_and_not_kept(server):
    dataset = open_dataset(server.url).training
    table = server.folder / "train-000000.npy"
    right = table.read_bytes()
    table.write_bytes(right[:-1] + b"?")
    with pytest.raises(UserError, match=r"train-000000.npy: its checksum differs"):
        dataset.read(0)
    table.write_bytes(right)
    assert dataset.read(0)[0].startswith(b"\x89PNG")


def test_verifying_reads_a_url_too(server):
    dataset = open_dataset(server.url).training
    assert sum(dataset.verify()) == dataset.table["num_bytes"].sum()
    path = server.folder / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:-3000] + bytes(3000))
    with pytest.raises(UserError, match=r"train-000002.tar: changed"):
        list(dataset.verify())


def test_tars_of_another_program_behind_a_url(server, packed):
    for path in server.folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    remote, local = open_dataset(server.url), open_dataset(packed)
    assert everything(remote.training) == everything(local.training)


def test_tables_of_many_shards_are_checked(packed, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "copy")
    pack(tmp_path / "copy", tmp_path / "many", shard_bytes=4_000, num_workers=1)
    assert len(open_dataset(f"file://{tmp_path}/many").training.table) > 16
    (tmp_path / "many/train-000005.tar").unlink()
    assert f"file://{tmp_path}/many/train-000005.tar: missing" in one_line(f"file://{tmp_path}/many")
    assert copy


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert "pip install 'coatnet[shards]'" in one_line("s3://bucket/packed")


@pytest.mark.parametrize("url", ["nothing://bucket/packed", "file:///nowhere/at/all"])
def test_a_url_that_leads_nowhere_is_one_line(url):
    assert url in one_line(url)
