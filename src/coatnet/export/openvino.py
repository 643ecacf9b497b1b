"""OpenVINO's format of two files, the fastest on CPUs. Needs openvino."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from coatnet.bundle import Bundle
from coatnet.export.signature import Run, Signature, join_outputs, string_metadata
from coatnet.inference.graph import INPUT, save_openvino, to_openvino

if TYPE_CHECKING:
    import openvino

FILE = "model.xml"
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # CPUs with bf16 arithmetic would use it by default


def write(bundle: Bundle, signature: Signature, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write model.xml and model.bin.

    Raises:
        UserError: OpenVINO is not installed.
    """
    save(to_openvino(signature.program(bundle)), signature.outputs(bundle), metadata, folder)


def save(model: "openvino.Model", outputs: Sequence[str], metadata: Mapping[str, Any], folder: Path) -> None:
    """Name input and outputs, add the metadata, and write model.xml and model.bin."""
    model.inputs[0].get_tensor().set_names({INPUT})
    for made, name in zip(model.outputs, outputs, strict=True):
        made.get_tensor().set_names({name})
    for key, value in string_metadata(metadata).items():
        model.set_rt_info(value, ["coatnet", key])
    save_openvino(model, folder / FILE)


def reopen(folder: Path, signature: Signature) -> Run:
    """Open the model, computing in fp32."""
    return compiled(folder / FILE, EXACT)


def compiled(model: "openvino.Model | Path", settings: Mapping[str, str] = MappingProxyType({})) -> Run:
    """The model, compiled with these settings, as a function of arrays."""
    import openvino

    ready = openvino.Core().compile_model(model, "CPU", dict(settings))
    return lambda given: join_outputs([each.copy() for each in ready(given).values()])


def snippet(bundle: Bundle, signature: Signature) -> str:
    """Code that opens the export in `folder`, and computes probabilities or logits (B, K) of the array `images`."""
    outputs = signature.outputs(bundle)
    return (
        "import openvino\n"
        f'model = openvino.compile_model(folder / "{FILE}")\n'
        f"{', '.join(outputs)}, *_ = model(images).values()"
    )
