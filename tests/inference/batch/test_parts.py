"""Parts of a batch prediction cover every image once, for any number of processes."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coatnet.inference.batch.parts import Plan

PLAN = Plan("a", "b", 1000, "torch", "fp32", "one", 5)


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


def test_plans_describe_their_difference() -> None:
    assert PLAN.difference(PLAN.to_json()) is None
    assert PLAN.difference(replace(PLAN, model="c").to_json()) == "another model"
    assert PLAN.difference(replace(PLAN, num_images=9).to_json()) == "other images"
    assert PLAN.difference(replace(PLAN, top_k=1).to_json()) == "top k 1 where this has 5"
    assert PLAN.difference("[]") == PLAN.difference("{") == "an unreadable plan"
