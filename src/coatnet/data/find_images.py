"""Images without labels: files, and folders that are searched."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from coatnet.data.datasets import FileDataset, printable
from coatnet.data.folder import IMAGE_SUFFIXES, natural_key
from coatnet.errors import UserError


def expand_paths(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str | None]]:
    """The files behind the paths, or why there are none; folders and theirs in natural order, hidden ones left out.

    A folder that cannot be listed comes with the reason, behind what else is found.
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


def open_images(paths: Iterable[str | Path]) -> FileDataset:
    """Images without labels: files, and folders that are searched as `predict` does.

    Raises:
        UserError: a path does not exist, or a folder cannot be listed or holds no image. Files that are no images
            are found later.
    """
    files = []
    for path, error in expand_paths(paths):
        if error is not None:
            raise UserError(f"{printable(str(path))}: {error}")
        files.append(str(path))
    return FileDataset("pictures", (), Path(), files, np.full(len(files), -1))


def _why_not(path: Path) -> str:
    try:
        path.stat()
    except PermissionError as error:  # of a folder above it
        return f"unreadable: {error.strerror}"
    except (OSError, ValueError):
        pass
    return "no such file"
