"""A shortage of memory is told by what it is; what is installed and broken says why."""

import errno

import pytest
import torch
import torch.distributed as dist

from coatnet.errors import UserError, explain_memory_shortage, import_extra, is_memory_shortage
from coatnet.system.interrupt import is_program
from coatnet.training.distributed.processes import ProcessLost, translate_errors
from coatnet.training.trainer import explain_out_of_memory

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHERS = [
    type("InvalidCxxCompiler", (RuntimeError,), {})("No working C++ compiler: out of memory"),
    NotImplementedError("no such kernel"),
    ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
    RecursionError("too deep"),
    dist.DistBackendError("NCCL communicator was aborted"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    ModuleNotFoundError("No module named 'x'"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=repr)
def test_a_shortage_of_memory_is_one(error: Exception) -> None:
    assert is_memory_shortage(error)
    assert "not enough memory" in explain_memory_shortage(error)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_memory_shortage(error)
    with pytest.raises((type(error), ProcessLost)), translate_errors(), explain_out_of_memory(5, 8, 224):
        raise error


@pytest.mark.parametrize("error", [dist.DistBackendError("NCCL aborted"), RuntimeError("[gloo/transport/tcp] closed")])
def test_a_lost_process_is_named_as_one(error: Exception) -> None:
    with pytest.raises(ProcessLost, match="another process of this run has ended"), translate_errors():
        raise error


def test_a_package_that_is_installed_and_broken_says_why(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extra.py").write_text("raise ImportError('libtbb.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"pip install 'coatnet\[x\]' \(what is installed does not work: libtbb"):
        import_extra("broken_extra", "x", "this")
    with pytest.raises(UserError, match=r"pip install 'coatnet\[x\]'$"):
        import_extra("missing_extra", "x", "this")


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        (["python", "-m", "coatnet", "predict"], True),
        (["python", "-u", "-m", "coatnet"], True),
        (["python", "/usr/local/bin/coatnet", "train"], True),
        (["python", "-m", "pytest", "coatnet"], False),
        (["python", "program.py", "-m", "coatnet"], False),
        (["python"], False),
        ([], False),
    ],
)
def test_only_the_program_handles_ctrl_c_by_itself(command_line: list[str], expected: bool) -> None:
    assert is_program(command_line) is expected
