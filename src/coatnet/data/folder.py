"""A folder of images: its folders are the classes, or the splits with the classes inside."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coatnet.data.datasets import FileDataset, printable
from coatnet.data.splits import Splits, choose_validation
from coatnet.errors import UserError, few

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
TRAINING_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation")
TEST_NAMES = ("test", "testing")


class _Listing(NamedTuple):
    """What lies below a folder: class name and relative path of each image, and what was left out."""

    class_names: list[str]
    paths: list[str]
    empty_classes: list[str]
    other_files: Counter[str]


def open_folder(root: Path, validation_fraction: float) -> Splits:
    """Raises `UserError` for fewer than two classes, or for a class in validation that training lacks."""
    subfolders = {entry.name.lower(): entry.name for entry in os.scandir(root) if entry.is_dir()}
    training = next((subfolders[name] for name in TRAINING_NAMES if name in subfolders), None)
    held_out = next((subfolders[name] for name in (*VALIDATION_NAMES, *TEST_NAMES) if name in subfolders), None)
    if training and held_out:
        return _open_split_folders(root, training, held_out)
    if training and len(subfolders) == 1:
        root = root / training
    return _open_one_folder(root, validation_fraction)


def _open_split_folders(root: Path, training_name: str, validation_name: str) -> Splits:
    training, validation = _list(root / training_name), _list(root / validation_name)
    classes = _classes(training, root / training_name)
    if unknown := sorted(set(validation.class_names) - set(classes), key=natural_key):
        raise UserError(
            f"{root}: {validation_name}/ has the class {unknown[0]!r}, which {training_name}/ has not; "
            f"it has {few(classes)}"
        )
    if not validation.paths:
        raise UserError(f"{root}: {validation_name}/ holds no images; remove the folder to have some held out")
    notes = [f"split by the folders {training_name}/ and {validation_name}/"]
    notes += _notes(training, training_name) + _notes(validation, validation_name)
    if unseen := sorted(set(classes) - set(validation.class_names), key=natural_key):
        notes.append(f"no images in {validation_name}/ for {few(unseen)}: nothing is measured for them")
    number = {name: index for index, name in enumerate(classes)}
    datasets = [
        FileDataset(
            root.name,
            classes,
            root / folder,
            listing.paths,
            np.array([number[name] for name in listing.class_names]),
        )
        for folder, listing in ((training_name, training), (validation_name, validation))
    ]
    return Splits(root.name, datasets[0], datasets[1], tuple(notes))


def _open_one_folder(root: Path, validation_fraction: float) -> Splits:
    listing = _list(root)
    classes = _classes(listing, root)
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[name] for name in listing.class_names])
    held_out = choose_validation(listing.paths, labels, validation_fraction)
    if not held_out.any():
        raise UserError(f"{root}: no class has two images, so none can be held out; add images")
    datasets = [
        FileDataset(root.name, classes, root, [listing.paths[index] for index in np.flatnonzero(part)], labels[part])
        for part in (~held_out, held_out)
    ]
    notes = [f"held out {held_out.mean():.0%}, class by class, by the hash of the path; new files move no old ones"]
    notes += _notes(listing, root.name)
    if single := [name for name, count in Counter(listing.class_names).items() if count == 1]:
        notes.append(f"only one image, used for training, in {few(single)}: nothing is measured for them")
    return Splits(root.name, datasets[0], datasets[1], tuple(notes))


def natural_key(name: str) -> tuple:
    """Sorts `img2` before `img10`, and regardless of case before by case."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return tuple((int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)), name


def _list(root: Path) -> _Listing:
    listing = _Listing([], [], [], Counter())
    for entry in sorted(os.scandir(root), key=lambda entry: natural_key(entry.name)):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            listing.other_files[_suffix(entry.name) + " at the top"] += 1
            continue
        # Accents come composed or decomposed, by the system that wrote them: one class either way.
        class_name = unicodedata.normalize("NFC", printable(entry.name))
        before = len(listing.paths)
        for path in _walk(entry.path, {os.path.realpath(entry.path)}):
            if _suffix(path) in IMAGE_SUFFIXES:
                listing.class_names.append(class_name)
                listing.paths.append(os.path.relpath(path, root))
            else:
                listing.other_files[_suffix(path)] += 1
        if len(listing.paths) == before:
            listing.empty_classes.append(class_name)
    return listing


def _walk(folder: str, seen: set[str]) -> Iterator[str]:
    """Every visible file below, in natural order, through links but never twice through the same folder."""
    for entry in sorted(os.scandir(folder), key=lambda entry: natural_key(entry.name)):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield entry.path
        elif (real := os.path.realpath(entry.path)) not in seen:
            seen.add(real)
            yield from _walk(entry.path, seen)


def _classes(listing: _Listing, root: Path) -> tuple[str, ...]:
    classes = tuple(sorted(set(listing.class_names), key=natural_key))
    if len(classes) < 2:
        found = f"one class with images, {classes[0]!r}" if classes else "no folders with images"
        raise UserError(f"{root}: {found}; it needs a folder for each class, two at least, with images inside")
    return classes


def _notes(listing: _Listing, where: str) -> list[str]:
    notes = []
    if listing.empty_classes:
        notes.append(f"no images in {where}/ for {few(listing.empty_classes)}: left out")
    if listing.other_files:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in listing.other_files.most_common(5))
        notes.append(f"files of other kinds in {where}/ left out: {kinds}")
    by_case = Counter(name.casefold() for name in set(listing.class_names))
    if colliding := [name for name in sorted(set(listing.class_names)) if by_case[name.casefold()] > 1]:
        notes.append(f"classes that differ only in case: {few(colliding)}")
    return notes


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "without suffix"


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
    # The name is part of what identifies the images of a batch prediction, so unfinished ones of version 0.1 go on.
    return FileDataset("pictures", (), Path(), files, np.full(len(files), -1))


def _why_not(path: Path) -> str:
    try:
        path.stat()
    except PermissionError as error:  # of a folder above it
        return f"unreadable: {error.strerror}"
    except (OSError, ValueError):
        pass
    return "no such file"
