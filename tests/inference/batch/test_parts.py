"""Parts of a batch prediction cover every image once, for any number of processes."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatnet.errors import UserError
from coatnet.inference.batch.parts import Parts, Plan
from coatnet.inference.batch.samples import Row
from coatnet.system.files import file_lock

PLAN = Plan("a", "torch 2", "b", 1000, "torch", "fp32", "one", 5)


@given(st.integers(1, 10**10))
def test_number_and_size_of_parts_are_bounded(num_images: int) -> None:
    plan = replace(PLAN, num_images=num_images)
    assert plan.part(0).start == 0 and plan.part(plan.num_parts - 1).stop == num_images
    assert 64 <= plan.part_size <= 4096
    assert 1 <= len(plan.part(plan.num_parts - 1)) <= plan.part_size
    assert plan.num_parts <= 2048 or plan.part_size == 4096


@given(st.integers(1, 20_000))
def test_parts_are_contiguous(num_images: int) -> None:
    plan = replace(PLAN, num_images=num_images)
    covered = [plan.part(number) for number in range(plan.num_parts)]
    assert all(before.stop == after.start for before, after in pairwise(covered))


@given(st.integers(1, 10**7), st.integers(1, 10_000))
def test_parts_hold_whole_batches(num_images: int, batch_size: int) -> None:
    plan = replace(PLAN, num_images=num_images, batch_size=batch_size)
    assert plan.part_size % batch_size == 0 and 64 <= plan.part_size < 4096 + batch_size


def test_a_plan_of_an_older_version_had_the_default_limit_of_pixels() -> None:
    older = json.dumps({name: value for name, value in PLAN.to_dict().items() if name != "max_megapixels"})
    assert PLAN.difference(older) is None
    larger = replace(PLAN, max_megapixels=400.0)
    assert larger.difference(older) == "max megapixels 200.0 where this has 400.0"


def test_plans_describe_their_difference() -> None:
    assert PLAN.difference(PLAN.to_json()) is None
    assert PLAN.difference(replace(PLAN, model="c").to_json()) == "another model"
    assert PLAN.difference(replace(PLAN, versions="torch 1").to_json()) == "torch 1 where this has torch 2"
    assert PLAN.difference(replace(PLAN, versions="torch 1").to_json(), finished=True) is None
    assert PLAN.difference(replace(PLAN, num_images=9).to_json()) == "other images"
    assert PLAN.difference(replace(PLAN, top_k=1).to_json()) == "top k 1 where this has 5"
    assert PLAN.difference("[]") == PLAN.difference("{") == "an unreadable plan"


def parts_of(folder: Path, **changes: Any) -> Parts:
    parts = Parts(folder / "out.parquet", replace(PLAN, num_images=100, **changes))  # two parts
    parts.begin()
    return parts


def rows(numbers: range) -> list[Row]:
    return [Row(f"{number}.png", None, "a", 0.5, ("a", "b"), (0.5, 0.5), None) for number in numbers]


def test_one_flipped_bit_of_a_part_is_found(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    parts = parts_of(tmp_path)
    for number in range(2):
        parts.write(number, rows(parts.plan.part(number)))
    path = parts.folder / "part-000001.parquet"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 8 * len(whole) // 40):  # names, values, statistics, footer
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"part-000001.parquet was damaged and is removed"):
            parts.join_if_complete()
        assert not path.exists() and not parts.out.exists()
    parts.write(1, rows(parts.plan.part(1)))
    assert path.read_bytes() == whole
    parts.join_if_complete()
    finished = parts.finished()
    assert finished is not None and finished.num_images == 100 and not parts.folder.exists()


def test_another_batch_size_is_refused_once_a_part_is_there(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    parts_of(tmp_path, batch_size=512)  # which failed: too little memory
    parts = parts_of(tmp_path, batch_size=8)
    with file_lock(parts.folder / "process-1"), pytest.raises(UserError, match="with batch size 8 where this has 4"):
        parts_of(tmp_path, batch_size=4)  # another process has begun
    parts.write(0, rows(parts.plan.part(0)))
    with pytest.raises(UserError, match="was begun with batch size 8 where this has 32"):
        parts_of(tmp_path)


def test_parts_are_joined_though_two_processes_end_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process writes the last part, and finds the lock taken, while this one has it and has counted."""
    pytest.importorskip("pyarrow")
    this, other = parts_of(tmp_path), parts_of(tmp_path)
    this.write(0, rows(this.plan.part(0)))
    count = Parts.missing

    def counted(parts: Parts, numbers: Sequence[int]) -> list[int]:
        found = count(parts, numbers)
        if parts is this and not other.missing([0]) and other.missing([1]):
            other.write(1, rows(other.plan.part(1)))
            other.join_if_complete()
        return found

    monkeypatch.setattr(Parts, "missing", counted)
    this.join_if_complete()
    finished = this.finished()
    assert finished is not None and finished.num_images == 100


@pytest.mark.parametrize("name", ["out.parquet", "out.csv"])
def test_parts_are_joined_once(tmp_path: Path, name: str) -> None:
    """Another process may count the parts while they are joined, and get the lock afterwards."""
    pytest.importorskip("pyarrow")
    parts = Parts(tmp_path / name, replace(PLAN, num_images=100))
    parts.begin()
    for number in range(2):
        parts.write(number, rows(parts.plan.part(number)))
    parts.join_if_complete()
    joined = parts.out.stat()
    parts.join_if_complete()
    assert parts.out.stat() == joined
    finished = parts.finished()
    assert finished is not None and finished.num_images == 100


@pytest.mark.parametrize("damage", ["", "[" * 100_000, "[]", '{"model": [], "images": {}}', "\0" * 999])
def test_a_damaged_plan_is_one_line(tmp_path: Path, damage: str) -> None:
    pytest.importorskip("pyarrow")
    parts = parts_of(tmp_path)
    parts.write(0, rows(parts.plan.part(0)))
    (parts.folder / "plan.json").write_text(damage)
    with pytest.raises(UserError, match=r"was begun with .*: continue as it was begun, or remove"):
        parts_of(tmp_path)
