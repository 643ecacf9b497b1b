"""ONNX: one file that ONNX Runtime and many others open. Needs onnx, onnxscript and onnxruntime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coatnet.bundle import Bundle
from coatnet.errors import UserError
from coatnet.export.signature import Interface, Run, as_strings
from coatnet.inference.graphs import to_onnx

FILE = "model.onnx"


def write(bundle: Bundle, interface: Interface, metadata: Mapping[str, Any], folder: Path) -> None:
    """Fill the folder with model.onnx; weights above 1.6 GB are in model.onnx.data beside it.

    Raises:
        UserError: ONNX or ONNX Runtime is not installed.
    """
    write_file(bundle, interface, metadata, folder / FILE)


def write_file(bundle: Bundle, interface: Interface, metadata: Mapping[str, Any], path: Path) -> None:
    import_runtime()
    program = to_onnx(interface.program(bundle), inputs=interface.input, outputs=interface.output)
    import onnx

    program.model.metadata_props.update(as_strings(metadata))
    program.save(path)
    onnx.checker.check_model(str(path), full_check=True)


def reopen(folder: Path, interface: Interface) -> Run:
    """The model in the file, in ONNX Runtime."""
    return open_file(folder / FILE, interface)


def open_file(path: Path, interface: Interface) -> Run:
    """Raises UserError if ONNX Runtime is not installed."""
    session = import_runtime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda given: np.asarray(session.run(None, {interface.input: given})[0])


def import_runtime() -> Any:
    """The module. Raises UserError if it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("an ONNX model is checked with ONNX Runtime: pip install 'coatnet[onnx]'") from None
    return onnxruntime


def snippet(folder: Path, interface: Interface) -> str:
    """How to use the file."""
    return (
        "import onnxruntime\n"
        f'session = onnxruntime.InferenceSession("{folder / FILE}")\n'
        f'{interface.output} = session.run(None, {{"{interface.input}": {interface.input}}})[0]'
    )
