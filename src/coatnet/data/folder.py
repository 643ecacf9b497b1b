"""Folders of images: with a subfolder for each class, or without labels."""

import glob
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coatnet.data.datasets import IS_URL, FileDataset, below_one_folder, is_url, printable
from coatnet.data.decode import ARRAY_SUFFIXES, IMAGE_SUFFIXES, SNIFFED_BYTES, sniff
from coatnet.data.splits import NONE_TO_HOLD_OUT, Splits, choose_validation
from coatnet.errors import UserError, shorten
from coatnet.system.files import open_regular

TRAINING_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation")
TEST_NAMES = ("test", "testing")
MANIFEST_SUFFIXES = (".csv", ".tsv", ".parquet")
_A_TABLE = "a table: predict --out FILE takes its images, --data those with labels; give it alone"
# Folders that systems and programs make; hidden ones begin with a period.
_SYSTEM_FOLDERS = frozenset(
    (
        "__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler",
        "system volume information", "lost+found", "__pycache__",
    )
)  # fmt: skip
_OF_WHAT = r"(?:sets?|data|daten|images?|imgs?)?"
_TRAINING_WORD = re.compile(rf"(?:train|trains|training|trainings|trn|tr){_OF_WHAT}")
_HELD_OUT_WORD = re.compile(
    r"(?:val|valid|validation|validate|dev|devel|development|test|tests|testing|tst|ts|te|eval|evaluation|holdout|pred|"
    rf"predict|prediction|query|gallery|submission|unlabell?ed){_OF_WHAT}"
)
_WORDS_OF_ANY_SPLIT = frozenset(
    ("set", "sets", "data", "dataset", "image", "images", "img", "imgs", "photo", "photos", "file", "files", "folder")
)


class _FoundImages(NamedTuple):
    """The images below a folder: the class name and relative path of each, and what was left out."""

    class_names: list[str]
    paths: list[str]
    empty_classes: list[str]
    other_files: Counter[str]


def open_folder(root: Path, validation_fraction: float, *, evaluation: bool = False) -> Splits:
    """Open a folder whose subfolders are the classes, or `train` and `val` folders with the classes inside.

    Args:
        validation_fraction: of the images, to hold out if there are no such folders.
        evaluation: nothing is trained, so one class, one image a class or a lone `test` folder are enough.

    Raises:
        UserError: there are fewer than two classes, validation has a class that training lacks, no image can be held
            out, or the classes look like splits.
    """
    names = sorted(entry.name for entry in os.scandir(root) if is_folder(entry))
    subfolders = {name.lower(): name for name in names}  # of train/ and Train/ the former, which is sorted behind
    training = next((subfolders[name] for name in TRAINING_NAMES if name in subfolders), None)
    held_out = next((subfolders[name] for name in (*VALIDATION_NAMES, *TEST_NAMES) if name in subfolders), None)
    if not (training or held_out):
        return _open_one_folder(root, validation_fraction, evaluation)
    others = sorted(set(names) - {training, held_out}, key=natural_key)
    beside = [name for name in others if _holds_image(root / name)]
    if training and held_out:
        return _open_split_folders(root, training, held_out, beside, evaluation)
    if training and not beside:
        return _open_one_folder(root / training, validation_fraction, evaluation, root)
    if held_out and all(name.lower() in TEST_NAMES for name in beside):
        if evaluation:
            return _open_split_folders(root, None, held_out, beside, evaluation)
        raise UserError(f"{root}: {held_out}/ and no train/; training needs a folder train/ with the classes inside")
    return _open_one_folder(root, validation_fraction, evaluation)


def _open_split_folders(
    root: Path, training_name: str | None, validation_name: str, beside: Sequence[str], evaluation: bool
) -> Splits:
    folders = [name for name in (training_name, validation_name) if name]
    validation = _find_images(root / validation_name)
    training = _find_images(root / training_name) if training_name else _FoundImages([], [], [], Counter())
    classes = _classes(training if training_name else validation, root / folders[0], evaluation)
    if unknown := sorted(set(validation.class_names) - set(classes), key=natural_key):
        if not evaluation:
            raise UserError(
                f"{root}: {validation_name}/ has the class {unknown[0]!r}, which {training_name}/ has not; "
                f"it has {shorten(classes)}"
            )
        classes = tuple(sorted({*classes, *unknown}, key=natural_key))
    if not validation.paths:
        raise UserError(f"{root}: {validation_name}/ holds no images; remove the folder to have some held out")
    notes = [f"split by the folders {' and '.join(f'{name}/' for name in folders)}"]
    number = {name: index for index, name in enumerate(classes)}

    def dataset(folder: str, found: _FoundImages) -> FileDataset:
        labels = np.array([number[name] for name in found.class_names], dtype=np.int64)
        return FileDataset(root.name, classes, root / folder, found.paths, labels, root)

    test = None
    if test_name := next((name for name in beside if training_name and name.lower() in TEST_NAMES), None):
        found = _find_images(root / test_name)
        if found.paths and number.keys() >= set(found.class_names):
            test, beside = dataset(test_name, found), [name for name in beside if name != test_name]
            notes.append(f"{test_name}/ is measured once, at the end of a training")
    if beside:
        notes.append(f"left out, as they are not among them: {shorten([f'{name}/' for name in beside])}")
    notes += _notes(training, str(training_name)) + _notes(validation, validation_name)
    if unseen := sorted(set(classes) - set(validation.class_names), key=natural_key):
        notes.append(f"no images in {validation_name}/ for {shorten(unseen)}: nothing is measured for them")
    return Splits(
        root.name, dataset(folders[0], training), dataset(validation_name, validation), tuple(notes), test=test
    )


