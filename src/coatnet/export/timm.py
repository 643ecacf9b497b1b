"""A folder that timm opens, for bundles whose network is timm's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coatnet.bundle import Bundle
from coatnet.bundle.timm.folders import read_timm_folder, write_timm_folder
from coatnet.export.signature import Run, Signature, run_with_torch
from coatnet.inference.graph import silence_exporters


def write(bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write config.json and model.safetensors.

    Raises:
        UserError: timm has no such network.
    """
    write_timm_folder(bundle.model, bundle.classes, bundle.preprocessing, folder)


def reopen(folder: Path, signature: Signature) -> Run:
    """Open the folder with timm if it is installed, otherwise with this package."""
    try:
        import timm
    except ImportError:
        model: torch.nn.Module = read_timm_folder(folder).model
    else:
        with silence_exporters():
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return run_with_torch(model)


def snippet(bundle: Bundle, signature: Signature) -> str:
    """Code that opens the export in `folder`, and computes probabilities or logits (B, K) of the array `images`."""
    return (
        "import timm, torch\n"
        'model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()\n'
        "with torch.inference_mode():\n"
        "    logits = model(torch.from_numpy(images)).numpy()"
    )
