"""OpenVINO's own two files, the fastest on CPUs. Needs openvino."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from coatnet.bundle import Bundle
from coatnet.export.signature import Interface, Run, as_strings
from coatnet.inference.graphs import to_openvino

if TYPE_CHECKING:
    import openvino

FILE = "model.xml"
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # or a CPU that multiplies in bf16 does so by default


def write(bundle: Bundle, interface: Interface, metadata: Mapping[str, Any], folder: Path) -> None:
    """Fill the folder with model.xml and model.bin.

    Raises:
        UserError: OpenVINO is not installed.
    """
    save(to_openvino(interface.program(bundle)), interface, metadata, folder)


def save(model: "openvino.Model", interface: Interface, metadata: Mapping[str, Any], folder: Path) -> None:
    """Name what goes in and out, add the metadata, write model.xml and model.bin."""
    import openvino

    model.inputs[0].get_tensor().set_names({interface.input})
    model.outputs[0].get_tensor().set_names({interface.output})
    for key, value in as_strings(metadata).items():
        model.set_rt_info(value, ["coatnet", key])
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)


def reopen(folder: Path, interface: Interface) -> Run:
    """The model in the files, computing in fp32."""
    return compiled(folder / FILE, EXACT)


def compiled(model: "openvino.Model | Path", settings: Mapping[str, str] = MappingProxyType({})) -> Run:
    """A function of arrays, computing as OpenVINO chooses but for the settings."""
    import openvino

    ready = openvino.Core().compile_model(model, "CPU", dict(settings))
    return lambda given: ready(given)[0].copy()


def snippet(folder: Path, interface: Interface) -> str:
    """How to use the files."""
    return (
        "import openvino\n"
        f'model = openvino.compile_model("{folder / FILE}")\n'
        f'{interface.output} = model({interface.input})["{interface.output}"]'
    )
