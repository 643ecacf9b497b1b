"""Manifests: tables with a row per image and the columns path, label and optionally split, as CSV, TSV or Parquet.

Other usual names of the columns are read too, and semicolons or tabs between them, as spreadsheets write them in many
countries.
"""

import codecs
import csv
import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from coatnet.data.datasets import TRUSTED_ROOTS, FileDataset, empty_label_table, is_below, printable, trusted_roots
from coatnet.data.folder import TEST_NAMES, TRAINING_NAMES, VALIDATION_NAMES, natural_key
from coatnet.data.splits import NONE_TO_HOLD_OUT, Splits, choose_validation
from coatnet.errors import UserError, counted, import_extra, one_line, reason_of, shorten
from coatnet.system.files import (
    atomic_files,
    check_regular,
    open_regular,
    output_path,
    translate_write_errors,
)

REQUIRED = ("path", "label")
CHECKED_ROWS = 20  # chosen: files may be missing, but if none of the first is there, the paths start elsewhere
# Names of the columns, the first of which in a table is taken. Spaces and hyphens count as underscores.
_NAMES = {
    "path": (
        "path", "file_path", "filepath", "image_path", "img_path", "file_name", "filename", "image_name", "img_name",
        "image_file", "image_filename", "file", "image", "img", "images", "photo", "paths", "filepaths", "filenames",
        "files", "image_paths", "image_id", "img_id", "id", "image_url", "url",
    ),
    "label": (
        "label", "labels", "class", "classes", "class_name", "classname", "label_name", "category", "target", "species",
        "tags", "tag", "class_label", "breed", "diagnosis", "class_id", "label_id", "y",
    ),
    "split": ("split", "subset", "set", "partition", "phase", "data_set", "usage"),
}  # fmt: skip
_DELIMITERS = ",;\t|"
_MAX_LINE = 1 << 20  # characters, chosen: a file without line ends is no table
_MAX_CELL_BYTES = 1 << 17  # as in the csv module
# chosen: what a Parquet file may unpack to. A small one can say that a value is repeated a billion times.
_VALUES_PER_BYTE, _FREE_VALUES = 20, 200_000
_UNPACKED_PER_BYTE, _FREE_BYTES = 100, 64_000_000
_SEPARATORS = re.compile(r"[;|]")
_MISSING = ("na", "n/a", "none", "null")


class _Row(NamedTuple):
    number: int  # as a spreadsheet shows it: the header of a CSV is row 1
    path: str
    labels: tuple[str, ...]
    split: str  # training, validation, test, or empty


class _Table(NamedTuple):
    """The rows of a table: number, and the cells of path, label and split; the names of these columns, or None; and
    those of the columns that are not used."""

    columns: list[str | None]
    rows: Generator[tuple[int, tuple[str, object, str]]]
    unused: list[str]


