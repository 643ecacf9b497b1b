"""Rows of the table that the default suite holds already: here they are run once more, for the table."""

import subprocess
import sys

import pytest
from tests.training import launching


def passes(*chosen: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not nightly and not faults",
        *chosen,
    ]
    ended = subprocess.run(command, cwd=launching.ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout[-3000:]


@pytest.mark.fault("B3", "a NaN image on one of two processes (DDP, FSDP2)", "both stop, no weight moved")
@pytest.mark.fault("B8", "stopped after step 3 of 6: 1 process, DDP, FSDP2, accumulating", "bit for bit")
def test_two_processes():
    passes("tests/training/distributed/test_processes.py")


@pytest.mark.fault("B8", "one process stopped, or killed, and started again", "bit for bit the run never stopped")
def test_one_process():
    passes("tests/training/test_trainer.py", "-k", "resumed or interrupted or killed")


@pytest.mark.fault("B12", "checkpoints with a missing, cut, flipped, foreign or future file", "the one before, loudly")
def test_damaged_checkpoints():
    passes("tests/training/test_checkpoint.py", "tests/training/test_async_checkpoint.py")


@pytest.mark.fault("B13", "a logger that raises or hangs", "one line, training goes on")
def test_loggers():
    passes("tests/training/test_loggers.py")


@pytest.mark.fault("B15", "schedule, decay groups and average by value", "equal to their formulas")
def test_optimization():
    passes("tests/training/test_optimizer.py")


@pytest.mark.fault("B16", "recipes with unknown keys, wrong types, NaN, alias bombs, 10 MB", "the key by its name")
def test_recipes():
    passes("tests/training/test_config.py")


@pytest.mark.fault("B30", "named pipes, devices, endless files as image or table", "one line, at once")
@pytest.mark.fault("B30", "links and paths out of the data's folder", "told, and never copied")
def test_special_files_and_links():
    files = ("tests/system/test_files.py", "tests/data/test_inspection.py", "tests/data/test_manifest.py")
    packing = ("tests/data/shards/test_pack.py", "tests/data/test_hugging_face.py")
    passes(*files, *packing, "-k", "regular or special or links or folder_only")


@pytest.mark.fault("B31", "the same images at another place; other images", "resumes with a line; refused")
def test_moved_images():
    passes("tests/training/test_images_of_a_run.py", "-k", "another_place")
