"""The signature of an export: its input and output, as a graph and as metadata.

Shapes: B batch, H W pixels, R resolution, C channels, K classes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from coatnet.bundle import Bundle
from coatnet.bundle.calibration import threshold_index
from coatnet.data.transforms import Preprocessing
from coatnet.export import FORMATS
from coatnet.export.classifier import Classifier, bare_network
from coatnet.inference.graph import INPUT, pixel_type, to_program
from coatnet.version import __version__

# Uint8 images or float32 images in; probabilities or logits (B, K) out, with the novelty, if any, as a last column.
Run = Callable[[NDArray], NDArray[np.float32]]


NOVELTY = "novelty"
SET_COVERAGES = (0.8, 0.9, 0.95, 0.99)

# How an image file becomes pixels, in training, prediction and the code of an export alike.
DECODING = {
    "transparency": "laid on white",
    "palette": "converted to RGB, with its transparency",
    "exif_orientation": "applied",
    "sixteen_bits": "divided by 257 and rounded",
    "cmyk": "converted to RGB as Pillow does",
    "grey": "repeated in three channels",
    "color_profile": "not applied",
    "animation": "the first frame",
    "above_50_megapixels": "halved until there are no more",
}

# The same where a model takes other values than 8-bit RGB.
VALUES = {
    "values": "as the file holds them, in single precision",
    "not_finite": "the low end of value_range",
    "exif_orientation": "applied",
}


@dataclass(frozen=True)
class Signature:
    """uint8 images of any size to probabilities; or, with `logits`, the bare network: normalized float32 to logits.

    With `any_size` the network runs at the size of its input. Without it, uint8 images are resized in the graph, and
    normalized ones have the resolution of the bundle. Input and outputs are on `device`.
    """

    logits: bool = False
    any_size: bool = False
    device: str = "cpu"

    @property
    def output(self) -> str:
        return "logits" if self.logits else "probabilities"

    def outputs(self, bundle: Bundle) -> tuple[str, ...]:
        """Names of all outputs: a calibrated bundle has its novelty beside the probabilities."""
        return (self.output,) if self.logits or bundle.calibration is None else (self.output, NOVELTY)

    @property
    def resizes(self) -> bool:
        """Whether the graph resizes its images."""
        return not (self.logits or self.any_size)

    def module(self, bundle: Bundle) -> nn.Module:
        """The module that the export computes."""
        if self.logits:
            return bare_network(bundle, any_size=self.any_size)
        return Classifier(bundle, any_size=self.any_size)

    def program(self, bundle: Bundle) -> ExportedProgram:
        """The exported graph. Dynamic are the batch size, and height and width unless the resolution is fixed."""
        free = () if self.logits and not self.any_size else (2, 3) if self.logits else (1, 2)
        program = to_program(self.module(bundle), self.example(bundle), free=free)
        if self.device == "cpu":
            return program
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(program, f"{self.device}:0")

    def example(self, bundle: Bundle) -> Tensor:
        """An example input for the exporter: a batch of two, not square, so that height and width stay distinct."""
        (height, width), channels = bundle.preprocessing.size, bundle.preprocessing.channels
        if self.logits:
            return torch.zeros(2, channels, height, height + 32 if self.any_size else width)
        pixels = 3 if bundle.preprocessing.scale is None else channels
        return torch.zeros(2, height, height + 32, pixels, dtype=pixel_type(bundle.preprocessing))

    def shape(self, bundle: Bundle) -> tuple[int, ...]:
        """The shape of the input; -1 is dynamic."""
        seen = bundle.preprocessing
        height, width = (-1, -1) if self.any_size or not self.logits else seen.size
        pixels = 3 if seen.scale is None else seen.channels
        return (-1, seen.channels, height, width) if self.logits else (-1, -1, -1, pixels)

    def dtype(self, bundle: Bundle) -> str:
        """The type of the input."""
        return "float32" if self.logits or bundle.preprocessing.scale is not None else "uint8"


def describe(bundle: Bundle, signature: Signature, format: str) -> dict[str, Any]:
    """The content of metadata.json: classes, input, output and preprocessing."""
    batch_size = 1 if FORMATS[format].fixed_size else -1
    activation = "none" if signature.logits else "sigmoid" if bundle.multilabel else "softmax"
    return {
        "format": format,
        **({} if signature.device == "cpu" else {"device": signature.device}),
        "coatnet_version": __version__,
        "architecture": bundle.model.variant.name,
        "classes": list(bundle.classes),
        "multilabel": bundle.multilabel,
        "input": {
            "name": INPUT,
            "dtype": signature.dtype(bundle),
            "shape": [batch_size, *signature.shape(bundle)[1:]],
            "meaning": _meaning(signature, bundle),
        },
        "output": {"name": signature.output, "shape": [batch_size, len(bundle.classes)], "activation": activation},
        **describe_calibration(bundle, signature),
        "decoding": DECODING if bundle.preprocessing.scale is None else VALUES,
        "preprocessing": _preprocessing(bundle.preprocessing) | {"inside": _inside(signature)},
    }


def describe_calibration(bundle: Bundle, signature: Signature) -> dict[str, Any]:
    """What to make of the outputs of a calibrated bundle: logits and probabilities are calibrated already."""
    if (calibration := bundle.calibration) is None:
        return {}
    described: dict[str, Any] = {"temperature": calibration.temperature[0].tolist()}
    if NOVELTY in signature.outputs(bundle):
        described[NOVELTY] = {
            "shape": [-1],
            "meaning": "share of known images that look less foreign; above 0.95 an image is unknown, as 5 % of the "
            "known ones are",
        }
    if not bundle.multilabel:
        columns = {coverage: threshold_index(coverage) for coverage in SET_COVERAGES}
        limits = {str(coverage): float(calibration.thresholds["lac"][0, at]) for coverage, at in columns.items()}
        described["sets"] = {"meaning": "classes of 1 - probability <= limit, by coverage", "limits": limits}
    return {"calibration": described}


def string_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The metadata with every value as a string, in JSON unless it is one: what the formats can store."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in metadata.items()
    }


def run_with_torch(module: Callable[[Tensor], Any], device: str = "cpu") -> Run:
    """A torch module on a device as a function of arrays."""

    @torch.no_grad()
    def run(given: NDArray) -> NDArray[np.float32]:
        # A GPU would multiply in TF32, whose 10 bits hide what an export changes.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = module(torch.from_numpy(given).to(device))
        return join_outputs([each.cpu().numpy() for each in ([found] if isinstance(found, Tensor) else found)])

    return run


def torch_call(signature: Signature, bundle: Bundle) -> str:
    """Code that calls `model`, a torch module, with the array `images`."""
    there, back = ("", "") if signature.device == "cpu" else (f'.to("{signature.device}")', ".cpu()")
    if len(outputs := signature.outputs(bundle)) == 1:
        return f"{signature.output} = model(torch.from_numpy(images){there}){back}.numpy()"
    return f"{', '.join(outputs)} = (each{back}.numpy() for each in model(torch.from_numpy(images){there}))"


def join_outputs(outputs: Sequence[NDArray]) -> NDArray[np.float32]:
    """The outputs of an export, (B, K) and perhaps (B,), as one array."""
    return np.column_stack(list(outputs)) if len(outputs) > 1 else np.array(outputs[0])


def _preprocessing(seen: Preprocessing) -> dict[str, Any]:
    """Its values, but those that say nothing of a model for 8-bit RGB."""
    return {key: value for key, value in asdict(seen).items() if value not in (None, ())}


def _meaning(signature: Signature, bundle: Bundle) -> str:
    if not signature.logits and bundle.preprocessing.scale is not None:
        return "the values of the file, height and width as they are; channels last"
    if signature.logits:
        return "resized, cut and normalized as the preprocessing says; channels first"
    return "RGB, 0 to 255, decoded as `decoding` says, height and width as they are; channels last"


def _inside(signature: Signature) -> list[str]:
    """The steps of the preprocessing that the graph contains."""
    if signature.logits:
        return []
    return ["normalise"] if signature.any_size else ["resize", "cut", "normalise"]
