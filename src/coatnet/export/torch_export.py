"""torch.export: a graph in a .pt2 file, which torch opens without this package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coatnet.bundle import Bundle
from coatnet.bundle.config import readable_json
from coatnet.export.signature import Interface, Run, torch_run
from coatnet.inference.graphs import quiet

FILE = "model.pt2"
METADATA = "metadata.json"


def write(bundle: Bundle, interface: Interface, metadata: Mapping[str, Any], folder: Path) -> None:
    """Fill the folder with model.pt2, the metadata among its extra files."""
    program = interface.program(bundle)
    with quiet():
        torch.export.save(program, folder / FILE, extra_files={METADATA: readable_json(metadata)})


def reopen(folder: Path, interface: Interface) -> Run:
    """The model in the file."""
    with quiet():
        module = torch.export.load(folder / FILE).module()
    return torch_run(module)


def snippet(folder: Path, interface: Interface) -> str:
    """How to use the file."""
    return (
        "import torch\n"
        f'model = torch.export.load("{folder / FILE}").module()\n'
        f"{interface.output} = model(torch.from_numpy({interface.input}))"
    )
