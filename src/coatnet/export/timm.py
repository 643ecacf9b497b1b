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


def snippet(folder: Path, signature: Signature) -> str:
    """Code that opens the folder with timm."""
    return (
        f"import timm\nmodel = timm.create_model('local-dir:{folder}', pretrained=True).eval()\nlogits = model(images)"
    )
