"""Trained models in the formats of other programs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coatnet.public_names import lazy_exports

if TYPE_CHECKING:
    from coatnet.export.export import ExportResult as ExportResult
    from coatnet.export.export import export_bundle as export_bundle


@dataclass(frozen=True)
class Format:
    """A row of `FORMATS`.

    `module` has the functions `write`, `reopen` and `snippet`; it is imported when it is used. With `is_graph` the
    export takes images as they are decoded, in batches; otherwise it is the bare network: its weights, or with
    `fixed_size` a program for images of the bundle's resolution.
    """

    name: str
    module: str
    is_graph: bool
    fixed_size: bool = False


FORMATS = {
    each.name: each
    for each in (
        Format("onnx", "coatnet.export.onnx", True),
        Format("openvino", "coatnet.export.openvino", True),
        Format("torch-export", "coatnet.export.torch_export", True),
        Format("aoti", "coatnet.export.aoti", True),
        Format("triton", "coatnet.export.triton", True),
        Format("web", "coatnet.export.web", True),
        Format("executorch", "coatnet.export.executorch", False, fixed_size=True),
        Format("space", "coatnet.export.space", False),
        Format("timm", "coatnet.export.timm", False),
        Format("safetensors", "coatnet.export.safetensors", False),
    )
}


__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "ExportResult": "coatnet.export.export",
        "export_bundle": "coatnet.export.export",
    },
)
