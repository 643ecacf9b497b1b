"""Every command of the guide to many machines is one that the program understands."""

import re
import shlex
from pathlib import Path

import pytest

from coatnet.arguments.looking import pack_arguments, plan_arguments
from coatnet.arguments.train import train_arguments

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "scale.md"
READERS = {"plan": plan_arguments, "train": train_arguments, "pack": pack_arguments}


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line[line.index("coatnet ") :] for line in lines if "coatnet " in line]


@pytest.mark.parametrize("command", commands())
def test_the_command_is_understood(command: str) -> None:
    _, verb, *arguments = shlex.split(command, comments=True)
    READERS[verb](arguments)
