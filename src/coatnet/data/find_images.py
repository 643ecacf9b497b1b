"""Images without labels: files, and folders that are searched."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from coatnet.data.folder import IMAGE_SUFFIXES, natural_key


def expand_paths(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str | None]]:
    """The files behind the paths, or why there are none; folders and theirs in natural order, hidden ones left out.

    A folder that can not be listed comes with the reason, behind what else is found.
    """
    for path in map(Path, paths):
        if not os.path.isdir(path):
            yield path, None if os.path.exists(path) else _why_not(path)
            continue
        found = False
        refused: list[OSError] = []
        for folder, subfolders, names in os.walk(path, onerror=refused.append):
            subfolders[:] = sorted((name for name in subfolders if not name.startswith(".")), key=natural_key)
            for name in sorted(names, key=natural_key):
                if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                    found = True
                    yield Path(folder, name), None
        for error in refused:
            yield Path(error.filename), f"unreadable: {error.strerror}"
        if not found and not refused:
            yield path, "no images in this folder"


def _why_not(path: Path) -> str:
    try:
        path.stat()
    except PermissionError as error:  # of a folder above it
        return f"unreadable: {error.strerror}"
    except (OSError, ValueError):
        pass
    return "no such file"
