"""Atomic files and folders: whole or not there, whatever fails or whoever is killed."""

import errno
import fcntl
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from coatnet.errors import UserError
from coatnet.system.files import (
    atomic_files,
    atomic_folder,
    atomic_write,
    file_lock,
    is_leftover,
    only_process,
    open_regular,
    read_regular,
    remove_folder,
    remove_leftovers,
    temporary_path,
    translate_write_errors,
    trash_path,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_appear_when_the_block_ends(tmp_path: Path) -> None:
    first, second = tmp_path / "new" / "table.csv", tmp_path / "new" / "array.npy"
    with atomic_files(first, second) as staged:
        for file in staged:
            file.write_text(file.suffix)
        assert not first.exists() and not second.exists()
    assert (
        first.read_text() == ".csv"
        and second.read_text() == ".npy"
        and names(tmp_path / "new")
        == [
            "array.npy",
            "table.csv",
        ]
    )


def test_a_failure_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "plan.json", "old")
    with pytest.raises(RuntimeError), atomic_files(tmp_path / "plan.json") as (staged,):
        staged.write_text("half")
        raise RuntimeError
    assert (tmp_path / "plan.json").read_text() == "old" and names(tmp_path) == ["plan.json"]


def test_a_disk_that_cannot_flush_gives_no_file_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        atomic_write(tmp_path / "file", b"data")
    with pytest.raises(OSError, match="Input/output"), atomic_folder(tmp_path / "folder") as staged:
        (staged / "file").write_bytes(b"data")
    assert names(tmp_path) == []


def test_text_is_utf_8_with_the_given_error_handler(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", "caf\u00e9 \udce9", errors="backslashreplace")
    assert (tmp_path / "file").read_bytes() == "caf\u00e9 \\udce9".encode()
    with pytest.raises(UnicodeEncodeError):
        atomic_write(tmp_path / "other", "\udce9")
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "deep" / "out") as staged:
        (staged / "file").write_text("half")
        raise RuntimeError
    assert names(tmp_path / "deep") == []
    with atomic_folder(tmp_path / "deep" / "out") as staged:
        (staged / "file").write_text("whole")
    assert names(tmp_path / "deep") == ["out"] and (tmp_path / "deep/out/file").read_text() == "whole"


def test_a_folder_that_is_there_is_replaced_only_on_request(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "out", replace=True) as staged:
            (staged / "file").write_text(text)
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "out") as staged:
        (staged / "file").write_text("newer")
    assert names(tmp_path) == ["out"] and (tmp_path / "out/file").read_text() == "new"


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "link").symlink_to("models/mine")
    with atomic_folder(tmp_path / "link", replace=True) as staged:
        (staged / "file").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "models/mine/file").read_text() == "new"
    assert names(tmp_path) == ["link", "models"] and names(tmp_path / "models") == ["mine"]
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "link"):
        pass
    assert names(tmp_path / "models") == ["mine"]


def test_an_old_folder_is_put_back_if_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic_write(tmp_path / "out" / "file", "old")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.startswith(".tmp-"):
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr("coatnet.system.files._exchange", lambda one, other: False)  # as on NFS
    with (
        pytest.raises(UserError, match=r"out could not be written: No space left on device; free some$"),
        translate_write_errors(tmp_path / "out", "free some"),
        atomic_folder(tmp_path / "out", replace=True) as staged,
    ):
        (staged / "file").write_text("new")
    assert names(tmp_path) == ["out"] and (tmp_path / "out/file").read_text() == "old"


def test_leftovers_of_killed_writers_are_recognized_and_removed(tmp_path: Path) -> None:
    killed = [
        temporary_path(tmp_path / "report.json").name,
        trash_path(tmp_path / "step-000000006").name,
        # of version 0.1
        "step-000000006.tmp-0a1b2c3d",
        ".recipe.yaml.tmp-0a1b2c3d",
        ".bundle.0a1b2c3d.tmp",
        ".bundle.0a1b2c3d.old",
        "block-0.tmp",
    ]
    kept = ["step-000000006", "recipe.yaml", "tmp", "tmp-notes.txt"]
    assert [is_leftover(name) for name in killed + kept] == [True] * len(killed) + [False] * len(kept)
    for name in (*killed[::2], *kept):
        (tmp_path / name).write_text("")
    for name in killed[1::2]:
        atomic_write(tmp_path / name / "file", "")
    remove_leftovers(tmp_path, min_age_seconds=60)
    assert len(names(tmp_path)) == len(killed + kept)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_a_folder_is_removed(tmp_path: Path) -> None:
    atomic_write(tmp_path / "out" / "file", "")
    remove_folder(tmp_path / "out")
    remove_folder(tmp_path / "out")
    assert names(tmp_path) == []


