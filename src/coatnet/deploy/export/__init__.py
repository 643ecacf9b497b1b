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
        Format("onnx", "coatnet.deploy.export.onnx", True),
        Format("openvino", "coatnet.deploy.export.openvino", True),
        Format("torch-export", "coatnet.deploy.export.torch_export", True),
        Format("aoti", "coatnet.deploy.export.aoti", True),
        Format("triton", "coatnet.deploy.export.triton", True),
        Format("timm", "coatnet.deploy.export.timm", False),
        Format("safetensors", "coatnet.deploy.export.safetensors", False),
    )
}
