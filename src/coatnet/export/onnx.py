"""ONNX: one file that ONNX Runtime and many others open. Needs onnx, onnxscript and onnxruntime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coatnet.bundle import Bundle
from coatnet.export.signature import Run, Signature, join_outputs, string_metadata
from coatnet.inference.graph import INPUT, to_onnx
from coatnet.system.telemetry import import_onnxruntime

FILE = "model.onnx"


def write(bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write model.onnx; weights above 1.6 GB go to model.onnx.data beside it.

    Raises:
        UserError: ONNX or ONNX Runtime is not installed.
    """
    write_file(bundle, signature, metadata, folder / FILE)


def write_file(bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], path: Path) -> None:
    import_onnxruntime()  # before the work, so that a missing package is reported at once
    program = to_onnx(signature.program(bundle), outputs=signature.outputs(bundle))
    import onnx

    program.model.metadata_props.update(string_metadata(metadata))
    program.save(path)
    onnx.checker.check_model(str(path), full_check=True)


def reopen(folder: Path, signature: Signature) -> Run:
    """Open the model in ONNX Runtime."""
    return open_file(folder / FILE, signature)


def open_file(path: Path, signature: Signature) -> Run:
    """Open a file in ONNX Runtime. Raises UserError if it is not installed."""
    session = import_onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda given: join_outputs([np.asarray(each) for each in session.run(None, {INPUT: given})])


def snippet(bundle: Bundle, signature: Signature) -> str:
    """Code that opens the export in `folder`, and computes probabilities or logits (B, K) of the array `images`."""
    return (
        "import onnxruntime\n"
        f'session = onnxruntime.InferenceSession(folder / "{FILE}")\n'
        f'{", ".join(signature.outputs(bundle))}, *_ = session.run(None, {{"{INPUT}": images}})'
    )
