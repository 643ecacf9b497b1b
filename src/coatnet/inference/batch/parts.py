"""Finished parts beside the file that they become: each whole or not there, joined when all are there."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coatnet.errors import UserError
from coatnet.inference.batch.partitions import Plan
from coatnet.inference.batch.predict_batch import Row
from coatnet.system.files import atomic_files, atomic_write, commit_files, file_lock

ROWS_OF_A_GROUP = 65_536  # chosen: large enough to be read fast, some 10 MB of memory while it is gathered
MOST_NAMED = 20
_PLAN = b"coatnet"  # the key of the plan in the metadata of the file


@dataclass(frozen=True)
class Predictions:
    """A finished file; `bad` are the first of its images that could not be used, each with the reason."""

    path: Path
    num_images: int
    num_bad: int
    bad: tuple[tuple[str, str], ...]


def require_parquet(out: str | Path) -> Path:
    """Raises UserError if `out` is no .parquet, or pyarrow is missing."""
    if Path(out).suffix.lower() != ".parquet":
        raise UserError(f"{out}: predictions are written to a .parquet")
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(f"{out}: Parquet needs pyarrow: pip install 'coatnet[parquet]'") from None
    return Path(out).expanduser().absolute()


def schema(metadata: dict[bytes, str] | None = None) -> Any:
    """The columns of the file, which are the fields of `Row`."""
    import pyarrow

    text, number = pyarrow.string(), pyarrow.float32()
    kinds = (text, text, text, number, pyarrow.list_(text), pyarrow.list_(number), text)
    return pyarrow.schema(list(zip(Row._fields, kinds, strict=True)), metadata=metadata)


class Parts:
    """The parts of `out`, in a folder beside it that is gone when they are joined."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out, self.plan = out, plan
        self.folder = out.with_name(f".{out.name}.parts")

    def begin(self) -> None:
        """Go on with what earlier processes left, if they had the same plan.

        Raises:
            UserError: they had another.
        """
        path = self.folder / "plan.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            atomic_write(path, self.plan.to_json())  # as all processes of this run do, with the same text
        elif difference := self.plan.difference(path.read_text()):
            raise UserError(
                f"{self.out} was begun with {difference}: go on with the same command, or remove {self.folder}"
            )

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Those of the parts that are not there."""
        found = set(os.listdir(self.folder)) if self.folder.exists() else set()
        return [number for number in numbers if self._path(number).name not in found]

    def write(self, number: int, rows: Sequence[Row]) -> None:
        """One part, on the disk when this returns."""
        import pyarrow
        from pyarrow import parquet

        columns = [list(column) for column in zip(*rows, strict=True)]
        with atomic_files(self._path(number)) as (staged,):
            parquet.write_table(pyarrow.table(columns, schema=schema()), staged)

    def join_if_complete(self) -> None:
        """Make the file of the parts if all are there, unless another process does or has done."""
        try:
            with file_lock(self.folder / "joining", wait=False):
                if not self.missing(range(self.plan.num_parts)):
                    self._join()
        except (BlockingIOError, FileNotFoundError):
            pass

    def finished(self) -> Predictions | None:
        """The file, if it is there.

        Raises:
            UserError: it is another one.
        """
        import pyarrow
        from pyarrow import parquet

        if not self.out.exists():
            return None
        taken = f"{self.out} is there already"
        try:
            file = parquet.ParquetFile(self.out)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{taken}, and is no predictions; give another name, or remove it first") from error
        with file:
            plan = (file.schema_arrow.metadata or {}).get(_PLAN)
            if plan is None or (difference := self.plan.difference(plan.decode())):
                why = f"made with {difference}" if plan else "not of this program"
                raise UserError(f"{taken}, {why}; give another name, or remove it first")
            num_bad, bad = 0, []
            for batch in file.iter_batches(columns=["path", "error"]):
                found = batch.filter(batch["error"].is_valid())
                num_bad += len(found)
                bad += found.slice(0, MOST_NAMED - len(bad)).to_pylist()
            shutil.rmtree(self.folder, ignore_errors=True)
            named = tuple((each["path"], each["error"]) for each in bad)
            return Predictions(self.out, file.metadata.num_rows, num_bad, named)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"

    def _join(self) -> None:
        import pyarrow
        from pyarrow import parquet

        staged, tables = self.folder / "joined", []
        columns = schema({_PLAN: self.plan.to_json()})
        with parquet.ParquetWriter(staged, columns) as writer:
            for number in range(self.plan.num_parts):
                tables.append(self._read(number).replace_schema_metadata(columns.metadata))
                last = number == self.plan.num_parts - 1
                if last or sum(map(len, tables)) >= ROWS_OF_A_GROUP:
                    writer.write_table(pyarrow.concat_tables(tables), row_group_size=2 * ROWS_OF_A_GROUP)
                    tables = []
        commit_files([staged], [self.out])

    def _read(self, number: int) -> Any:
        """A part, held to its number of rows: a disk may have lost what it said it had."""
        import pyarrow
        from pyarrow import parquet

        path = self._path(number)
        try:
            table = parquet.read_table(path, schema=schema())
            if len(table) == len(self.plan.part(number)):
                return table
        except pyarrow.ArrowException:
            pass
        path.unlink()
        raise UserError(f"{path} was damaged and is removed; the same command makes it again")