def open_manifest(
    path: Path, validation_fraction: float, *, evaluation: bool = False, multilabel: bool = False
) -> Splits:
    """Open the images of a manifest; paths start from its folder.

    Labels separated by ; or | in any row make it multi-label.

    Args:
        validation_fraction: of the images, to hold out if there is no column split.
        evaluation: nothing is trained, so one class, one image a class or rows of one split are enough.
        multilabel: it is so even if no row has more than one label.

    Raises:
        UserError: a row is wrong; the message has its number.
    """
    root = path.resolve().parent
    columns, cells, unused = _open_table(path, REQUIRED)
    with closing(cells):
        rows = [_parse(path, root, number, *values) for number, values in cells]
    if not rows:
        raise UserError(f"{path} has no rows; it needs the columns path and label and one row per image")
    if not any(os.path.exists(root / row.path) for row in rows[:CHECKED_ROWS]):  # False for a name that cannot be
        others = f", nor that of the next {len(rows[:CHECKED_ROWS]) - 1} rows" if len(rows) > 1 else ""
        raise UserError(
            f"{path}, row {rows[0].number}: no file {rows[0].path!r:.200} in {root}{others}; paths start from there"
        )

    multilabel = any(len(row.labels) > 1 for row in rows) or (multilabel and any(row.labels for row in rows))
    first: dict[str, _Row] = {}
    contradictions = []
    for row in rows:
        if not row.labels and not multilabel:
            raise UserError(f"{path}, row {row.number}: no label; every image needs one")
        if {*row.labels} != {*(other := first.setdefault(row.path, row)).labels}:
            labels = " and ".join(f"{';'.join(each.labels)!r:.80}" for each in (other, row))
            contradictions.append(f"rows {other.number} and {row.number}: {row.path!r:.200} is {labels}")
    every = rows
    rows, held_out, notes = _split(path, rows, validation_fraction, multilabel, evaluation)
    if contradictions:
        notes.append(
            f"{counted(len(contradictions), 'row')} with other labels of an image than a row before, such as "
            f"{contradictions[0]}; all labels of an image belong into one row, with ; between them"
        )
    classes = tuple(sorted({label for row in rows for label in row.labels}, key=natural_key))
    if len(classes) < 2 and not evaluation:
        raise UserError(f"{path}: one class, {classes[0]!r:.80}; a classifier needs at least two")
    if not evaluation:
        _check_validation_labels(path, rows, held_out)
    if missing := [name for name in classes if name.lower() in _MISSING]:
        notes.append(f"{shorten(missing)}: taken as the name of a class; leave out the rows if it means no label")
    if any(name not in (None, usual) for name, usual in zip(columns, _NAMES, strict=True)):
        given = ", ".join(f"{usual} from {name!r}" for name, usual in zip(columns, _NAMES, strict=True) if name)
        notes.append(f"columns: {given}")
    if unused:
        notes.append(f"columns that are not used: {shorten(unused)}")
    if multilabel and (unlabeled := sum(not row.labels for row in rows)):
        notes.append(f"{counted(unlabeled, 'image')} without a label: every class is counted as absent")

    def dataset(chosen: list[_Row]) -> FileDataset:
        labels = _encode(path, chosen, classes, multilabel)
        return FileDataset(path.stem, classes, root, [row.path for row in chosen], labels)

    datasets = [dataset([rows[index] for index in np.flatnonzero(part)]) for part in (~held_out, held_out)]
    test, known = None, set(classes)
    if len(rows) < len(every):
        measured = [row for row in every if row.split == "test" and known.issuperset(row.labels)]
        test = dataset(measured) if measured else None
        notes.append(f"{counted(len(measured), 'row')} of the test split measured once, at the end of a training")
        if unknown := len(every) - len(rows) - len(measured):
            notes.append(f"{counted(unknown, 'row')} of the test split left out: their labels are in no other row")
    by_name = not any(row.split for row in rows) and bool(held_out.any()) and not held_out.all()
    return Splits(path.stem, datasets[0], datasets[1], tuple(notes), by_name, test)


