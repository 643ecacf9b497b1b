"""The weights alone, in one safetensors file that says what network they belong to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coatnet.bundle import Bundle
from coatnet.bundle.weights import write_tensors
from coatnet.export.signature import Interface, Run, as_strings, torch_run
from coatnet.model.network import create_model

FILE = "model.safetensors"


def write(bundle: Bundle, interface: Interface, metadata: Mapping[str, Any], folder: Path) -> None:
    """Fill the folder with model.safetensors: the tensors by the names they have in the network."""
    described = as_strings({**metadata, "model_args": bundle.model.config()})
    write_tensors(bundle.model.state_dict(), folder / FILE, described)


def reopen(folder: Path, interface: Interface) -> Run:
    """A network that is made from the file alone."""
    import json

    from safetensors import safe_open

    with safe_open(folder / FILE, "pt") as file:
        model = create_model(**json.loads(file.metadata()["model_args"])).eval()
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return torch_run(model)


def snippet(folder: Path, interface: Interface) -> str:
    """How to use the file."""
    return (
        "import coatnet, json, safetensors\n"
        f'with safetensors.safe_open("{folder / FILE}", "pt") as file:\n'
        '    model = coatnet.create_model(**json.loads(file.metadata()["model_args"])).eval()\n'
        "    model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})\n"
        "logits = model(images)"
    )
