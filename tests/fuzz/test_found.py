"""Inputs that once were faults of a reader stay mended, and the fuzzer itself works: `make fuzz` finds more."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fuzz.__main__ import FOUND
from tests.fuzz.child import HOSTILE, read_within_bounds
from tests.fuzz.targets import Target, make_targets

INPUTS = sorted(FOUND.iterdir())


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("fuzz")
        patch.setenv("COATNET_CACHE_DIR", str(folder / "cache"))  # which `make_targets` sets, and this restores
        yield make_targets(folder)


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore")
def test_an_input_that_was_a_fault_is_one_error(path: Path, targets: dict[str, Target]) -> None:
    name = path.name.rpartition("-")[0]
    if name not in targets:
        pytest.skip(f"{name} needs a package that is not installed")
    read_within_bounds(targets[name].read, path.read_bytes())


def test_every_target_reads_its_seeds_and_hostile_ones(targets: dict[str, Target]) -> None:
    for target in targets.values():
        for content in target.seeds:
            target.read(content)
        for content in (b"", HOSTILE[0], target.seeds[0][: len(target.seeds[0]) // 2]):
            read_within_bounds(target.read, content)
