"""torch.export: a graph in a .pt2 file that torch opens without this package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coatnet.bundle import Bundle
from coatnet.bundle.config import readable_json
from coatnet.export.signature import Run, Signature, run_with_torch, torch_call
from coatnet.inference.graph import silence_exporters

FILE = "model.pt2"
METADATA = "metadata.json"


def write(bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write model.pt2, with the metadata among its extra files."""
    program = signature.program(bundle)
    with silence_exporters():
        torch.export.save(program, folder / FILE, extra_files={METADATA: readable_json(metadata)})


def reopen(folder: Path, signature: Signature) -> Run:
    """Open the graph."""
    with silence_exporters():
        module = torch.export.load(folder / FILE).module()
    return run_with_torch(module, signature.device)


def snippet(bundle: Bundle, signature: Signature) -> str:
    """Code that opens the export in `folder`, and computes probabilities or logits (B, K) of the array `images`."""
    return (
        "import torch\n"
        f'model = torch.export.load(folder / "{FILE}").module()\n'
        "with torch.inference_mode():\n"
        f"    {torch_call(signature, bundle)}"
    )
