"""Threads sleep while they wait where other programs use the cores, and limits of control groups count."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coatnet.system import hardware
from coatnet.system.hardware import (
    BUSY_SHARE,
    available_memory,
    busy_share,
    cpu_times,
    describe_device,
    multiplies_bf16,
    num_cores,
    sleep_while_waiting_if_busy,
)

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


def write_groups(own: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system have control groups with these files, and this process be in the groups that `own` names."""
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    monkeypatch.setattr(hardware, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(hardware, "CONTROL_GROUP", tmp_path / "groups")


@pytest.mark.parametrize("lowest", ["a/b", "a", "."])
@pytest.mark.parametrize("version", [1, 2])
def test_the_memory_of_the_own_group_and_those_above_counts(
    version: int, lowest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version == 1:
        own, prefix = "5:cpu,cpuacct:/\n4:memory:/a/b\n0::/\n", "memory/"
        limit, used = "limit_in_bytes", "usage_in_bytes"
        unlimited, stat = f"{2**63 - 4096}\n", "inactive_file 7\nactive_file 8\ntotal_inactive_file 1000\n"
    else:
        own, prefix, limit, used = "0::/a/b\n", "", "max", "current"
        unlimited, stat = "max\n", "active_file 8\ninactive_file 1000\n"
    files = {}
    for group in (".", "a", "a/b", "a/other"):
        files[f"{prefix}{group}/memory.{limit}"] = {lowest: "9000\n", "a/other": "5000\n"}.get(group, unlimited)
        files[f"{prefix}{group}/memory.{used}"] = "5000\n"
        files[f"{prefix}{group}/memory.stat"] = stat
    write_groups(own, files, tmp_path, monkeypatch)
    assert available_memory() == 5000


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ({"a/b": "150000 100000"}, 2),
        ({"a/b": "300000 100000", "a": "50000 100000", ".": "max 100000"}, 1),
        ({"a/b": "1600000 100000", "a/other": "100000 100000"}, 8),
        ({}, 8),
    ],
)
def test_the_cpu_time_of_the_own_group_and_those_above_counts(
    quotas: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    files = {f"{group}/cpu.max": f"{text}\n" for group, text in quotas.items()}
    write_groups("0::/a/b\n", files, tmp_path, monkeypatch)
    assert num_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("150000", 2), ("-1", 8)])
def test_the_cpu_time_of_groups_of_version_1_counts(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    files = {"cpu/a/cpu.cfs_quota_us": f"{quota}\n", "cpu/a/cpu.cfs_period_us": "100000\n"}
    write_groups("4:cpu,cpuacct:/a\n", files, tmp_path, monkeypatch)
    assert num_cores() == cores


AMD = "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9R14\nflags\t\t: avx512f avx512_bf16 avx512_vnni\n"
COOPER_LAKE = "vendor_id\t: GenuineIntel\nflags\t\t: avx512f avx512_bf16 avx512_vnni\n"
SAPPHIRE_RAPIDS = "vendor_id\t: GenuineIntel\nflags\t\t: avx512f avx512_bf16 avx512_fp16\n"


@pytest.mark.parametrize(
    ("processor", "has_bf16", "has_amx", "expected"),
    [
        (AMD, True, False, True),
        (AMD.replace("avx512_vnni", "avx512_fp16"), True, False, True),
        (COOPER_LAKE, True, False, True),
        (SAPPHIRE_RAPIDS, True, True, True),
        (SAPPHIRE_RAPIDS, True, False, False),  # as in a virtual machine
        (None, True, False, True),
        (SAPPHIRE_RAPIDS, False, False, False),
        (None, False, False, False),
    ],
)
def test_a_cpu_that_has_bf16_takes_it_where_it_is_faster(
    processor: str | None,
    has_bf16: bool,
    has_amx: bool,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if processor is not None:
        second = processor.replace("avx512_fp16", "")  # is not read
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{processor}\nprocessor\t: 1\n{second}\n")
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert multiplies_bf16(torch.device("cpu")) is expected


def test_a_cpu_is_described_by_its_name_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(AMD)
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    assert describe_device(torch.device("cpu")).startswith("AMD EPYC 9R14, ")
    (tmp_path / "cpuinfo").unlink()
    assert describe_device(torch.device("cpu")).endswith(("core", "cores"))
