"""The environment variables in which a launcher such as torchrun gives each process its rank.

They are also left over: in a shell, a notebook or a container that a launcher has started. Values that do not
fit together are an error of one line, before anything waits for processes that do not exist.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from coatnet.errors import UserError
from coatnet.system.terminal import warn

_LARGEST = 10**6  # chosen: no run has a million processes


class Launched(NamedTuple):
    """Which of the processes of a run this is; `local` ones are of this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def read_launcher(environment: Mapping[str, str] = os.environ) -> Launched:
    """The variables RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process without them.

    Raises:
        UserError: they are not numbers, or do not fit together.
    """
    if "WORLD_SIZE" not in environment and environment.get("RANK", "0") == "0":
        _warn_of_srun(environment)
        return Launched()
    rank, world_size = _number("RANK", environment), _number("WORLD_SIZE", environment)
    if world_size == 1 and rank in (0, None):
        return Launched()
    if rank is None or world_size is None or not rank < world_size:
        raise _unfit(environment, "RANK", "WORLD_SIZE")
    local_rank = _number("LOCAL_RANK", environment) or 0
    local_world_size = _number("LOCAL_WORLD_SIZE", environment) or max(1, local_rank + 1)
    if not local_rank < local_world_size <= world_size:
        raise _unfit(environment, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Launched(rank, world_size, local_rank, local_world_size)


def is_main_process() -> bool:
    """Whether this is the process of a run that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def meeting_place(environment: Mapping[str, str]) -> str:
    """Where the processes of a run meet, `host:port`. Raises UserError if MASTER_ADDR and MASTER_PORT do not say it."""
    host, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 2**16:
        raise _unfit(environment, "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    return f"{host}:{port}"


def _number(name: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and int(text) <= _LARGEST):
        raise _unfit(environment, name)
    return int(text)


def _unfit(environment: Mapping[str, str], *names: str) -> UserError:
    found = ", ".join(f"{n} is {environment[n][:40]!r}" if n in environment else f"{n} is not set" for n in names)
    unset = " ".join(f"-u {name}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return UserError(
        f"{found}: torchrun sets these for each process of a run; if they are left over from one, `env {unset} "
        "coatnet ...` runs without them"
    )


def _warn_of_srun(environment: Mapping[str, str]) -> None:
    """Warn that Slurm's srun starts a command several times, which trains the same model several times."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdecimal() and int(tasks[:8]) > 1 and environment.get("SLURM_PROCID", "0") == "0":
        warn(
            f"srun has started {tasks[:8]} of these, and each works alone: give srun one task a node and let it start "
            "torchrun, as `coatnet plan` writes it"
        )