def _open_one_folder(root: Path, validation_fraction: float, evaluation: bool, source: Path | None = None) -> Splits:
    found = _find_images(root)
    classes = _classes(found, root, evaluation)
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[name] for name in found.class_names])
    held_out = choose_validation(found.paths, labels, validation_fraction)
    notes = [f"held out {held_out.mean():.0%}, class by class, by the hash of the path; new files move no old ones"]
    if not held_out.any():
        if not evaluation:
            raise UserError(f"{root}: no class has two images, so none can be held out; add images")
        held_out[:], notes = True, [NONE_TO_HOLD_OUT]
    datasets = [
        FileDataset(
            root.name, classes, root, [found.paths[index] for index in np.flatnonzero(part)], labels[part], source
        )
        for part in (~held_out, held_out)
    ]
    notes += _notes(found, root.name)
    if (single := [name for name, count in Counter(found.class_names).items() if count == 1]) and not evaluation:
        notes.append(f"only one image, used for training, in {shorten(single)}: nothing is measured for them")
    return Splits(root.name, datasets[0], datasets[1], tuple(notes), by_name=bool(len(datasets[0])))


def natural_key(name: str) -> tuple:
    """A sort key that puts `img2` before `img10`, and upper and lower case together."""
    parts = re.split(r"([0-9]{1,4000})", name.casefold())  # Python takes no number of more than 4,300 digits
    return tuple((int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)), name


def _find_images(root: Path) -> _FoundImages:
    found = _FoundImages([], [], [], Counter())
    for entry in sorted(os.scandir(root), key=lambda entry: natural_key(entry.name)):
        if _is_ignored(entry.name):
            continue
        if not is_folder(entry):
            found.other_files[suffix_of(entry.name) + " at the top"] += 1
            continue
        # Linux writes accents composed, macOS decomposed: it is the same class.
        class_name = unicodedata.normalize("NFC", printable(entry.name))
        before = len(found.paths)
        for path in _walk(entry.path):
            if is_image_file(path):
                found.class_names.append(class_name)
                found.paths.append(os.path.relpath(path, root))
            else:
                found.other_files[suffix_of(path)] += 1
        if len(found.paths) == before:
            found.empty_classes.append(class_name)
    return _without_arrays(found)


def _without_arrays(found: _FoundImages) -> _FoundImages:
    """The images without NumPy files, if there are others as well: then those hold features, masks and the like."""
    arrays = [path.lower().endswith(ARRAY_SUFFIXES) for path in found.paths]
    if all(arrays) or not any(arrays):
        return found
    found.other_files.update(suffix_of(path) for path, is_array in zip(found.paths, arrays, strict=True) if is_array)
    kept = [row for row, is_array in enumerate(arrays) if not is_array]
    names, paths = ([column[row] for row in kept] for column in (found.class_names, found.paths))
    return found._replace(
        class_names=names, paths=paths, empty_classes=[*found.empty_classes, *sorted({*found.class_names} - {*names})]
    )


