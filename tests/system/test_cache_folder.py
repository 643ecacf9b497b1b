"""One cache folder for all: what it keeps is checked, and it need not be writable."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from coatnet.errors import UserError
from coatnet.system.cache import CHECKSUMS, CacheUnusable, _temporary_folder, cache_folder, cached_folder, is_whole


def test_the_variables_name_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home-of-a-user")
    monkeypatch.delenv("COATNET_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home-of-a-user/.cache/coatnet")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_folder() == Path("/shared/coatnet")
    monkeypatch.setenv("COATNET_CACHE_DIR", "/own")
    assert cache_folder() == Path("/own")


def test_without_a_home_the_variables_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("COATNET_CACHE_DIR", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("COATNET_CACHE_DIR")
    with pytest.raises(UserError, match="set COATNET_CACHE_DIR"):
        cache_folder()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _temporary_folder.cache_clear()
    yield tmp_path / "cache"
    _temporary_folder.cache_clear()


def write_two(folder: Path) -> None:
    (folder / "a").write_bytes(b"12345678")
    (folder / "below").mkdir()
    (folder / "below" / "b").write_bytes(bytes(100))


def never(folder: Path) -> None:
    raise AssertionError("it is made again")


def test_what_is_kept_is_made_once(cache: Path) -> None:
    folder = cached_folder("things", "key", write_two)
    assert folder == cache / "things" / "key" and cached_folder("things", "key", never) == folder


DAMAGES = {
    "emptied": lambda folder, name: (folder / name).write_bytes(b""),
    "cut": lambda folder, name: (folder / name).write_bytes((folder / name).read_bytes()[:5]),
    "garbage": lambda folder, name: (folder / name).write_bytes(b"\xff" * (folder / name).stat().st_size),
    "gone": lambda folder, name: (folder / name).unlink(),
    "a folder": lambda folder, name: ((folder / name).unlink(), (folder / name).mkdir()),
    "a FIFO": lambda folder, name: ((folder / name).unlink(), os.mkfifo(folder / name)),
    "a foreign file beside it": lambda folder, name: (folder / "more").write_bytes(b"?"),
    "the folder gone": lambda folder, name: shutil.rmtree(folder),
    "a file in place of the folder": lambda folder, name: (shutil.rmtree(folder), folder.touch()),
    "of a version without checksums": lambda folder, name: (folder / CHECKSUMS).unlink(),
}


@pytest.mark.parametrize("name", ["a", "below/b", CHECKSUMS])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_again(cache: Path, damage: str, name: str) -> None:
    folder = cached_folder("things", "key", write_two)
    DAMAGES[damage](folder, name)
    assert not is_whole(folder)
    assert cached_folder("things", "key", write_two) == folder and is_whole(folder)
    assert (folder / "a").read_bytes() == b"12345678" and not list(folder.parent.glob(".tmp-*"))


def test_without_a_place_in_the_cache_a_temporary_folder_is_used(cache: Path, capsys, tmp_path: Path) -> None:
    cache.touch()  # root may write into any folder, but not into a file
    folder = cached_folder("things", "key", write_two)
    assert is_whole(folder) and folder.is_relative_to(tmp_path) and not folder.is_relative_to(cache)
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and f"cannot be written ({cache}" in warned and "COATNET_CACHE_DIR" in warned
    assert cached_folder("things", "key", never) == folder


def test_without_any_place_it_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache.touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(CacheUnusable, match=r"neither the cache .* nor a temporary folder .* TMPDIR"):
        cached_folder("things", "key", write_two)


def test_a_folder_that_another_process_removes_meanwhile_is_no_failure(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = cached_folder("things", "old", write_two, most=1)
    stat = Path.stat

    def stat_and_remove(path: Path, **options: bool) -> os.stat_result:
        found = stat(path, **options)
        if path == old:
            shutil.rmtree(path)
        return found

    monkeypatch.setattr(Path, "stat", stat_and_remove)
    folder = cached_folder("things", "new", write_two, most=1)
    assert folder == cache / "things" / "new" and is_whole(folder) and not old.exists()
    assert capsys.readouterr().err == ""


def test_only_the_process_that_makes_a_folder_removes_others(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_folder("things", "first", write_two, most=2)
    second = cached_folder("things", "second", write_two, most=2)
    answers = iter((False, True))  # it was missing before the lock, and another process has made it since
    monkeypatch.setattr("coatnet.system.cache.is_whole", lambda folder: next(answers))
    assert cached_folder("things", "second", never, most=1) == second
    assert is_whole(first)
