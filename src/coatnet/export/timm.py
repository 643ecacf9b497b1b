"""A folder that timm opens, for bundles whose network is one of timm's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coatnet.bundle import Bundle
from coatnet.bundle.timm.folders import read_timm_folder, write_timm_folder
from coatnet.export.signature import Interface, Run, torch_run
from coatnet.inference.graphs import quiet


def write(bundle: Bundle, interface: Interface, metadata: Mapping[str, Any], folder: Path) -> None:
    """Fill the folder with config.json and model.safetensors.

    Raises:
        UserError: timm has no such network.
    """
    write_timm_folder(bundle.model, bundle.classes, bundle.preprocessing, folder)


def reopen(folder: Path, interface: Interface) -> Run:
    """The network in the folder: timm's where timm is installed, or else as this package reads such folders."""
    try:
        import timm
    except ImportError:
        model: torch.nn.Module = read_timm_folder(folder).model
    else:
        with quiet():
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return torch_run(model)


def snippet(folder: Path, interface: Interface) -> str:
    """How to use the folder."""
    return (
        f"import timm\nmodel = timm.create_model('local-dir:{folder}', pretrained=True).eval()\nlogits = model(images)"
    )
