"""Text on the terminal, and the length of errors."""

import json
import time

import numpy as np
import pytest

from coatnet.data import ArrayDataset, Splits
from coatnet.data.inspection import inspect
from coatnet.errors import UserError
from coatnet.system import terminal
from coatnet.system.progress import ProgressBar
from coatnet.system.terminal import echo, escape_lines, report_wait

HOSTILE = "cat\x1b[2J\x9b31m\r\u202etac\u2066\n  note     healthy\x07"


def test_control_characters_are_escaped_and_lines_stay(capsys: pytest.CaptureFixture[str]) -> None:
    echo("first\nsecond \x1b[31m\u202e", end="")
    assert capsys.readouterr().out == "first\nsecond \\x1b[31m\\u202e"
    assert escape_lines("grün 猫 \u200d👍") == "grün 猫 \u200d👍"


def test_json_stays_json_of_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    echo(json.dumps({"name": HOSTILE}, ensure_ascii=False, indent=1), is_json=True)
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"name": HOSTILE} and "\x9b" not in printed and "\u202e" not in printed


def test_an_error_is_one_line_of_a_bounded_length() -> None:
    message = str(UserError(f"the name {'x' * 1_000_000}{HOSTILE} is long; give another"))
    assert len(message) < 2_000 and "\n" not in message and "\x1b" not in message
    assert message.startswith("the name x") and message.endswith("is long; give another")


def test_names_of_classes_cannot_forge_lines_of_a_summary() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 8), np.uint8)
    images = ArrayDataset("noise\x1b[1m", (HOSTILE, "y" * 5_000), pixels, np.array([0, 1, 0, 1]))
    found = inspect(Splits("noise\nhealthy", images, images, notes=(f"from {HOSTILE}",)))
    described = found.describe()
    assert not {"\x1b", "\x9b", "\r", "\u202e", "\x07"} & set(described)
    assert [line for line in described.splitlines() if "healthy" in line and "\\n" not in line] == [
        "not healthy"  # the images of both splits are the same
    ]  # its own verdict
    assert max(map(len, described.splitlines())) < 2_000


def test_a_wait_is_told_once_it_is_long(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with report_wait("nothing long"):
        pass
    monkeypatch.setattr(terminal, "REPORTED_WAIT_SECONDS", 0.0)

    @report_wait("reading a")
    def slow() -> int:
        time.sleep(0.2)
        return 3

    assert slow() == 3
    with ProgressBar("packing"):  # standard error is not a terminal here
        time.sleep(0.2)
    with ProgressBar("the other processes", shown=False):
        time.sleep(0.05)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "coatnet: reading a\ncoatnet: packing\n"
