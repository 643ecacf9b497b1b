"""The cache of blocks is bounded, evicts the least recently used block, and fetches each block once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.data.shards.mounts import run_with_mount

import coatnet
from coatnet.data.shards.storage import BlockCache, default_cache, parse_bytes
from coatnet.errors import UserError
from coatnet.system.files import file_lock

SOURCE = str(Path(coatnet.__file__).parents[1])


def contents(cache: BlockCache, name: str, num_bytes: int, fetch=None) -> bytes:
    descriptor = cache.open(name, num_bytes, fetch or (lambda: name.encode() * (num_bytes // len(name))))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def blocks(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def never() -> bytes:
    raise AssertionError("fetched again")


def test_a_block_is_fetched_once_and_then_read(tmp_path):
    cache = BlockCache(tmp_path / "cache", 1000)
    assert contents(cache, "ab", 100) == b"ab" * 50
    assert contents(cache, "ab", 100, never) == b"ab" * 50
    assert contents(BlockCache(tmp_path / "cache", 1000), "ab", 100, never) == b"ab" * 50


def test_the_least_recently_used_block_goes_first(tmp_path):
    cache = BlockCache(tmp_path, 300)
    for name in ("a", "b", "c"):
        contents(cache, name, 100)
        time.sleep(0.01)
    contents(cache, "a", 100, never)
    time.sleep(0.01)
    contents(cache, "d", 100)
    assert blocks(tmp_path) == {"a": 100, "c": 100, "d": 100}
    contents(cache, "e", 250)
    assert blocks(tmp_path) == {"e": 250}


def test_an_evicted_block_stays_readable_while_it_is_open(tmp_path):
    cache = BlockCache(tmp_path, 100)
    descriptor = cache.open("a", 100, lambda: b"a" * 100)
    contents(cache, "b", 100)
    assert blocks(tmp_path) == {"b": 100}
    assert os.pread(descriptor, 100, 0) == b"a" * 100
    os.close(descriptor)


def test_a_block_over_the_limit_is_refused(tmp_path):
    with pytest.raises(UserError, match="is over COATNET_CACHE_SIZE"):
        contents(BlockCache(tmp_path, 99), "a", 100)
    assert not any(tmp_path.iterdir())


def test_a_block_that_is_not_whole_is_fetched_again(tmp_path):
    cache = BlockCache(tmp_path, 1000)
    contents(cache, "a", 100)
    os.truncate(tmp_path / "a", 40)
    assert contents(cache, "a", 100) == b"a" * 100


def test_files_of_killed_writers_are_removed(tmp_path):
    cache = BlockCache(tmp_path, 1000)
    contents(cache, "a", 100)
    (tmp_path / "b.tmp").write_bytes(b"x" * 900)
    contents(cache, "c", 100)
    assert blocks(tmp_path) == {"a": 100, "c": 100}


def test_a_fetch_that_fails_leaves_nothing(tmp_path):
    cache = BlockCache(tmp_path, 1000)

    def fail() -> bytes:
        raise UserError("the line is down")

    with pytest.raises(UserError, match="the line is down"):
        contents(cache, "a", 100, fail)
    assert blocks(tmp_path) == {}
    assert contents(cache, "a", 100) == b"a" * 100


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="COATNET_CACHE_DIR names another folder") as caught:
        contents(BlockCache(tmp_path / "file", 1000), "a", 100)
    assert "\n" not in str(caught.value)


FULL_DISK = """
import os, sys
from contextlib import suppress
from pathlib import Path
from coatnet.data.shards.storage import BlockCache
disk = Path(sys.argv[1])
cache = BlockCache(disk / "cache", 10_000_000)
def read(name):
    descriptor = cache.open(name, 100_000, lambda: name.encode() * 20_000)
    assert os.pread(descriptor, 100_001, 0) == name.encode() * 20_000, name
    os.close(descriptor)
def kept():
    return [path for path in sorted(cache.folder.iterdir()) if path.is_file()]
for number in range(9):
    read(f"bloc{number}")
print(*(path.name for path in kept()))
for path in kept():
    path.unlink()
with suppress(OSError):
    (disk / "others").write_bytes(bytes(1_000_000))
