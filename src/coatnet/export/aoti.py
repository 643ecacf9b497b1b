"""AOTInductor: compiled ahead of time for this type of machine and this version of torch. Needs a C++ compiler."""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from coatnet.bundle import Bundle
from coatnet.export.signature import Run, Signature, run_with_torch, string_metadata, torch_call
from coatnet.inference.graph import silence_exporters
from coatnet.system.hardware import explain_compiler, require_compiler

FILE = "model.pt2"
_ANOTHER_FORMAT = "take another format"


def write(bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write model.pt2, a compiled library with its weights.

    Raises:
        UserError: there is no C++ compiler.
    """
    require_compiler(torch.device("cpu"), _ANOTHER_FORMAT)
    program = signature.program(bundle)
    settings = {"aot_inductor.metadata": string_metadata(metadata)}
    with explain_compiler(_ANOTHER_FORMAT), silence_exporters(), redirect_stdout(io.StringIO()):
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / FILE), inductor_configs=settings)


def reopen(folder: Path, signature: Signature) -> Run:
    """Open the compiled model."""
    with silence_exporters():
        model = torch._inductor.aoti_load_package(str(folder / FILE))
    return run_with_torch(model)


def snippet(bundle: Bundle, signature: Signature) -> str:
    """Code that opens the export in `folder`, and computes probabilities or logits (B, K) of the array `images`."""
    return (
        "import torch\n"
        f'model = torch._inductor.aoti_load_package(str(folder / "{FILE}"))\n'
        "with torch.inference_mode():\n"
        f"    {torch_call(signature, bundle)}"
    )
