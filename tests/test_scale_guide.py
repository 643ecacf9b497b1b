"""Every command of the guide to many machines is one that the program understands; its plans are really made."""

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import coatnet
from coatnet.cli import pack, train
from coatnet.cli.main import main
from coatnet.training.recipes.registry import RECIPES

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "guides" / "scale.md").read_text(encoding="utf-8")


def lines() -> list[list[str]]:
    """The words of each line of the guide's blocks of commands."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)).replace("\\\n", " ")
    return [words for line in blocks.splitlines() if (words := shlex.split(line, comments=True))]


def commands(program: str) -> list[list[str]]:
    """The arguments of each call of a program."""
    return [arguments for name, *arguments in lines() if name == program]


def of_command(command: str) -> list[list[str]]:
    return [arguments for given, *arguments in commands("coatnet") if given == command]


def test_no_command_is_left_out():
    assert {name for name, *_ in lines()} == {"coatnet", "torchrun", "pip"}
    assert {command for command, *_ in commands("coatnet")} == {"plan", "train", "pack"}


@pytest.mark.parametrize("arguments", of_command("plan"), ids=" ".join)
def test_a_plan_is_made(arguments, capsys):
    model, *rest = arguments
    assert model in coatnet.list_variants()
    assert main(["plan", "coatnet-femto", *rest]) == 0  # a small network, for the time it takes
    page = capsys.readouterr().out
    assert "torchrun" in page and "gradients" in page


@pytest.mark.parametrize("arguments", of_command("train"), ids=" ".join)
def test_a_training_is_understood(arguments):
    recipe, shell = train.parse_arguments(arguments)
    assert recipe.data and shell.out


@pytest.mark.parametrize("arguments", of_command("pack"), ids=" ".join)
def test_a_packing_is_understood(arguments):
    assert pack.parse_arguments(arguments).out


@pytest.mark.parametrize("arguments", commands("torchrun"), ids=" ".join)
def test_torchrun_understands_how_it_starts_a_training(arguments):
    given = get_args_parser().parse_args(arguments)
    assert given.module and given.training_script == "coatnet"
    command, *rest = given.training_script_args
    recipe, shell = train.parse_arguments(rest)
    assert command == "train" and recipe.data and shell.out


def test_step_counts_are_those_of_the_recipes():
    rows = re.findall(r"(?m)^\| (`.*?`[^|]*)\|.*\| ([\d,]+) \|$", GUIDE)
    assert len(rows) == 7
    for names, steps in rows:
        first, *_ = re.findall(r"`(.*?)`", names)
        assert RECIPES[first].steps == int(steps.replace(",", "")), first
