"""Starting real processes with torchrun, on free ports of this machine."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

needs_shards_on_cpus = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="shards on CPUs need torch 2.7"
)


def environment() -> dict[str, str]:
    """For a process that finds what this one finds, and uses one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def start(program: Sequence[str], *, processes: int = 2, options: Sequence[str] = (), **given) -> subprocess.Popen:
    """`torchrun --nproc-per-node N PROGRAM`, in a session of its own, its output to be read as one text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += [*(options or ("--standalone",)), *map(str, program)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), start_new_session=True, **(pipes | given))


def run(program: Sequence[str], *, seconds: float = 100, **given) -> tuple[int, str]:
    """Exit code and output of torchrun."""
    process = start(program, **given)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes, by force after 30 s
        output, _ = process.communicate(timeout=40)
        raise AssertionError(f"still running after {seconds} s:\n{output}") from None
    return process.returncode, output