read("more1")
read("more2")
print(len(kept()))
"""


def test_a_full_disk_keeps_fewer_blocks_and_ends_no_reading(tmp_path):
    done = run_with_mount(tmp_path / "disk", FULL_DISK, size="450k")
    assert (done.returncode, done.stdout) == (0, "bloc5 bloc6 bloc7 bloc8\n0\n"), done.stderr
    assert done.stderr.count("\n") == 1 and "the disk has no room for a block" in done.stderr


READ_ONLY = """
import os, subprocess, sys
from pathlib import Path
from coatnet.data.shards.storage import BlockCache
cache = BlockCache(Path(sys.argv[1]), 1000)
os.close(cache.open("a", 100, lambda: b"a" * 100))
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
descriptor = cache.open("a", 100, lambda: sys.exit("fetched again"))
assert os.pread(descriptor, 101, 0) == b"a" * 100
"""


def test_a_read_only_cache_is_read(tmp_path):
    done = run_with_mount(tmp_path / "disk", READ_ONLY)
    assert (done.returncode, done.stderr) == (0, "")


READER = """
import os, random, sys, time
from pathlib import Path
from coatnet.data.shards.storage import BlockCache
folder, log, limit, seed, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
cache = BlockCache(folder, limit)
names = [f"block{number:03d}" for number in range(30)] * rounds
random.Random(seed).shuffle(names)
def fetch(name):
    with open(log, "a") as file:
        file.write(name + "\\n")
    time.sleep(0.002)
    return name.encode() * 1000
for name in names:
    descriptor = cache.open(name, 8000, lambda: fetch(name))
    assert os.pread(descriptor, 8000, 0) == name.encode() * 1000, name
    os.close(descriptor)
"""


def readers(tmp_path: Path, limit: int, rounds: int, count: int = 3) -> list[subprocess.Popen]:
    arguments = [str(tmp_path / "cache"), str(tmp_path / "log"), str(limit)]
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    return [
        subprocess.Popen([sys.executable, "-c", READER, *arguments, str(seed), str(rounds)], env=environment)
        for seed in range(count)
    ]


@pytest.mark.slow
def test_processes_that_share_a_cache_fetch_each_block_once(tmp_path):
    processes = readers(tmp_path, limit=1_000_000, rounds=3)
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == [f"block{number:03d}" for number in range(30)]


@pytest.mark.slow
def test_a_small_cache_of_several_processes_stays_within_its_limit(tmp_path):
    processes = readers(tmp_path, limit=80_000, rounds=10)
    seen = []
    lock = tmp_path / "cache" / "locks" / "eviction"
    while any(process.poll() is None for process in processes):
        if lock.exists():
            with file_lock(lock):  # or a scan meets both what goes and what comes in its place
                seen.append(sum(blocks(tmp_path / "cache").values()))
        time.sleep(0.005)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert 0 < max(seen) <= 80_000
    assert len((tmp_path / "log").read_text().split()) > 60


def test_a_process_killed_while_it_fetches_does_not_stop_the_others(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom coatnet.data.shards.storage import BlockCache\n"
        "def fetch():\n    print('fetching', flush=True)\n    time.sleep(600)\n"
        "BlockCache(Path(sys.argv[1]), 1000).open('a', 100, fetch)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], env={**os.environ, "PYTHONPATH": SOURCE}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"fetching\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert contents(BlockCache(tmp_path, 1000), "a", 100) == b"a" * 100


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("256MB", 256_000_000), ("1.5 gb", 1_500_000_000), ("12", 12), ("3K", 3000), ("2T", 2 * 10**12)],
)
def test_sizes_with_units_are_parsed(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MB", "1.2.3MB", "-5", "0", "12 apples", "1e9"])
def test_a_text_that_is_not_a_size_is_refused(text):
    with pytest.raises(UserError, match="write it as 256MB or 2GB"):
        parse_bytes(text)


def test_environment_variables_set_folder_and_size(tmp_path, monkeypatch):
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("COATNET_CACHE_SIZE", "2GB")
    cache = default_cache()
    assert (cache.folder, cache.max_bytes) == (tmp_path / "blocks", 2 * 10**9)
    monkeypatch.delenv("COATNET_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert default_cache().folder == tmp_path / "other" / "coatnet" / "blocks"
