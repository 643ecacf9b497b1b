"""AOTInductor: compiled ahead of time for this kind of machine and this version of torch. Needs a C++ compiler."""

import io
import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from coatnet.bundle import Bundle
from coatnet.errors import UserError
from coatnet.export.signature import Interface, Run, as_strings
from coatnet.inference.graphs import quiet

FILE = "model.pt2"


def write(bundle: Bundle, interface: Interface, metadata: Mapping[str, Any], folder: Path) -> None:
    """Fill the folder with model.pt2, a compiled library with its weights.

    Raises:
        UserError: there is no C++ compiler.
    """
    if not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
        raise UserError("format aoti compiles, and there is no C++ compiler: install one, such as g++")
    program = interface.program(bundle)
    settings = {"aot_inductor.metadata": as_strings(metadata)}
    with quiet(), redirect_stdout(io.StringIO()):
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / FILE), inductor_configs=settings)


def reopen(folder: Path, interface: Interface) -> Run:
    """The compiled model in the file."""
    with quiet():
        model = torch._inductor.aoti_load_package(str(folder / FILE))
    return lambda given: model(torch.from_numpy(given)).numpy()


def snippet(folder: Path, interface: Interface) -> str:
    """How to use the file."""
    return (
        "import torch\n"
        f'model = torch._inductor.aoti_load_package("{folder / FILE}")\n'
        f"{interface.output} = model(torch.from_numpy({interface.input}))"
    )
