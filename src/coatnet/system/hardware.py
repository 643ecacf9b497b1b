"""The hardware of this machine: which device computes, what it computes in, how its C library keeps memory."""

import ctypes
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from coatnet.errors import UserError, counted, cut, first_line, nearest

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
CONTROL_GROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
CPU_INFO = Path("/proc/cpuinfo")
BUSY_SHARE = 0.2  # chosen: one busy core of five; with fewer cores, part of one

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next tensor; False if it cannot.

    By default glibc maps every large tensor anew, and the kernel clears each page at its first use: 20 of the 27 ms
    of a GELU over (16, 384, 56, 56) float32 on two cores. In exchange the process holds its peak memory until it
    ends. With another C library nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1}
    return all(libc.mallopt(option, value) for option, value in settings.items())


def _control_groups(controller: str = "") -> list[Path]:
    """The folders of the control groups that bound this process, its own first, the root last; some may not exist.

    Args:
        controller: of version 1, such as "memory"; empty for version 2, which has all in one tree.
    """
    root = own = CONTROL_GROUP / controller
    with suppress(OSError, ValueError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                own = root / path.lstrip("/")  # not there in a container, which may have its own group as the root
    return [own, *(group for group in own.parents if group.is_relative_to(root))]


def num_cores() -> int:
    """The CPU cores that this process may use: those it is bound to, or fewer where a control group limits its time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    versions = (("", ["cpu.max"]), ("cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]))  # 2 and 1 of control groups
    for controller, files in versions:
        for group in _control_groups(controller):
            with suppress(OSError, ValueError):  # "max" is no number
                quota, period = (int(value) for file in files for value in (group / file).read_text().split())
                if quota > 0:  # -1 in version 1 is no limit
                    cores = min(cores, max(1, -(-quota // period)))
    return cores


def available_memory() -> int:
    """Bytes of memory that programs may still take: of the machine, or of a control group that bounds this process.

    Where the system does not say what is available, it is half of the memory.
    """
    try:
        known = [1024 * int(re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[0])]
    except (OSError, IndexError):
        known = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    versions = (("", "max", "current"), ("memory", "limit_in_bytes", "usage_in_bytes"))  # 2 and 1 of control groups
    for controller, limit, used in versions:
        for group in _control_groups(controller):
            with suppress(OSError, ValueError, IndexError):  # "max" is no number
                free = int((group / f"memory.{limit}").read_text()) - int((group / f"memory.{used}").read_text())
                # What is kept of files that were read counts as used, but is given up when memory is needed. Version 1
                # counts that of the groups below in its last line.
                kept = re.findall(r"^(?:total_)?inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
                known.append(free + int(kept[-1]))
    return max(0, min(known))


def cpu_times(stat: str, cores: set[int]) -> tuple[int, int]:
    """Clock ticks that some cores have been busy, and all their ticks, from the text of /proc/stat."""
    busy = total = 0
    for line in stat.splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, ticks[:8])
            used = user + nice + system + irq + softirq + steal
            busy, total = busy + used, total + used + idle + iowait
    return busy, total


def busy_share(seconds: float = 0.1) -> float:
    """The share of this process's cores that other programs use, measured during a sleep; 0 where it is unknown."""
    stat = Path("/proc/stat")
    if not stat.exists() or not hasattr(os, "sched_getaffinity"):
        return 0.0
    cores = os.sched_getaffinity(0)
    busy_before, total_before = cpu_times(stat.read_text(), cores)
    time.sleep(seconds)
    busy, total = cpu_times(stat.read_text(), cores)
    return (busy - busy_before) / max(total - total_before, 1)


def sleep_while_waiting_if_busy() -> None:
    """Let OpenMP threads sleep rather than spin while they wait, if other programs use the same cores.

    A spinning thread takes the core from the thread that it waits for: beside other work on two cores,
    `coatnet-pico-64` trained at 10 to 35 images/s with spinning threads and at 135 to 220 with sleeping ones. On an
    idle machine sleeping costs a tenth to a half. OpenMP reads the variable when torch loads it, so this must be
    called before torch is imported. A value that the user has set is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ and busy_share() >= BUSY_SHARE:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def choose_device(device: str = "auto") -> "torch.device":
    """The device of a name: "cpu", "cuda", "cuda:1", or "auto" for the first GPU, and the CPU where there is none.

    Raises:
        UserError: the name is another one, or there is no such GPU.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"device {device!r} is unknown{nearest(device, DEVICES)}; it is auto, cpu, cuda or cuda:N")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= num_gpus:
        found = f"{counted(num_gpus, 'GPU')}, the last is cuda:{num_gpus - 1}" if num_gpus else "no GPU"
        raise UserError(f"device {device} is not there: torch finds {found}; take --device auto or cpu")
    return torch.device(device)


def describe_device(device: "torch.device") -> str:
    """`NVIDIA H100 80GB HBM3`, or `AMD EPYC 9R14, 2 cores` for a CPU, for people."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _first_processor().get("model name") or platform.machine() or "CPU"
    return f"{name}, {counted(num_cores(), 'core')}"


def gpu_bytes(device: str) -> int:
    """Bytes of memory of the GPU of that name; 0 if the device is a CPU. Raises as `choose_device`."""
    import torch

    chosen = choose_device(device)
    return torch.cuda.get_device_properties(chosen).total_memory if chosen.type == "cuda" else 0


def multiplies_bf16(device: "torch.device") -> bool:
    """Whether the hardware multiplies matrices in bf16, and on a CPU, whether that is faster than in float32.

    Products in bf16 have 2.2 times the rate of those in float32 on AMD's Zen 4 (422 and 191 GFLOP/s), and 0.6 times on
    Intel's Emerald Rapids where a virtual machine hides its matrix unit, AMX (146 and 245). The
    vendor and the features of the processor decide, not a timing, so that every start on a machine computes alike.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and not _has_amx_hidden(_first_processor())


def _has_amx_hidden(processor: Mapping[str, str]) -> bool:
    """Whether it is an Intel processor with AMX by its generation: AVX512-FP16 came with it, in Sapphire Rapids."""
    return processor.get("vendor_id") == "GenuineIntel" and "avx512_fp16" in processor.get("flags", "").split()


def _first_processor() -> dict[str, str]:
    """What /proc/cpuinfo says about the first processor, by name; nothing where there is no such file."""
    try:
        block = CPU_INFO.read_text(errors="replace").strip().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def require_compiler(device: "torch.device", alternative: str) -> None:
    """Raise a UserError that names an alternative where torch.compile will find no C++ compiler."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch chooses it
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"torch.compile needs a C++ compiler, and there is none called {compiler} on the PATH: install "
            f"g++, name another by the variable CXX, or {alternative}"
        )


@contextmanager
def explain_compiler(alternative: str) -> Iterator[None]:
    """Raise a UserError that names an alternative where torch.compile fails, such as for a compiler without headers."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__module__ not in ("torch._inductor.exc", "torch._dynamo.exc"):
            raise
        raise UserError(
            f"torch.compile failed ({cut(first_line(error))}): fix the compiler, or {alternative}"
        ) from error
