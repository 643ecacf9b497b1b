"""What a person sees of a training: on a real pseudo-terminal, of 100 columns, and in a file."""

import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest
from rich.console import Console

from coatnet.training import progress
from coatnet.training.config import Recipe
from coatnet.training.progress import TrainingProgress
from coatnet.training.run import train

COMMAND = [sys.executable, "-m", "coatnet", "train", "--data", "digits", "--epochs", "0.5"]


def shown_on_a_terminal(command, columns=100):
    """Exit code, and every state that a line of the terminal had, of a command whose output goes there."""
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    said = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment = {**said, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    written = bytearray()
    while True:
        try:
            written += os.read(leader, 65_536)
        except OSError:  # Linux's end of a terminal that nobody holds any more
            break
    os.close(leader)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    return process.wait(60), re.split(r"[\r\n]+", plain)


@pytest.mark.slow
def test_a_bar_shows_step_loss_rate_speed_and_time_left(tmp_path):
    code, lines = shown_on_a_terminal([*COMMAND, "--out", str(tmp_path / "run")])
    assert code == 0, "\n".join(lines)
    bars = [line for line in lines if line.startswith("step ")]
    assert re.fullmatch(
        r"step \d+/\d+ [━╸╺]+ loss \d\.\d{3}  learning rate \d\.\de-\d\d  [\d,]+ images/s \d:\d\d:\d\d left", bars[-1]
    )
    steps = [tuple(map(int, re.findall(r"\d+", line)[:2])) for line in bars]
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    assert max(map(len, bars)) <= 100


@pytest.mark.slow
def test_without_a_terminal_lines_show_the_same_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO(), force_terminal=False, soft_wrap=True)
    train(Recipe(data="digits", epochs=0.5), tmp_path / "run", console=console)
    written = console.file.getvalue()
    lines = [line for line in written.splitlines() if line.startswith("step ")]
    assert re.fullmatch(r"step 1/13  epoch 0.04  loss \d\.\d{3}  learning rate \d\.\de-\d\d  [\d,]+ images/s", lines[0])
    assert re.fullmatch(r"step 13/13  epoch 0.52  loss .* images/s  \d:\d\d:\d\d left", lines[-1])
    assert "━" not in written and "\x1b" not in written


def test_names_in_a_line_are_no_emoji_and_no_markup():
    console = Console(file=io.StringIO(), width=80)
    TrainingProgress(console).say("data a:dog:b [red]x[/red]")
    assert console.file.getvalue() == "data a:dog:b [red]x[/red]\n"
