"""The cache folder: what can be made or fetched again (graphs, indexes, downloads, blocks of remote shards).

What is kept is checked before it is used, and made again if it is damaged. Where the cache cannot be written, as in a
read-only container or without a home, a temporary folder of this process takes its place.
"""

import atexit
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from coatnet.errors import UserError
from coatnet.system.files import atomic_folder, file_lock, remove_leftovers, sha256_of
from coatnet.system.terminal import warn

CHECKSUMS = "SHA256SUMS"  # of the files of a folder, as the program sha256sum writes and checks them
LEFTOVER_SECONDS = 86_400  # chosen: nothing takes a day to make, so an older temporary folder has no writer


class CacheUnusable(UserError):
    """There is no cache folder, or nothing can be written into it."""


def cache_folder() -> Path:
    """The folder that COATNET_CACHE_DIR names, else `$XDG_CACHE_HOME/coatnet`, else `~/.cache/coatnet`.

    Raises:
        CacheUnusable: neither variable is set and the user has no home folder.
    """
    if own := os.environ.get("COATNET_CACHE_DIR"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "coatnet"
    try:
        return Path.home() / ".cache" / "coatnet"
    except RuntimeError as error:
        raise CacheUnusable("there is no home folder for cached files; set COATNET_CACHE_DIR to a folder") from error


def cached_folder(kind: str, key: str, make: Callable[[Path], None], *, most: int | None = None) -> Path:
    """The folder `kind/key` of the cache with the files of `make`, which is called if they are missing or damaged.

    One process makes them, others wait. What a read-only cache holds is used; what it does not hold is made in a
    temporary folder, which lives as long as this process, and a line says so.

    Args:
        kind: a folder for things of one kind.
        key: says all that the files depend on.
        make: writes them into an empty folder.
        most: beyond so many of a kind, the least recently used is removed.

    Raises:
        CacheUnusable: it has to be made, and not even a temporary folder can be written.
        UserError: from `make`.
    """
    try:
        return _kept(cache_folder() / kind, key, make, most)
    except CacheUnusable as error:
        reason = str(error)
    except OSError as error:
        reason = f"{cache_folder()}: {error.strerror}"
    try:
        made = _kept(_temporary_folder() / kind, key, make, most)
    except OSError as error:
        raise CacheUnusable(
            f"neither the cache ({reason}) nor a temporary folder ({error.strerror}) can be written; "
            "COATNET_CACHE_DIR or TMPDIR names another folder"
        ) from error
    warn(
        f"the cache cannot be written ({reason}): {kind} are made in a temporary folder, anew by every process; "
        "COATNET_CACHE_DIR names another folder"
    )
    return made


def _kept(home: Path, key: str, make: Callable[[Path], None], most: int | None) -> Path:
    """As `cached_folder`, in one place. Raises OSError if it cannot be written."""
    folder = home / key
    if is_whole(folder):
        now = time.time_ns()  # the clock that os.utime takes by itself stands still for up to 10 ms
        with suppress(OSError):  # a read-only cache does not learn what is used
            os.utime(folder, ns=(now, now))
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with file_lock(home / f"{key}.lock"):
        if not is_whole(folder):  # else another process was faster
            with atomic_folder(folder, replace=True) as staged:
                make(staged)
                (staged / CHECKSUMS).write_text("".join(f"{sha256_of(staged / n)}  {n}\n" for n in _files(staged)))
            remove_leftovers(home, LEFTOVER_SECONDS)
            if most is not None:
                _remove_least_used(home, most)
    return folder


def _remove_least_used(home: Path, most: int) -> None:
    """Leave the `most` folders that were used last, while other processes may be removing some as well."""
    used = dict[Path, int]()
    for path in home.glob("[!.]*"):
        with suppress(OSError):  # removed meanwhile
            if path.is_dir():
                used[path] = path.stat().st_mtime_ns
    for path in sorted(used, key=lambda path: used[path])[:-most]:
        shutil.rmtree(path, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether a folder has the files that its checksums name and no others; 1.2 GB a second."""
    if not (folder / CHECKSUMS).is_file():
        return False
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        named = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        return bool(named) and sorted(named) == _files(folder) and all(sha256_of(folder / n) == named[n] for n in named)
    except (OSError, UnicodeDecodeError):
        return False


def _files(folder: Path) -> list[str]:
    """The regular files below a folder, without the checksums."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in paths if path.name != CHECKSUMS)


@functools.cache
def _temporary_folder() -> Path:
    """One for this process, removed at its end. Raises OSError if there is no place for it."""
    folder = Path(tempfile.mkdtemp(prefix="coatnet-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
