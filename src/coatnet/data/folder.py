"""Folders of images: with a subfolder for each class, or without labels."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coatnet.data.datasets import FileDataset, printable
from coatnet.data.decode import IMAGE_SUFFIXES
from coatnet.data.splits import Splits, choose_validation
from coatnet.errors import UserError, shorten

TRAINING_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation")
TEST_NAMES = ("test", "testing")


class _FoundImages(NamedTuple):
    """The images below a folder: the class name and relative path of each, and what was left out."""

    class_names: list[str]
    paths: list[str]
    empty_classes: list[str]
    other_files: Counter[str]


def open_folder(root: Path, validation_fraction: float) -> Splits:
    """Open a folder whose subfolders are the classes, or `train` and `val` folders with the classes inside.

    Raises:
        UserError: there are fewer than two classes, validation has a class that training lacks, or no image can be
            held out.
    """
    subfolders = {entry.name.lower(): entry.name for entry in os.scandir(root) if entry.is_dir()}
    training = next((subfolders[name] for name in TRAINING_NAMES if name in subfolders), None)
    held_out = next((subfolders[name] for name in (*VALIDATION_NAMES, *TEST_NAMES) if name in subfolders), None)
    if training and held_out:
        return _open_split_folders(root, training, held_out)
    if training and len(subfolders) == 1:
        root = root / training
    return _open_one_folder(root, validation_fraction)


def _open_split_folders(root: Path, training_name: str, validation_name: str) -> Splits:
    training, validation = _find_images(root / training_name), _find_images(root / validation_name)
    classes = _classes(training, root / training_name)
    if unknown := sorted(set(validation.class_names) - set(classes), key=natural_key):
        raise UserError(
            f"{root}: {validation_name}/ has the class {unknown[0]!r}, which {training_name}/ has not; "
            f"it has {shorten(classes)}"
        )
    if not validation.paths:
        raise UserError(f"{root}: {validation_name}/ holds no images; remove the folder to have some held out")
    notes = [f"split by the folders {training_name}/ and {validation_name}/"]
    notes += _notes(training, training_name) + _notes(validation, validation_name)
    if unseen := sorted(set(classes) - set(validation.class_names), key=natural_key):
        notes.append(f"no images in {validation_name}/ for {shorten(unseen)}: nothing is measured for them")
    number = {name: index for index, name in enumerate(classes)}
    datasets = [
        FileDataset(
            root.name,
            classes,
            root / folder,
            found.paths,
            np.array([number[name] for name in found.class_names]),
        )
        for folder, found in ((training_name, training), (validation_name, validation))
    ]
    return Splits(root.name, datasets[0], datasets[1], tuple(notes))


def _open_one_folder(root: Path, validation_fraction: float) -> Splits:
    found = _find_images(root)
    classes = _classes(found, root)
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[name] for name in found.class_names])
    held_out = choose_validation(found.paths, labels, validation_fraction)
    if not held_out.any():
        raise UserError(f"{root}: no class has two images, so none can be held out; add images")
    datasets = [
        FileDataset(root.name, classes, root, [found.paths[index] for index in np.flatnonzero(part)], labels[part])
        for part in (~held_out, held_out)
    ]
    notes = [f"held out {held_out.mean():.0%}, class by class, by the hash of the path; new files move no old ones"]
    notes += _notes(found, root.name)
    if single := [name for name, count in Counter(found.class_names).items() if count == 1]:
        notes.append(f"only one image, used for training, in {shorten(single)}: nothing is measured for them")
    return Splits(root.name, datasets[0], datasets[1], tuple(notes))


def natural_key(name: str) -> tuple:
    """A sort key that puts `img2` before `img10`, and upper and lower case together."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return tuple((int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)), name


def _find_images(root: Path) -> _FoundImages:
    found = _FoundImages([], [], [], Counter())
    for entry in sorted(os.scandir(root), key=lambda entry: natural_key(entry.name)):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            found.other_files[_suffix(entry.name) + " at the top"] += 1
            continue
        # Linux writes accents composed, macOS decomposed: it is the same class.
        class_name = unicodedata.normalize("NFC", printable(entry.name))
        before = len(found.paths)
        for path in _walk(entry.path, {os.path.realpath(entry.path)}):
            if _suffix(path) in IMAGE_SUFFIXES:
                found.class_names.append(class_name)
                found.paths.append(os.path.relpath(path, root))
            else:
                found.other_files[_suffix(path)] += 1
        if len(found.paths) == before:
            found.empty_classes.append(class_name)
    return found


def _walk(folder: str, seen: set[str]) -> Iterator[str]:
    """Yield every file below that is not hidden, in natural order; follows links, but enters a folder only once."""
    for entry in sorted(os.scandir(folder), key=lambda entry: natural_key(entry.name)):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield entry.path
        elif (real := os.path.realpath(entry.path)) not in seen:
            seen.add(real)
            yield from _walk(entry.path, seen)


def _classes(found: _FoundImages, root: Path) -> tuple[str, ...]:
    classes = tuple(sorted(set(found.class_names), key=natural_key))
    if len(classes) < 2:
        problem = f"one class with images, {classes[0]!r}" if classes else "no folders with images"
        raise UserError(f"{root}: {problem}; it needs a folder for each class, at least two, with images inside")
    return classes


def _notes(found: _FoundImages, where: str) -> list[str]:
    notes = []
    if found.empty_classes:
        notes.append(f"no images in {where}/ for {shorten(found.empty_classes)}: left out")
    if found.other_files:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in found.other_files.most_common(5))
        notes.append(f"files of other kinds in {where}/ left out: {kinds}")
    by_case = Counter(name.casefold() for name in set(found.class_names))
    if colliding := [name for name in sorted(set(found.class_names)) if by_case[name.casefold()] > 1]:
        notes.append(f"classes that differ only in case: {shorten(colliding)}")
    return notes


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "without suffix"


def expand_paths(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str | None]]:
    """Yield each file and None, and the images below each folder, in natural order, without hidden ones.

    A path that does not exist, or a folder that cannot be listed or has no images, comes with the reason instead of
    None, after what else is found in it.
    """
    for path in map(Path, paths):
        if not os.path.isdir(path):
            yield path, None if os.path.exists(path) else _why_not(path)
            continue
        found_any = False
        refused: list[OSError] = []
        for folder, subfolders, names in os.walk(path, onerror=refused.append):
            subfolders[:] = sorted((name for name in subfolders if not name.startswith(".")), key=natural_key)
            for name in sorted(names, key=natural_key):
                if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                    found_any = True
                    yield Path(folder, name), None
        for error in refused:
            yield Path(error.filename), f"unreadable: {error.strerror}"
        if not found_any and not refused:
            yield path, "no images in this folder"


def open_images(paths: Iterable[str | Path]) -> FileDataset:
    """Open images without labels: files, and the images below folders.

    Raises:
        UserError: a path does not exist, or a folder cannot be listed or has no images. A file that is not an image
            is found when it is read.
    """
    files = []
    for path, error in expand_paths(paths):
        if error is not None:
            raise UserError(f"{printable(str(path))}: {error}")
        files.append(str(path))
    # The name is part of what identifies the images of a batch prediction, so unfinished ones of version 0.1 go on.
    return FileDataset("pictures", (), Path(), files, np.full(len(files), -1))


def _why_not(path: Path) -> str:
    try:
        path.stat()
    except PermissionError as error:  # for a folder above it
        return f"unreadable: {error.strerror}"
    except (OSError, ValueError):
        pass
    return "no such file"