def read_manifest(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the path, from the manifest's folder, and the label of each row, whatever its split.

    Labels are as they are written, and empty where there are none.

    Raises:
        UserError: a row is wrong; the message has its number.
    """
    root = path.resolve().parent
    with closing(_open_table(path, ("path",)).rows) as rows:
        for number, (image, label, _) in rows:
            text = ";".join(map(str, label)) if isinstance(label, list) else str(label)
            yield _below(root, f"{path}, row {number}", image), text


def write_manifest(
    path: str | Path, columns: Sequence[str], rows: Sequence[tuple[Path, str, *tuple[object, ...]]], *, multilabel: bool
) -> None:
    """Write a CSV that `open_manifest` takes back; it is read again before it takes its name.

    Args:
        path: of the file, in a folder of which the images are below; a file that is there is replaced.
        columns: names of what stands behind the file and the label of each row.
        rows: file, label (several are joined by `;`, none is empty), and the other cells.
        multilabel: whether `;` separates labels.

    Raises:
        UserError: an image is not below the folder, or a name or class is one that a table does not give back; or the
            file cannot be written.
    """
    target = output_path(path).absolute()
    require_below_table(path, [image for image, *_ in rows])
    root, names = target.parent.resolve(), _names_below(target, [image for image, *_ in rows])
    table = [(name, *cells) for name, (_, *cells) in zip(names, rows, strict=True)]
    with translate_write_errors(path), atomic_files(target) as (staged,):
        try:
            with staged.open("w", encoding="utf-8", newline="") as stream:
                csv.writer(stream).writerows([(*REQUIRED, *columns), *table])
            with closing(_open_table(staged, REQUIRED).rows) as found:
                again = [_parse(staged, root, number, *values) for number, values in found]
        except UnicodeEncodeError as error:
            raise UserError(f"{path}: the name {printable(error.object)[:200]!r} is not UTF-8, as a table is") from None
        for (name, label, *_), row in zip(table, again, strict=True):
            labels = str(label).split(";") if multilabel else [label]
            if (name, tuple(filter(None, labels))) != (row.path, row.labels):
                raise UserError(
                    f"{path}: {name!r:.200} of {label!r:.200} would be read as {row.path!r:.200} of "
                    f"{';'.join(row.labels)!r:.200}: rename it first"
                )


def require_below_table(path: str | Path, images: Sequence[Path], classes: Iterable[str] = ()) -> None:
    """Raise UserError if a table of these files and classes may not be written to a path, or would not give back a name
    of them: before what it holds is computed."""
    target = output_path(path).absolute()
    if target.suffix.lower() != ".csv":
        raise UserError(f"{path}: tables of images are written to a .csv")
    roots = [os.path.abspath(target.parent), str(target.parent.resolve()), *trusted_roots()]
    files = [os.path.abspath(image) for image in images]
    if not all(is_below(file, roots) for file in files):
        raise UserError(
            f"{path}: a table names images below its own folder, and these lie in {os.path.commonpath(files)}: write "
            "it there or above"
        )
    for name in _names_below(target, images):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{path}: the name {printable(name)[:200]!r} is not UTF-8, as a table is: rename it"
            ) from None
        if name != name.strip():
            raise UserError(f"{path}: {name!r:.200} would be read as {name.strip()!r:.200}: rename it first")
    for name in classes:
        if (labels := _split_labels(name)) != (name,) or name.lower() == "nan":
            read = "a missing value" if labels == (name,) else " and ".join(map(repr, labels))
            raise UserError(f"{path}: the class {name!r:.200} would be read as {read:.200}: rename it first")


def _names_below(target: Path, images: Iterable[Path]) -> list[str]:
    """The names of files in a table at `target`."""
    root = str(target.parent.resolve())
    places = [os.path.abspath(target.parent), root]  # by the links of the path, and without them
    files = map(os.path.abspath, images)
    return [os.path.relpath(file, next((place for place in places if is_below(file, [place])), root)) for file in files]


def _split(
    path: Path, rows: list[_Row], fraction: float, multilabel: bool, evaluation: bool
) -> tuple[list[_Row], NDArray[np.bool_], list[str]]:
    """The rows to use, a mask of those that are held out, and notes on both."""
    if not any(row.split for row in rows):
        first_labels = np.zeros(len(rows), int)
        if not multilabel:
            first_labels = np.unique([row.labels[0] for row in rows], return_inverse=True)[1]
        held_out = choose_validation([row.path for row in rows], first_labels, fraction)
        _keep_rare_labels(rows, held_out)
        if not held_out.any():
            if not evaluation:
                raise UserError(f"{path}: no class has two images, so none can be held out; add a split column or rows")
            return rows, ~held_out, [NONE_TO_HOLD_OUT]
        return (
            rows,
            held_out,
            [f"held out {held_out.mean():.0%} by the hash of the path; new rows move no old ones"],
        )

    named = {row.split for row in rows}
    for row in rows:
        if not row.split:
            raise UserError(f"{path}, row {row.number}: no split, though other rows have one; say train or val")
    if ("training" not in named or len(named) == 1) and not evaluation:
        raise UserError(f"{path}: its split column names only {', '.join(sorted(named))}; it needs train and val")
    held_out_name = "validation" if "validation" in named else "test"
    used = [row for row in rows if row.split in ("training", held_out_name)]
    used_names = [name for name in ("training", held_out_name) if name in named]
    notes = [f"split by its column split: {' and '.join(used_names)}"]
    return used, np.array([row.split == held_out_name for row in used]), notes


def _keep_rare_labels(rows: list[_Row], held_out: NDArray[np.bool_]) -> None:
    """Move held-out rows with a label that no training row has to training; the hash of a name ignores labels."""
    known = {label for row, out in zip(rows, held_out, strict=True) if not out for label in row.labels}
    for index in np.flatnonzero(held_out):
        if not known.issuperset(rows[index].labels):
            held_out[index] = False
            known.update(rows[index].labels)


def _check_validation_labels(path: Path, rows: list[_Row], held_out: NDArray[np.bool_]) -> None:
    known = {label for row, out in zip(rows, held_out, strict=True) if not out for label in row.labels}
    for row, out in zip(rows, held_out, strict=True):
        if out and (unknown := set(row.labels) - known):
            raise UserError(f"{path}, row {row.number}: the label {min(unknown)!r} is in no training row")


def _encode(path: Path, rows: list[_Row], classes: tuple[str, ...], multilabel: bool) -> NDArray:
    number = {name: index for index, name in enumerate(classes)}
    if not multilabel:
        return np.array([number[row.labels[0]] for row in rows], dtype=np.int64)
    first = next((row.number for row in rows if len(row.labels) > 1), 1)
    where = f"{path}: row {first} has several labels with ; or | between them;"
    labels = empty_label_table(where, len(rows), len(classes))
    for index, row in enumerate(rows):
        labels[index, [number[label] for label in row.labels]] = 1
    return labels


def _parse(path: Path, root: Path, number: int, image: str, label: object, split: str) -> _Row:
    where = f"{path}, row {number}"
    relative = _below(root, where, image)
    labels = _split_labels(label)
    if any(name.lower() == "nan" for name in labels):
        raise UserError(f"{where}: the label is {label!r:.80}, a missing value; write a class name or remove the row")
    return _Row(number, relative, labels, _parse_split(where, split))


def _split_labels(label: object) -> tuple[str, ...]:
    parts = [str(part) for part in label] if isinstance(label, list) else _SEPARATORS.split(str(label))
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _below(root: Path, where: str, image: str) -> str:
    """The path from `root` on."""
    if not image:
        raise UserError(f"{where}: the path is empty")
    if "\0" in image:
        raise UserError(f"{where}: the path {image!r:.80} holds a NUL, which no file name can")
    if "://" in image:
        raise UserError(f"{where}: {image!r:.80} is a URL, which is not opened: fetch the images and give their paths")
    if "\\" in image and os.sep == "/" and not os.path.exists(os.path.join(root, image)):
        image = image.replace("\\", "/")  # written on Windows
    whole, roots = os.path.normpath(os.path.join(root, image)), [str(root), *trusted_roots()]
    if not is_below(whole, roots):  # perhaps by way of a link to a folder above; one to the file itself is kept
        whole = os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))
    if whole == str(root) or not is_below(whole, roots):
        raise UserError(
            f"{where}: the path {image!r:.200} leads out of {root}; keep the images below the manifest, or name their "
            f"folder in {TRUSTED_ROOTS}"
        )
    return os.path.relpath(whole, root)


def _parse_split(where: str, split: str) -> str:
    known = {"training": TRAINING_NAMES, "validation": VALIDATION_NAMES, "test": TEST_NAMES}
    name = split.strip().lower()
    for meaning, spellings in known.items():
        if name in spellings:
            return meaning
    if name:
        raise UserError(f"{where}: the split is {split!r:.80}; it must be train, val or test")
    return ""


def _open_table(path: Path, required: Sequence[str]) -> _Table:
    """Raises UserError, here or with the rows, if it is no table with the required columns."""
    try:
        check_regular(path)
        return (_open_parquet if path.suffix.lower() == ".parquet" else _open_csv)(path, required)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _open_csv(path: Path, required: Sequence[str]) -> _Table:
    reader = None
    with open(path, "rb", opener=open_regular) as file:
        encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        with open(path, encoding=encoding, newline="", opener=open_regular) as file:
            first = next(_lines(path, file), "")
    except UnicodeError as error:
        raise _not_text(path, error) from error
    named = re.fullmatch(r'"?sep=(.)"?\s*', first)  # a line for Excel
    delimiters = "\t" + _DELIMITERS if path.suffix.lower() == ".tsv" else _DELIMITERS
    lines_before = 1 if named else 0

    def rows(delimiter: str, *, strict: bool = True) -> Generator[tuple[int, list[str]]]:
        nonlocal reader
        try:
            with open(path, encoding=encoding, newline="", opener=open_regular) as file:
                lines = islice(_lines(path, file), lines_before, None)
                reader = csv.reader(lines, delimiter=delimiter, strict=strict)
                yield from enumerate(reader, start=1 + lines_before)
        except UnicodeError as error:
            raise _not_text(path, error) from error
        except csv.Error as error:
            line = reader.line_num + lines_before if reader else 1
            raise UserError(f"{path}, line {line}: {error}; is a quotation mark left open or too many?") from error

    best: tuple[str, list[str], list[int | None]] | None = None
    for delimiter in [named[1]] if named else delimiters:
        with closing(rows(delimiter, strict=False)) as found:
            header = next(found, (1, []))[1]
        columns = _columns(header)
        if best is None or columns.count(None) < best[2].count(None):
            best = delimiter, header, columns
    assert best is not None
    delimiter, header, columns = best
    _require(path, header, columns, required)

    def cells() -> Generator[tuple[int, tuple[str, object, str]]]:
        with closing(rows(delimiter)) as found:
            for number, row in islice(found, 1, None):
                if not any(row):
                    continue
                if len(row) != len(header):
                    raise UserError(f"{path}, row {number}: {len(row)} cells where the header has {len(header)}")
                values = [row[column].strip() if column is not None else "" for column in columns]
                yield number, (values[0], values[1], values[2])

    unused = [name.strip() for number, name in enumerate(header) if number not in columns and name.strip()]
    return _Table([None if column is None else header[column].strip() for column in columns], cells(), unused)


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        if len(line) == _MAX_LINE:
            raise UserError(f"{path}, line {number}: more than {_MAX_LINE:,} characters; a row has one image")
        yield line


def _not_text(path: Path, error: UnicodeError) -> UserError:
    where = f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)
    return UserError(f"{path} is not UTF-8 text ({where}); save it as CSV UTF-8")


def _open_parquet(path: Path, required: Sequence[str]) -> _Table:
    parquet = import_extra("pyarrow.parquet", "parquet", f"{path}: Parquet")
    import pyarrow

    try:
        header = list(parquet.read_schema(path).names)
        columns = _columns(header)
        _require(path, header, columns, required)
        names = [None if column is None else header[column] for column in columns]
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                # Zero rows: reads the metadata of each column without a page of data. `RowGroupMetaData.column` ends
                # the process where that metadata contradicts itself, here it raises.
                list(file.reader.iter_batches(0, [group], range(file.metadata.num_columns), use_threads=False))
            dictionaries = _check_expansion(path, file.metadata, {name for name in names if name})
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        raise _not_parquet(path, error) from error

    def rows() -> Generator[tuple[int, tuple[str, object, str]]]:
        number = 0
        try:
            with parquet.ParquetFile(path, read_dictionary=dictionaries) as file:
                for batch in file.iter_batches(1024, columns=[name for name in names if name], use_threads=False):
                    values = [_values(path, batch, name) for name in names]
                    for image, label, split in zip(*values, strict=True):
                        number += 1
                        missing = label is None or label != label
                        yield number, (str(image or ""), "" if missing else label, str(split or ""))
        except UserError:
            raise
        # Also texts that are not UTF-8, dates that Python lacks, and columns of one name.
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
            raise _not_parquet(path, error) from error

    return _Table(names, rows(), [name for number, name in enumerate(header) if number not in columns])


def _check_expansion(path: Path, metadata: Any, names: set[str]) -> list[str]:
    """The columns of texts among `names`. Raises UserError if they hold far more than the size of the file explains."""
    size, values, unpacked, texts = path.stat().st_size, 0, 0, set()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] in names:
                values += column.num_values
                unpacked += column.total_uncompressed_size
                texts |= {column.path_in_schema} if column.physical_type == "BYTE_ARRAY" else set()
    values = max(values, metadata.num_rows)
    if values > _FREE_VALUES + _VALUES_PER_BYTE * size or unpacked > _FREE_BYTES + _UNPACKED_PER_BYTE * size:
        raise UserError(f"{path}: {values:,} values and {unpacked:,} bytes in {size:,}; no table of images repeats so")
    return sorted(texts)


def _values(path: Path, batch: Any, name: str | None) -> list[Any]:
    """The cells of a column. Texts come as a dictionary, so a long one that is repeated is seen before it is copied."""
    import pyarrow

    compute = import_extra("pyarrow.compute", "parquet", f"{path}: Parquet")
    if name is None:
        return [""] * batch.num_rows
    column = batch.column(name)
    inner = column.flatten() if pyarrow.types.is_list(column.type) else column
    if pyarrow.types.is_dictionary(inner.type):
        inner = inner.dictionary
    is_text = pyarrow.types.is_string(inner.type) or pyarrow.types.is_large_string(inner.type)
    if is_text and (longest := compute.max(compute.binary_length(inner)).as_py() or 0) > _MAX_CELL_BYTES:
        raise UserError(f"{path}: a cell of {name} has {longest:,} bytes; it may have {_MAX_CELL_BYTES:,}")
    return column.to_pylist()


def _not_parquet(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a readable Parquet file ({reason_of(error)})")


def _columns(header: Sequence[str]) -> list[int | None]:
    """Where path, label and split are."""
    known = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in header]
    return [next((known.index(name) for name in names if name in known), None) for names in _NAMES.values()]


def _require(path: Path, header: Sequence[str], columns: list[int | None], required: Sequence[str]) -> None:
    for name, column in zip(_NAMES, columns, strict=True):
        if name in required and column is None:
            found = one_line(shorten([name.strip()[:80] for name in header])) or "nothing"
            raise UserError(
                f"{path} has no column {name!r}; it has {found}. Its first row names the columns; "
                f"{', '.join(_NAMES[name][1:10])} are understood too"
            )