def _walk(
    folder: str,
    *,
    files_first: bool = False,
    refuse: Callable[[OSError], None] | None = None,
    left_out: Counter[str] | None = None,
) -> Iterator[str]:
    """Yield every file below in natural order, except hidden and system ones.

    Links are followed, but a folder is entered only once. There may be any number of folders inside each other.

    Args:
        files_first: the files of a folder before its subfolders, not between them.
        refuse: called for a folder that cannot be listed; by default the error is raised.
        left_out: counts what is hidden or the system's.
    """

    def entries(path: str) -> Iterator[os.DirEntry[str]]:
        try:
            there = list(os.scandir(path))
        except OSError as error:
            if refuse is None:
                raise UserError(f"{printable(path)} cannot be listed: {error.strerror}") from error
            refuse(error)
            return iter(())
        listed = [entry for entry in there if not _is_ignored(entry.name)]
        if left_out is not None and len(listed) < len(there):
            left_out["hidden"] += len(there) - len(listed)
        listed.sort(key=lambda entry: (files_first and is_folder(entry), natural_key(entry.name)))
        return iter(listed)

    real = os.path.realpath(folder)
    seen, entered = {real}, [(real, entries(folder))]
    while entered:
        real, listed = entered[-1]
        entry = next(listed, None)
        if entry is None:
            entered.pop()
        elif not is_folder(entry):
            yield entry.path
        else:
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            if real not in seen:
                seen.add(real)
                entered.append((real, entries(entry.path)))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one, that may hold images."""
    try:
        return entry.is_dir() and not _is_ignored(entry.name)
    except OSError:  # a link to itself
        return False


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _holds_image(folder: Path) -> bool:
    return any(map(is_image_file, _walk(str(folder), refuse=lambda error: None)))


def _holds_other_images(folder: Path) -> bool:
    every = _walk(str(folder), refuse=lambda error: None)
    return any(is_image_file(file) and not file.lower().endswith(ARRAY_SUFFIXES) for file in every)


def is_image_file(path: str) -> bool:
    """Whether a file is an image by the ending of its name or, without one, by its first bytes."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix:
        return suffix in IMAGE_SUFFIXES
    try:
        with open(path, "rb", buffering=0, opener=open_regular) as file:
            return sniff(file.read(SNIFFED_BYTES) or b"") is not None
    except OSError:
        return False


def suffix_of(path: str) -> str:
    """The ending of a file's name, to count files by."""
    return printable(os.path.splitext(path)[1].lower()) or "without suffix"


def _classes(found: _FoundImages, root: Path, evaluation: bool) -> tuple[str, ...]:
    classes = tuple(sorted(set(found.class_names), key=natural_key))
    inside = _folders_inside(found.paths)
    if len(classes) < 2 and not (evaluation and classes):
        problem = f"one class with images, {classes[0]!r}" if classes else "no folders with images"
        (folder, subfolders), *_ = inside.items() or [("", set())]
        meant = f" (did you mean {str(root / folder)!r}?)" if len(subfolders - {""}) > 1 else ""
        raise UserError(f"{root}: {problem}{meant}; it needs a folder for each class, at least two, with images inside")
    _refuse_splits(root, inside)
    return classes


def _folders_inside(paths: Iterable[str]) -> dict[str, set[str]]:
    """By the first folder of the paths: the second ones, "" for a file without."""
    inside: dict[str, set[str]] = {}
    for path in paths:
        first, *rest = path.split(os.sep, 2)
        inside.setdefault(first, set()).add(rest[0] if len(rest) > 1 else "")
    return inside


def _refuse_splits(root: Path, inside: Mapping[str, set[str]]) -> None:
    """Raise UserError if folders look like splits rather than classes, by their names or by what they hold."""
    roles = {name: role for name in inside if (role := _split_role(name))}
    training, held_out = ({role[1]: name for name, role in roles.items() if role[0] is part} for part in (True, False))
    pairs = [(training[rest], held_out[rest]) for rest in training.keys() & held_out.keys()]
    all_alike = len(inside) > 1 and len({rest for _, rest in roles.values()}) == 1
    all_are = len(roles) == len(inside) and (pairs or all_alike)
    if all_are or any((inside[one] & inside[other]) - {""} for one, other in pairs):
        names = shorten([f"{name}/" for name in roles])
        raise UserError(
            f"{root}: {names} look like splits, not like classes: call them train/ and val/, with a folder for each "
            "class inside"
        )
    largest = max(inside.values(), key=len)
    few = len(inside) <= 10  # chosen: splits and folds are few, people or places with numbered folders are many
    same = all(part == largest or (few and len(part) > 1 and part < largest) for part in inside.values())
    if len(inside) > 1 and len(largest) > 1 and "" not in largest and same:
        subfolders = sorted(largest, key=natural_key)
        if all(map(_split_role, subfolders)):
            layout = f"put the splits above the classes, as in {subfolders[0]}/{next(iter(inside))}/"
        else:
            layout = f"if those are the classes, put them into {root.name}/, or into {root.name}/train/ and .../val/"
        raise UserError(
            f"{root}: the folders {shorten(list(inside))} hold the same subfolders {shorten(subfolders)}: {layout}; a "
            "table with the columns path and label needs no certain folders"
        )


