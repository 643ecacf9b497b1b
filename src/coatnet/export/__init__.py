"""Finished models in the formats of other programs. Torch is imported where it is needed, not here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One kind of export.

    `module` writes and opens it. A format is a graph, which runs without this package's code, or weights alone.
    """

    name: str
    module: str
    is_graph: bool


FORMATS = {
    each.name: each
    for each in (
        Format("onnx", "coatnet.export.onnx", True),
        Format("openvino", "coatnet.export.openvino", True),
        Format("torch-export", "coatnet.export.torch_export", True),
        Format("aoti", "coatnet.export.aoti", True),
        Format("triton", "coatnet.export.triton", True),
        Format("timm", "coatnet.export.timm", False),
        Format("safetensors", "coatnet.export.safetensors", False),
    )
}