def test_a_lock_is_exclusive(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock"), pytest.raises(BlockingIOError), file_lock(tmp_path / "lock", wait=False):
        pass
    with file_lock(tmp_path / "lock", wait=False):
        pass


def test_the_holder_of_a_lock_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with only_process(lock, "training in runs/a"):
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        assert lock.read_text() == holder
        with (
            pytest.raises(UserError, match=f"^{re.escape(holder)} is training in runs/a; wait for it"),
            only_process(lock, "training in runs/a"),
        ):
            pass
    assert names(tmp_path) == []
    lock.write_text("process 1 on elsewhere, killed in the middle of " + 300 * "x")  # no lock, whatever it says
    with only_process(lock, "training"):
        lock.write_text("\x1b[31m")
        with pytest.raises(UserError, match=r"^another process is training"), only_process(lock, "training"):
            pass


def test_a_lock_whose_file_was_removed_is_taken_on_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, flock = tmp_path / "lock", fcntl.flock

    def remove_and_lock(file: BinaryIO, how: int) -> None:
        """What the last holder does between the opening of the file and the lock on it."""
        monkeypatch.undo()
        lock.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with file_lock(lock), pytest.raises(BlockingIOError), file_lock(lock, wait=False):
        pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: BinaryIO, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="no lock .No locks available"), only_process(tmp_path / ".lock", "training"):
        pass


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_folders_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    atomic_write(tmp_path / "a", "a")
    with atomic_folder(tmp_path / "folder") as staged:
        (staged / "b").write_text("b")
    assert names(tmp_path) == ["a", "folder"]

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)  # files, too: nothing would be safe there
    with pytest.raises(OSError, match=os.strerror(number)):
        atomic_write(tmp_path / "c", "c")


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    leave = (
        "import os, sys; from pathlib import Path; from coatnet.system.files import *; here = Path(sys.argv[1])\n"
        "temporary_path(here / 'x.parquet').write_text(''); temporary_path(here / 'export').mkdir(); "
        "trash_path(here / 'y').mkdir(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", leave, str(tmp_path)], check=False)
    dead = names(tmp_path)
    assert len(dead) == 3
    living = temporary_path(tmp_path / "z.parquet")
    elsewhere = tmp_path / ".tmp-00000000-1-0a1b2c3d-x.parquet"  # of another machine, or of this one before a restart
    old = tmp_path / ".tmp-00000000-1-0a1b2c3e-x.parquet"
    others = tmp_path / ".tmp-0a1b2c3d-theirs"
    for path in (living, elsewhere, old, others):
        path.write_text("")
    os.utime(old, (0, 0))
    with atomic_files(tmp_path / "x.parquet") as (staged,):
        staged.write_text("")
    assert names(tmp_path) == sorted([living.name, elsewhere.name, others.name, "x.parquet"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")
def test_a_folder_that_is_replaced_is_there_at_any_moment(tmp_path: Path) -> None:
    replace = (
        "import sys; from pathlib import Path; from coatnet.system.files import atomic_folder\n"
        "for number in range(300):\n"
        "    with atomic_folder(sys.argv[1], replace=True) as staged:\n"
        "        (staged / 'number').write_text(str(number))"
    )
    target = tmp_path / "model"
    target.mkdir()
    looks, process = 0, subprocess.Popen([sys.executable, "-c", replace, str(target)])
    while process.poll() is None:
        for _ in range(1000):
            assert target.exists()
            looks += 1
    assert process.returncode == 0 and looks > 10_000 and (target / "number").read_text() == "299"
    assert names(tmp_path) == ["model"]


def test_names_as_long_as_the_system_allows_are_written(tmp_path: Path) -> None:
    target = tmp_path / (123 * "ä" + ".parquet")
    assert len(os.fsencode(target.name)) == 254
    atomic_write(target, "")
    assert names(tmp_path) == [target.name]


def test_only_regular_files_are_read_within_bounds_and_without_waiting(tmp_path: Path) -> None:
    atomic_write(tmp_path / "ten", b"0123456789")
    (tmp_path / "link").symlink_to("ten")
    assert read_regular(tmp_path / "ten", 10) == read_regular(tmp_path / "link") == b"0123456789"
    assert read_regular("/proc/self/status").startswith(b"Name:")  # its size is 0

    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)  # a hole, which takes no space
    (tmp_path / "pipe-link").symlink_to("pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
    for name, problem in {
        "pipe": "a named pipe, not a regular file",
        "pipe-link": "a named pipe",
        "zeros": "a device",
        "socket": "a socket",
        ".": "a folder",
        "huge": "more than the 64,000,000 bytes",
        "loop": "symbolic links",
        "none": "No such file",
        "a\0b": "no name of a file",
        "\ud800": "no name of a file",
    }.items():
        with pytest.raises(OSError, match=problem):
            read_regular(tmp_path / name)
    with pytest.raises(OSError, match="more than the 9 bytes"):
        read_regular(tmp_path / "ten", 9)
    with pytest.raises(OSError, match="more than the 9 bytes"):
        read_regular("/proc/self/status", 9)
    with pytest.raises(OSError, match="No such device"), open(tmp_path / "pipe", "a", opener=open_regular):
        pass  # as a log of a run would be, without a reader
