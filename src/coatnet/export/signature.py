"""What goes into an exported model and what comes out of it, as a graph and in words.

Shapes: B batch, H W pixels, R resolution, C channels, K classes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from coatnet.bundle import Bundle
from coatnet.export.classifier import Classifier, bare_network
from coatnet.inference.graphs import to_program
from coatnet.version import __version__

# Uint8 images or float32 images in, probabilities or logits (B, K) out.
Run = Callable[[NDArray], NDArray[np.float32]]


@dataclass(frozen=True)
class Interface:
    """Images of any size to probabilities; or with `logits` the bare network, images to logits.

    With `any_size` the network sees an image at the size it has; otherwise images are resized inside, and images
    have the resolution of the bundle.
    """

    logits: bool = False
    any_size: bool = False

    @property
    def input(self) -> str:
        return "images" if self.logits else "pictures"

    @property
    def output(self) -> str:
        return "logits" if self.logits else "probabilities"

    @property
    def resizes(self) -> bool:
        """Whether images are resized in the graph."""
        return not (self.logits or self.any_size)

    def module(self, bundle: Bundle) -> nn.Module:
        """What the export computes."""
        if self.logits:
            return bare_network(bundle, any_size=self.any_size)
        return Classifier(bundle, any_size=self.any_size)

    def program(self, bundle: Bundle) -> ExportedProgram:
        """The graph of it. Free are the batch, and height and width but for images of a fixed resolution."""
        free = () if self.logits and not self.any_size else (2, 3) if self.logits else (1, 2)
        return to_program(self.module(bundle), self.example(bundle), free=free)

    def example(self, bundle: Bundle) -> Tensor:
        """Two inputs, for an exporter to follow through the network; not square, or it might take two sizes for one."""
        side = bundle.preprocessing.resolution
        if self.logits:
            return torch.zeros(2, bundle.preprocessing.channels, side, side + 32 if self.any_size else side)
        return torch.zeros(2, side, side + 32, 3, dtype=torch.uint8)

    def shape(self, bundle: Bundle) -> tuple[int, ...]:
        """Of the input; -1 is any."""
        side = -1 if self.any_size or not self.logits else bundle.preprocessing.resolution
        return (-1, bundle.preprocessing.channels, side, side) if self.logits else (-1, -1, -1, 3)


def describe(bundle: Bundle, interface: Interface, format: str) -> dict[str, Any]:
    """metadata.json: all that a program must know to use the export."""
    activation = "none" if interface.logits else "sigmoid" if bundle.multilabel else "softmax"
    return {
        "format": format,
        "coatnet_version": __version__,
        "architecture": bundle.model.variant.name,
        "classes": list(bundle.classes),
        "multilabel": bundle.multilabel,
        "input": {
            "name": interface.input,
            "dtype": "float32" if interface.logits else "uint8",
            "shape": list(interface.shape(bundle)),
            "meaning": _meaning(interface),
        },
        "output": {"name": interface.output, "shape": [-1, len(bundle.classes)], "activation": activation},
        "preprocessing": asdict(bundle.preprocessing) | {"inside": _inside(interface)},
    }


def as_strings(metadata: Mapping[str, Any]) -> dict[str, str]:
    """A string a key, JSON where it is none yet: what the formats have room for."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in metadata.items()
    }


def torch_run(module: nn.Module) -> Run:
    """A module of torch as a function of arrays."""

    @torch.no_grad()
    def run(given: NDArray) -> NDArray[np.float32]:
        return module(torch.from_numpy(given)).numpy()

    return run


def _meaning(interface: Interface) -> str:
    if interface.logits:
        return "resized, cut and normalised as the preprocessing says; channels first"
    return "RGB, 0 to 255, height and width as they are; channels last"


def _inside(interface: Interface) -> list[str]:
    """The steps of the preprocessing that the export does itself."""
    if interface.logits:
        return []
    return ["normalise"] if interface.any_size else ["resize", "cut", "normalise"]
