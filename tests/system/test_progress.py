"""Progress bars are shown on a terminal only, on standard error."""

import pytest
from rich.console import Console

from coatnet.system.progress import ProgressBar, track


def test_nothing_is_shown_if_standard_error_is_not_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "counting", 3)) == [0, 1, 2]
    with ProgressBar("counting") as bar:
        bar.update(1, 2)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_description_amounts_and_unit(capfd: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("packing", 2000, "images") as bar:
        bar.advance(1500)
    out, err = capfd.readouterr()
    assert out == "" and "packing" in err and "1,500/2,000 images" in err
    with ProgressBar("measuring") as bar:
        bar.update(1, 4)
    assert "25%" in capfd.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_a_bar_that_is_not_shown_is_silent_on_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("predicting", 2, shown=False) as bar:
        bar.advance()
    assert capfd.readouterr() == ("", "")
