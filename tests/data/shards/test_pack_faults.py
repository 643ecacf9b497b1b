"""An interrupted packing leaves no half-written folder and continues without repeating finished shards."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import coatnet
from coatnet.data.datasets import FileDataset
from coatnet.data.open import open_dataset
from coatnet.data.shards.pack import pack
from coatnet.data.splits import Splits
from coatnet.errors import UserError
from coatnet.system.files import file_lock

PROGRAM = [sys.executable, "-m", "coatnet"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(coatnet.__file__).parents[1])}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def slow_folder(make_folder, encode) -> Path:
    """60 images that take some 10 ms each to decode."""
    root = make_folder({"train/cat": 1, "train/dog": 1, "val/cat": 2})
    pixels = np.random.default_rng(0).integers(0, 256, (420, 420, 3), dtype=np.uint8)
    for number in range(58):
        pixels[0, 0, 0] = number
        (root / f"train/{'cat' if number % 2 else 'dog'}/slow{number}.png").write_bytes(encode(pixels))
    return root


def start_packing(root: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [*PROGRAM, "pack", str(root), str(out), "--shard-size", "2MB", *options]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def processes_of(parent: int) -> list[int]:
    """All processes that descend from one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found = [parent]
    for process in found:
        found += [child for child, above in parents.items() if above == process]
    return found[1:]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_packing_is_not_opened_and_continues_to_the_same_bytes(slow_folder, tmp_path):
    out, staged = tmp_path / "packed", tmp_path / ".packed.packing"
    process = start_packing(slow_folder, out, "--workers", "2")
    deadline = time.monotonic() + 60
    while len(list(staged.glob(".packing/[!.]*.tar.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = processes_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists() and len(workers) >= 2
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, workers))
    with pytest.raises(UserError, match="packing was not finished; the same `coatnet pack` command continues it"):
        open_dataset(staged)

    finished = [staged / path.name.removesuffix(".json") for path in staged.glob(".packing/[!.]*.tar.json")]
    kept, harmed = finished[0], finished[1]
    harmed.write_bytes(harmed.read_bytes()[:-600] + b"x" * 600)
    written = kept.stat().st_mtime_ns
    pack(slow_folder, out, shard_bytes=2_000_000, num_workers=1)
    assert (out / kept.name).stat().st_mtime_ns == written
    pack(slow_folder, tmp_path / "at once", shard_bytes=2_000_000, num_workers=1)
    assert files_of(out) == files_of(tmp_path / "at once")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at once", "images", "packed"]


def test_shards_of_another_packing_are_not_used(make_folder, tmp_path):
    root = make_folder({"cat": 20, "dog": 20})
    staged = tmp_path / ".packed.packing"
    pack(root, tmp_path / "old", num_workers=1)
    (tmp_path / "old").rename(staged)
    (staged / ".packing").mkdir()
    (staged / ".packing/plan.json").write_text('{"pieces": [1]}')
    (staged / "train-000099.tar").write_text("left over")
    pack(root, tmp_path / "packed", shard_bytes=20_000, num_workers=1)
    pack(root, tmp_path / "fresh", shard_bytes=20_000, num_workers=1)
    assert files_of(tmp_path / "packed") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("change", ["an image", "the limit"])
def test_shards_of_images_that_were_replaced_meanwhile_are_not_used(change, make_folder, encode, tmp_path, monkeypatch):
    root = make_folder({"a": 20, "b": 20, "held out": 6})
    (root / "a/0.png").write_bytes(encode(np.zeros((50, 50, 3), np.uint8)))

    class Interrupted(FileDataset):
        reads = 0

        def read(self, index):
            Interrupted.reads += 1
            if Interrupted.reads > 6:  # when their size has been measured, and the other shards are written
                raise KeyboardInterrupt
            return super().read(index)

    paths = [f"{name}/{number}.png" for name in "ab" for number in range(20)]
    training = FileDataset("some", ("a", "b"), root, paths, np.repeat([0, 1], 20))
    paths = [f"held out/{number}.png" for number in range(6)]
    parts = [kind("some", ("a", "b"), root, paths, np.arange(6) % 2) for kind in (Interrupted, FileDataset)]
    with pytest.raises(KeyboardInterrupt):
        pack(Splits("some", training, parts[0]), tmp_path / "packed", num_workers=1)
    assert list(tmp_path.glob(".packed.packing/train-*.tar"))
    if change == "an image":
        (root / "b/3.png").write_bytes(encode(np.full((12, 16, 3), 200, np.uint8)))
    else:
        monkeypatch.setenv("COATNET_MAX_MEGAPIXELS", "0.001")
    for name in ("packed", "fresh"):
        pack(Splits("some", training, parts[1]), tmp_path / name, num_workers=1)
    assert files_of(tmp_path / "packed") == files_of(tmp_path / "fresh")


def test_a_folder_that_another_process_packs_meanwhile_is_found_before_the_work(make_folder, tmp_path):
    root = make_folder({"a": 4, "b": 4})
    read = []

    class Late(FileDataset):
        def read(self, index):
            read.append(index)
            (tmp_path / "packed/done").mkdir(parents=True, exist_ok=True)
            return super().read(index)

    paths = [f"{name}/{number}.png" for name in "ab" for number in range(4)]
    part = Late("some", ("a", "b"), root, paths, np.repeat([0, 1], 4))
    with pytest.raises(UserError, match="packed exists already; give a new folder"):
        pack(Splits("some", part, part), tmp_path / "packed", num_workers=1)
    assert len(read) == 16  # to measure their size, of both splits


def test_two_packings_into_one_folder_do_not_mix(make_folder, tmp_path):
    work = tmp_path / ".packed.packing/.packing"
    work.mkdir(parents=True)
    with file_lock(work / "lock"), pytest.raises(UserError, match="another process is packing"):
        pack(make_folder({"cat": 4, "dog": 4}), tmp_path / "packed", num_workers=1)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_same_command_continues(slow_folder, tmp_path):
    out = tmp_path / "packed"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    command = [*PROGRAM, "pack", str(slow_folder), str(out), "--shard-size", "2MB", "--workers", "1"]
    full = subprocess.run(command, env=ENVIRONMENT, preexec_fn=limit, capture_output=True, text=True, timeout=60)
    assert full.returncode == 2 and full.stdout == ""
    assert full.stderr.startswith(
        f"coatnet: error: {out} could not be written: File too large; finished shards are kept"
    )
    assert full.stderr.count("\n") == 1 and not out.exists()
    pack(slow_folder, out, shard_bytes=2_000_000, num_workers=1)
    assert len(open_dataset(out).training) == 60


def test_too_little_space_is_reported_before_the_work(make_folder, tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match=r"packed needs about 0\.0 GB, of which 0\.0 GB are free"):
        pack(make_folder({"cat": 9, "dog": 9}), tmp_path / "packed", num_workers=1)
