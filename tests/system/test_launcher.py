"""What launchers leave in the environment is read, or refused in one line."""

import pytest

from coatnet.errors import UserError
from coatnet.system.launcher import Launched, meeting_place, read_launcher


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, Launched()),
        ({"RANK": "0"}, Launched()),
        ({"WORLD_SIZE": "1"}, Launched()),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, Launched()),
        ({"WORLD_SIZE": "3", "RANK": "2"}, Launched(2, 3)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Launched(3, 4, 1, 2)),
    ],
)
def test_the_variables_of_torchrun_are_read(environment: dict[str, str], launched: Launched) -> None:
    assert read_launcher(environment) == launched


@pytest.mark.parametrize(
    "left_over",
    [
        "WORLD_SIZE= RANK=",
        "WORLD_SIZE=x RANK=0",
        "WORLD_SIZE=2 RANK=",
        "WORLD_SIZE=2",
        "WORLD_SIZE=1 RANK=1",
        "WORLD_SIZE=0 RANK=0",
        "WORLD_SIZE=-2 RANK=0",
        "WORLD_SIZE=2 RANK=2",
        "WORLD_SIZE=2 RANK=1.0",
        "WORLD_SIZE=\u0662 RANK=0",
        f"WORLD_SIZE={'9' * 5000} RANK=0",
        "RANK=1",
        "RANK=",
        "WORLD_SIZE=2 RANK=0 LOCAL_RANK=x",
        "WORLD_SIZE=2 RANK=0 LOCAL_RANK=7",
        "WORLD_SIZE=2 RANK=0 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1",
        "WORLD_SIZE=2 RANK=0 LOCAL_WORLD_SIZE=3",
        "WORLD_SIZE=2 RANK=0 LOCAL_WORLD_SIZE=",
    ],
)
def test_what_does_not_fit_together_is_one_line(left_over: str) -> None:
    with pytest.raises(UserError, match=r"torchrun sets these .* `env -u RANK") as refused:
        read_launcher(dict(pair.split("=") for pair in left_over.split()))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("port", [None, "", "x", "0", "65536", "9" * 5000])
def test_a_run_of_several_needs_a_place_to_meet(port: str | None) -> None:
    with pytest.raises(UserError, match=r"MASTER_PORT is .*, RANK is '0', WORLD_SIZE is '2': torchrun"):
        meeting_place(
            {"MASTER_ADDR": "host", "RANK": "0", "WORLD_SIZE": "2"} | ({} if port is None else {"MASTER_PORT": port})
        )
    assert meeting_place({"MASTER_ADDR": "host", "MASTER_PORT": "29500"}) == "host:29500"


def test_srun_without_torchrun_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_launcher({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}) == Launched()
    assert capsys.readouterr().err.startswith("coatnet: warning: srun has started 4 of these")
    read_launcher({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})  # the script of a job
    assert capsys.readouterr().err == ""