def _split_role(name: str) -> tuple[bool, str] | None:
    """For a name such as `seg_train` whether it is of training, and what else it says, `seg`; None without a split."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    split = [word for word in words if _TRAINING_WORD.fullmatch(word) or _HELD_OUT_WORD.fullmatch(word)]
    if not split:
        return None
    return bool(_TRAINING_WORD.fullmatch(split[0])), " ".join(
        word for word in words if word not in split and word not in _WORDS_OF_ANY_SPLIT
    )


def _notes(found: _FoundImages, where: str) -> list[str]:
    notes = []
    if found.empty_classes:
        notes.append(f"no images in {where}/ for {shorten(found.empty_classes)}: left out")
    if found.other_files:
        notes.append(f"files of other kinds in {where}/ left out: {describe_left_out(found.other_files)}")
    by_case = Counter(name.casefold() for name in set(found.class_names))
    if colliding := [name for name in sorted(set(found.class_names)) if by_case[name.casefold()] > 1]:
        notes.append(f"classes that differ only in case: {shorten(colliding)}")
    return notes


def expand_paths(
    paths: Iterable[str | Path], left_out: Counter[str] | None = None
) -> Iterator[tuple[Path, str | None]]:
    """Yield each file and None, and the images below each folder, in natural order, without hidden ones.

    Links are followed as in training. What does not exist may be a pattern such as `*.jpg`, for its matches. A path
    that does not exist, or a folder that cannot be listed or has no images, comes with the reason instead of None,
    after what else is found in it.

    Args:
        left_out: counts the files below folders that are no images, by the ending of their names, and what is hidden.
    """
    for path in _expand_patterns(paths):
        if not os.path.isdir(path):
            there = os.path.exists(path)
            yield path, _A_TABLE if there and path.suffix.lower() in MANIFEST_SUFFIXES else _why_not(path, there)
            continue
        found_any = False
        refused: list[OSError] = []
        others: bool | None = None  # whether there are other images than NumPy files, which are left out then
        for file in _walk(str(path), files_first=True, refuse=refused.append, left_out=left_out):
            if file.lower().endswith(ARRAY_SUFFIXES):
                others = _holds_other_images(path) if others is None else others
            if is_image_file(file) and not (others and file.lower().endswith(ARRAY_SUFFIXES)):
                found_any = True
                yield Path(file), None
            elif left_out is not None:
                left_out[suffix_of(file)] += 1
        for error in refused:
            yield Path(error.filename), f"unreadable: {error.strerror}"
        if not found_any and not refused:
            yield path, "no images in this folder"


def open_images(paths: Iterable[str | Path], left_out: Counter[str] | None = None) -> FileDataset:
    """Open images without labels: files, and the images below folders, as `expand_paths` finds them.

    Raises:
        UserError: a path does not exist, or a folder cannot be listed or has no images. A file that is not an image
            is found when it is read.
    """
    sources, files = list(_as_paths(paths)), []
    for path, error in expand_paths(sources, left_out):
        if error is not None:
            raise UserError(f"{printable(str(path))}: {error}")
        files.append(str(path))
    given = all(map(os.path.lexists, sources))  # else some are patterns
    folders = [str(source if source.is_dir() else source.parent) for source in sources] if given else ()
    root, names = below_one_folder(files, folders)
    return FileDataset("images", (), root, names, np.full(len(files), -1))


def describe_left_out(files: Mapping[str, int]) -> str:
    """`12 .txt, 3 .mp4`: files by the ending of their names, the most frequent first."""
    shown = Counter(files).most_common(5)
    rest = sum(files.values()) - sum(count for _, count in shown)
    return ", ".join([f"{count:,} {suffix}" for suffix, count in shown] + [f"{rest:,} others"] * bool(rest))


def _as_paths(paths: str | Path | Iterable[str | Path]) -> Iterator[Path]:
    """The paths, also a single one, whose letters are no paths. Raises UserError for an empty one."""
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        if path == "":  # as a `Path` it would be the current folder
            raise UserError("a path is empty: give an image or a folder, such as . for the current folder")
        yield Path(path)


def _expand_patterns(paths: Iterable[str | Path]) -> Iterator[Path]:
    for path in _as_paths(paths):
        matches = []
        if glob.has_magic(str(path)) and not os.path.lexists(path):  # quoted, or a shell that expands no patterns
            matches = sorted(glob.glob(str(path), recursive=True), key=natural_key)
        yield from map(Path, matches or [path])


def _why_not(path: Path, there: bool) -> str | None:
    if there:
        return None
    try:
        path.stat()
    except PermissionError as error:  # for a folder above it
        return f"unreadable: {error.strerror}"
    except (OSError, ValueError):
        pass
    if is_url(path):
        return IS_URL
    return "no such file" if not glob.has_magic(str(path)) else "no such file, and no file matches it as a pattern"
