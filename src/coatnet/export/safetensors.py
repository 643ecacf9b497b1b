"""The weights alone, in one safetensors file whose metadata describes the network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coatnet.bundle import Bundle
from coatnet.bundle.weights import write_tensors
from coatnet.export.signature import Run, Signature, run_with_torch, string_metadata
from coatnet.model.network import create_model

FILE = "model.safetensors"


def write(bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write model.safetensors, tensors by their names in the network."""
    described = string_metadata({**metadata, "model_args": bundle.model.config()})
    write_tensors(bundle.model.state_dict(), folder / FILE, described)


def reopen(folder: Path, signature: Signature) -> Run:
    """Build the network from the file alone."""
    import json

    from safetensors import safe_open

    with safe_open(folder / FILE, "pt") as file:
        model = create_model(**json.loads(file.metadata()["model_args"])).eval()
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return run_with_torch(model)


def snippet(bundle: Bundle, signature: Signature) -> str:
    """Code that opens the export in `folder`, and computes probabilities or logits (B, K) of the array `images`."""
    return (
        "import coatnet, safetensors, torch\n"
        f'with safetensors.safe_open(folder / "{FILE}", "pt") as file:\n'
        '    model = coatnet.create_model(**json.loads(file.metadata()["model_args"])).eval()\n'
        "    model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})\n"
        "with torch.inference_mode():\n"
        "    logits = model(torch.from_numpy(images)).numpy()"
    )
