"""The parts of a prediction file: planned, written to a folder beside the file, and joined when all are there."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from coatnet.data.decode import MAX_PIXELS
from coatnet.errors import UserError, import_extra
from coatnet.inference.batch.samples import Row
from coatnet.system.files import (
    atomic_files,
    atomic_write,
    check_regular,
    commit_files,
    file_lock,
    is_leftover,
    output_path,
    read_regular,
    sha256_of,
)
from coatnet.system.json_reader import parse_json, require_object

# chosen: a thousand parts, so that little is lost with a process and many processes share evenly, within bounds: a file
# for fewer than 64 images costs more than it saves, and 4,096 rows are some MB to hold until they are written.
MAX_PARTS, MIN_PART_IMAGES, MAX_PART_IMAGES = 1024, 64, 4096
ROW_GROUP_ROWS = 65_536  # chosen: large enough to be read fast, some 10 MB of memory while it is collected
MAX_NAMED_IMAGES = 20
_CSV_BLOCK_BYTES = 1 << 25  # chosen: a row must fit; all 21,841 classes of ImageNet-21k are 1 MB
_PLAN_METADATA = b"coatnet"  # the key of the plan in the metadata of the file


@dataclass(frozen=True)
class Plan:
    """What a prediction file is computed from; parts of different plans cannot be joined.

    A part is a range of images that depends on their number and the batch size alone, so it is the same work for any
    number of processes.

    Attributes:
        model: fingerprint of the bundle.
        versions: of the packages that compute, whose sums may differ in their last bits.
        images: hash of the images' names and labels, from `SampleSource.identity`.
        num_images: number of images.
        engine: name of the engine.
        precision: fp32 or bf16.
        views: test-time augmentation.
        top_k: number of classes per image.
        batch_size: images computed together; with another one sums differ in their last bits.
        reject: the share of familiar images that may be refused.
        coverage: of the sets of classes.
        set_method: of the sets of classes; None without sets.
        max_megapixels: that an image may have.
    """

    model: str
    versions: str
    images: str
    num_images: int
    engine: str
    precision: str
    views: str
    top_k: int
    batch_size: int = 32
    reject: float | None = None
    coverage: float | None = None
    set_method: str | None = None
    max_megapixels: float = MAX_PIXELS / 1e6

    @property
    def part_size(self) -> int:
        """Images per part, in whole batches."""
        size = min(MAX_PART_IMAGES, max(MIN_PART_IMAGES, self.num_images // MAX_PARTS))
        return -(-size // self.batch_size) * self.batch_size

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return -(-self.num_images // self.part_size)

    def part(self, number: int) -> range:
        """Indices of the images of a part."""
        return range(number * self.part_size, min((number + 1) * self.part_size, self.num_images))

    def to_dict(self) -> dict[str, str | int | float | None]:
        """The plan as plan.json and the metadata of the file store it."""
        return asdict(self)

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict())

    def difference(self, other: str, *, finished: bool = False) -> str | None:
        """Describe the first difference of another plan, given as JSON; None if there is none.

        What is `finished` has the rows of one version, whichever that is. What an older plan lacks is the default.
        """
        try:
            values = require_object(parse_json(other, "plan"), "plan")
        except UserError:
            return "an unreadable plan"
        for name, value in self.to_dict().items():
            theirs = values.get(name, getattr(Plan, name, None))
            if theirs != value and not (finished and name == "versions"):
                known = {"model": "another model", "images": "other images or labels", "num_images": "other images"}
                words = "" if name == "versions" else f"{name.replace('_', ' ')} "
                option = f" (--{name} {theirs} is the same)" if name in ("engine", "precision", "views") else ""
                return known.get(name) or f"{words}{theirs} where this has {value}{option}"
        return None


@dataclass(frozen=True)
class PredictionFile:
    """A complete file of predictions.

    Attributes:
        path: of the file.
        num_images: number of rows.
        num_bad: number of unreadable images among them.
        bad: name and error of the first 20 of these.
    """

    path: Path
    num_images: int
    num_bad: int
    bad: tuple[tuple[str, str], ...]


def require_table(out: str | Path) -> Path:
    """Return the absolute path. Raises UserError if it ends neither in .parquet nor in .csv, or pyarrow is missing."""
    if Path(out).suffix.lower() not in (".parquet", ".csv"):
        raise UserError(f"{out}: predictions are written to a .parquet or a .csv")
    import_extra("pyarrow.parquet", "parquet", f"{out}: Parquet, of which the parts of a .csv are too,")
    return output_path(out).absolute()


def schema(metadata: dict[bytes, str] | None = None) -> Any:
    """The pyarrow schema of the file, whose columns are the fields of `Row`."""
    import pyarrow

    text, number = pyarrow.string(), pyarrow.float32()
    types = (text, text, text, number, pyarrow.list_(text), pyarrow.list_(number), text)
    types += (number, pyarrow.bool_(), pyarrow.list_(text))
    return pyarrow.schema(list(zip(Row._fields, types, strict=True)), metadata=metadata)


class Parts:
    """The parts of a file, in a folder beside it, `.NAME.parts`, that is removed when they are joined.

    A CSV has no place for the plan, so for one the folder stays, with the plan and the SHA-256 of the file.
    """

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out, self.plan = out, plan
        self.folder = out.with_name(f".{out.name}.parts")
        self.is_csv = out.suffix.lower() == ".csv"
        self._checksum = self.folder / "joined.sha256"  # of a CSV

    def begin(self) -> None:
        """Make the folder with the plan, or continue with one whose plan is the same.

        A plan of which nothing was computed yet, since its first process failed, gives way to this one.

        Raises:
            UserError: its plan is another one.
        """
        path = self.folder / "plan.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = read_regular(path).decode(errors="replace") if path.exists() else None
        if stored is None or (self.plan.difference(stored) and self._is_unused()):
            atomic_write(path, self.plan.to_json())  # other processes of this run may do so too, with the same text
        elif difference := self.plan.difference(stored):
            raise UserError(
                f"{self.out} was begun with {difference}: continue as it was begun, or remove {self.folder}"
            )

    def _is_unused(self) -> bool:
        """Whether the folder has no part, and no process works in it."""
        try:
            for entry in self.folder.iterdir():
                if entry.name.startswith("process-"):
                    with file_lock(entry, wait=False):
                        pass
                elif entry.suffix == ".parquet" and not is_leftover(entry.name):
                    return False
        except BlockingIOError:
            return False
        return True

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Those of the parts that are not written yet."""
        found = set(os.listdir(self.folder)) if self.folder.exists() else set()
        return [number for number in numbers if self._path(number).name not in found]

    def write(self, number: int, rows: Sequence[Row]) -> None:
        """Write one part, atomically."""
        import pyarrow
        from pyarrow import parquet

        columns = [list(column) for column in zip(*rows, strict=True)]
        try:
            table = pyarrow.table(columns, schema=schema())
        except UnicodeEncodeError:  # a class or label holds lone surrogates, which UTF-8 cannot encode
            table = pyarrow.table([list(map(_escaped, column)) for column in columns], schema=schema())
        path = self._path(number)
        with atomic_files(path.with_suffix(".sha256"), path) as (checksum, staged):  # the part is renamed last
            parquet.write_table(table, staged)
            checksum.write_text(sha256_of(staged))

    def join_if_complete(self) -> None:
        """Join the parts if all are there, unless another process does or did.

        The parts are counted before the lock is taken: a process that finds it taken may leave, since its holder found
        all parts and joins them.
        """
        try:
            if self.missing(range(self.plan.num_parts)):
                return
            with file_lock(self.folder / "joining", wait=False):
                if not self.out.exists():
                    self._join()
        except (BlockingIOError, FileNotFoundError):
            pass

    def finished(self) -> PredictionFile | None:
        """Read the file if it is there, and remove the folder of parts; None if it is not.

        Raises:
            UserError: the file is not one of predictions, or has another plan.
        """
        import pyarrow
        from pyarrow import parquet

        if not self.out.exists():
            return None
        if self.is_csv:
            return self._finished_csv()
        exists = f"{self.out} is there already"
        try:
            check_regular(self.out)
            file = parquet.ParquetFile(self.out)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{exists}, and is not a file of predictions; give another name, or remove it first"
            ) from error
        with file:
            plan = (file.schema_arrow.metadata or {}).get(_PLAN_METADATA)
            if plan is None or (difference := self.plan.difference(plan.decode(errors="replace"), finished=True)):
                why = f"made with {difference}" if plan else "not made by this program"
                raise UserError(f"{exists}, {why}; give another name, or remove it first")
            num_bad, bad = 0, []
            for batch in file.iter_batches(columns=["path", "error"]):
                found = batch.filter(batch["error"].is_valid())
                num_bad += len(found)
                bad += found.slice(0, MAX_NAMED_IMAGES - len(bad)).to_pylist()
            shutil.rmtree(self.folder, ignore_errors=True)
            first_bad = tuple((each["path"], each["error"]) for each in bad)
            return PredictionFile(self.out, file.metadata.num_rows, num_bad, first_bad)

    def _finished_csv(self) -> PredictionFile:
        exists, plan = f"{self.out} is there already", self.folder / "plan.json"
        if not self._checksum.exists() or read_regular(self._checksum).decode(errors="replace") != sha256_of(self.out):
            raise UserError(f"{exists}, not made by this program or changed; give another name, or remove it first")
        if difference := self.plan.difference(read_regular(plan).decode(errors="replace"), finished=True):
            raise UserError(f"{exists}, made with {difference}; give another name, or remove it first")
        import pyarrow
        from pyarrow import csv

        named = csv.ConvertOptions(
            include_columns=["path", "error"], column_types=dict.fromkeys(Row._fields, pyarrow.string())
        )
        whole_rows = csv.ReadOptions(block_size=_CSV_BLOCK_BYTES), csv.ParseOptions(newlines_in_values=True)
        num_images, num_bad, bad = 0, 0, []
        with csv.open_csv(self.out, *whole_rows, named) as batches:
            for batch in batches:
                num_images += len(batch)
                found = [(row["path"], row["error"]) for row in batch.to_pylist() if row["error"]]
                num_bad += len(found)
                bad += found[: MAX_NAMED_IMAGES - len(bad)]
        for entry in self.folder.iterdir():
            if entry not in (plan, self._checksum):
                entry.unlink(missing_ok=True)
        return PredictionFile(self.out, num_images, num_bad, tuple(bad))

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"

    def _join(self) -> None:
        import pyarrow
        from pyarrow import parquet

        staged, tables = self.folder / "joined", []
        columns = schema({_PLAN_METADATA: self.plan.to_json()})
        if self.is_csv:
            with staged.open("wb") as file:
                for number in range(self.plan.num_parts):
                    _write_csv(self._read(number), file, header=number == 0)
            atomic_write(self._checksum, sha256_of(staged))
            commit_files([staged], [self.out])
            return
        with parquet.ParquetWriter(staged, columns) as writer:
            for number in range(self.plan.num_parts):
                tables.append(self._read(number).replace_schema_metadata(columns.metadata))
                last = number == self.plan.num_parts - 1
                if last or sum(map(len, tables)) >= ROW_GROUP_ROWS:
                    writer.write_table(pyarrow.concat_tables(tables), row_group_size=2 * ROW_GROUP_ROWS)
                    tables = []
        commit_files([staged], [self.out])

    def _read(self, number: int) -> Any:
        """Read a part and check its bytes and its number of rows: a disk may lose or change what it confirmed."""
        import pyarrow
        from pyarrow import parquet

        path = self._path(number)
        checksum = path.with_suffix(".sha256")
        try:
            if checksum.exists() and read_regular(checksum).decode(errors="replace") == sha256_of(path):
                table = parquet.read_table(path, schema=schema())
                if len(table) == len(self.plan.part(number)):
                    return table
        except pyarrow.ArrowException:
            pass
        path.unlink()
        raise UserError(f"{path} was damaged and is removed; the same command writes it again")


def _escaped(value: Any) -> Any:
    r"""A cell of a row with lone surrogates in its texts as \udcNN, as reports have them."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return list(map(_escaped, value)) if isinstance(value, list | tuple) else value


def _write_csv(table: Any, file: BinaryIO, *, header: bool) -> None:
    """Append the rows of a part as CSV; a list becomes JSON, since names may hold any separator."""
    import pyarrow
    from pyarrow import csv as arrow_csv

    for place, column in enumerate(table.schema):
        if pyarrow.types.is_list(column.type):
            texts = [
                None
                if values is None
                else json.dumps([float(f"{each:.9g}") if isinstance(each, float) else each for each in values])
                for values in table.column(place).to_pylist()
            ]
            table = table.set_column(place, column.name, pyarrow.array(texts, pyarrow.string()))
    arrow_csv.write_csv(table, file, arrow_csv.WriteOptions(include_header=header))
