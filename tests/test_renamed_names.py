"""An old name works for one release, warns at the line that uses it, and is not forgotten afterwards."""

import re
from pathlib import Path

import pytest

from coatnet.public_names import renamed_attribute, warn_renamed
from coatnet.version import __version__

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "coatnet"
MESSAGE = "is deprecated since coatnet 0.2 and will be removed in 0.3; use"


class Box:
    width = 3
    breadth = renamed_attribute("breadth", "width", since="0.2", removed_in="0.3")


def test_a_renamed_attribute_reads_the_new_one_and_warns_at_the_reader() -> None:
    with pytest.warns(FutureWarning, match=f"^Box.breadth {MESSAGE} Box.width$") as caught:
        assert Box().breadth == 3
    assert [warning.filename for warning in caught] == [__file__]


def test_new_names_do_not_warn() -> None:
    assert Box().width == 3


def test_a_renamed_name_of_a_module_warns_at_its_user() -> None:
    def __getattr__(name: str) -> str:
        warn_renamed(f"coatnet.{name}", "coatnet.new", since="0.2", removed_in="0.3")
        return name

    with pytest.warns(FutureWarning, match=rf"^coatnet.old {MESSAGE} coatnet.new$") as caught:
        assert __getattr__("old") == "old"
    assert [warning.filename for warning in caught] == [__file__]


def test_nothing_that_this_release_should_have_removed_is_left() -> None:
    def as_numbers(version: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", version)[:2]))

    for path in PACKAGE.rglob("*.py"):
        for removed_in in re.findall(r"removed_in=\"([\d.]+)\"", path.read_text(encoding="utf-8")):
            assert as_numbers(__version__) < as_numbers(removed_in), f"{path.name}: due to be removed in {removed_in}"
