"""Pictures without labels: files, and folders that are searched."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from coatnet.data.folder import PICTURE_SUFFIXES, natural_key


def expand_paths(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str | None]]:
    """The files behind the paths, or why there are none; folders and theirs in natural order, hidden ones left out."""
    for path in map(Path, paths):
        if not path.is_dir():
            yield path, None if path.exists() else "no such file"
            continue
        found = False
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted((name for name in subfolders if not name.startswith(".")), key=natural_key)
            for name in sorted(names, key=natural_key):
                if Path(name).suffix.lower() in PICTURE_SUFFIXES and not name.startswith("."):
                    found = True
                    yield Path(folder, name), None
        if not found:
            yield path, "no pictures in this folder"
