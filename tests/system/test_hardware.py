"""Threads sleep while they wait where other programs use the cores, unless the user has decided."""

import os
import subprocess
import sys

import pytest

from coatnet.system import hardware
from coatnet.system.hardware import BUSY_SHARE, busy_share, cpu_times, sleep_while_waiting_if_busy

STAT = """\
cpu  999 9 9 9 9 9 9 9 0 0
cpu0 10 1 2 80 5 1 1 0 0 0
cpu1 50 0 0 50 0 0 0 0 0 0
cpu2 0 0 0 99 0 0 0 1 0 0
intr 1 2 3
"""


def test_busy_time_is_all_but_idle_and_waiting_time_of_the_own_cores() -> None:
    assert cpu_times(STAT, {0, 2}) == (15 + 1, 100 + 100)
    assert cpu_times(STAT, {1}) == (50, 100)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not report the own cores")
def test_a_busy_program_is_seen() -> None:
    spin = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    programs = [subprocess.Popen(spin, stdout=subprocess.PIPE) for _ in range(hardware.num_cores())]
    try:
        for program in programs:
            assert program.stdout and program.stdout.readline()
        assert busy_share(0.3) > 0.5
    finally:
        for program in programs:
            program.kill()
            program.communicate()


@pytest.mark.parametrize(
    ("share", "given", "policy"),
    [(BUSY_SHARE, None, "passive"), (0.0, None, None), (1.0, "active", "active")],
    ids=["busy", "idle", "decided"],
)
def test_the_policy_follows_the_machine_or_the_user(
    share: float, given: str | None, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "busy_share", lambda: share)
    monkeypatch.setenv("OMP_WAIT_POLICY", given) if given else monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    sleep_while_waiting_if_busy()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_commands_that_compute_ask_before_torch_is_imported() -> None:
    program = (
        "import sys; from coatnet.cli import main; from coatnet.system import hardware\n"
        "hardware.sleep_while_waiting_if_busy = lambda: print('asked', 'torch' in sys.modules)\n"
        "main.main(['evaluate', 'none', '--data', 'none'])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "asked False\n"
