"""The network as engines and exports run it: folded, with its normalization in front, exported to a graph.

Folding puts BatchNorms into the convolutions beside them and computes relative biases once. Outputs stay the same up to
rounding; the result cannot be trained. Shapes: N images, R resolution, C channels, K classes, A heads.
"""

import copy
import errno
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.export import Dim, ExportedProgram

from coatnet.bundle import Bundle
from coatnet.bundle.calibration import logits_and_means
from coatnet.data.transforms import Preprocessing
from coatnet.errors import import_extra
from coatnet.model.attention import MultiHeadProjection
from coatnet.model.layers import fold_batch_norm
from coatnet.model.mbconv import ConvNormGELU, MBConv
from coatnet.model.network import CoAtNet
from coatnet.model.relative_bias import GlobalRelativeBias
from coatnet.model.timm.blocks import MeanHead
from coatnet.model.transformer import FeedForward

if TYPE_CHECKING:
    import openvino

INPUT = "images"  # name of the input of every graph
MAX_BATCH_IMAGES = 4096  # chosen: torch's exporter needs an upper bound

Module = TypeVar("Module", bound=nn.Module)


class NormalizedNetwork(nn.Module):
    """The folded network with its normalization in front: uint8 images to logits and, if calibrated, their novelty.

    Args:
        bundle: the model; it is copied, to the CPU.
        dtype: precision of weights and computation.
        any_size: accept images of any size, not only (R, R).
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, bundle: Bundle, dtype: torch.dtype = torch.float32, *, any_size: bool = False) -> None:
        super().__init__()
        self.network = fold(bundle.model, any_size=any_size, resolution=bundle.preprocessing.size).to("cpu", dtype)
        self.dtype = dtype
        # Not "mean": torch 2.6 gives ONNX values the names of operations, and one is called mean.
        self.register_buffer("pixel_mean", 255 * torch.tensor(bundle.preprocessing.mean))
        self.register_buffer("pixel_std", 255 * torch.tensor(bundle.preprocessing.std))
        self.multilabel = bundle.multilabel
        self.novelty = None if bundle.calibration is None else copy.deepcopy(bundle.calibration.novelty)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (N, R, R, C) to float32 logits (N, K); a calibrated bundle adds the novelty as a last column."""
        images = (pixels.float() - self.pixel_mean) / self.pixel_std
        images = images.to(self.dtype).permute(0, 3, 1, 2)  # (N, C, R, R)
        if self.novelty is None:
            return self.network(images).float()
        logits, means = logits_and_means(self.network, images)
        logits = logits.float()
        novelty = self.novelty(to_probabilities(logits, multilabel=self.multilabel), means)
        return torch.cat([logits, novelty[:, None]], dim=1)


def to_probabilities(logits: Tensor, *, multilabel: bool) -> Tensor:
    """Logits (N, K) to probabilities (N, K): a softmax, or K sigmoids for multi-label."""
    return logits.sigmoid() if multilabel else logits.softmax(1)


def example_images(bundle: Bundle) -> Tensor:
    """Two black images, uint8 (2, R, R, C), for an exporter to trace the network with."""
    seen = bundle.preprocessing
    return torch.zeros(2, *seen.size, seen.channels, dtype=pixel_type(seen))


def pixel_type(preprocessing: Preprocessing) -> torch.dtype:
    """Of the images that the network is given: whole levels, or, of a scale, levels in single precision."""
    return torch.uint8 if preprocessing.scale is None else torch.float32


class ConstantBias(nn.Module):
    """A relative bias computed for one grid of N cells, (A, N, N)."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the bias for the grid it was computed for, (A, N, N)."""
        assert self.matrix.shape[-1] == grid[0] * grid[1]
        return self.matrix.to(dtype)


@torch.no_grad()
def fold(model: CoAtNet, *, any_size: bool = False, resolution: int | tuple[int, int] | None = None) -> CoAtNet:
    """Copy a network, in evaluation mode, with its BatchNorms folded where that is possible.

    Args:
        model: any variant.
        any_size: keep the relative biases as tables, for inputs of any size; else they are computed for one.
        resolution: that size, in pixels; by default the one that the tables belong to.
    """
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        if isinstance(module, nn.Sequential):
            _fold_sequence(module)
    for module in folded.modules():
        if isinstance(module, MBConv) and isinstance(module.norm, nn.BatchNorm2d):
            _fold_into(_first_convolution(module.expand), module.norm, norm_first=True)
            module.norm = nn.Identity()
        if isinstance(module, MeanHead) and isinstance(module.norm, nn.BatchNorm2d):
            _fold_into(module.classifier, module.norm, norm_first=True)
            module.norm = nn.Identity()
    if not any_size:
        resolution = resolution or model.resolution
        _precompute_biases(folded, resolution if isinstance(resolution, tuple) else (resolution, resolution))
    return folded


def _fold_sequence(sequence: nn.Sequential) -> None:
    """Fold each BatchNorm of a sequence into the convolution before it, or else into the one after it."""
    parts = list(sequence.children())
    for index, norm in enumerate(parts):
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        previous = parts[index - 1] if index else None
        # An affine map and average pooling commute; an affine map and max pooling do not.
        following = next((part for part in parts[index + 1 :] if not isinstance(part, nn.AvgPool2d)), None)
        if isinstance(previous, nn.Conv2d):
            _fold_into(previous, norm)
        elif (convolution := _first_convolution(following)) is not None:
            _fold_into(convolution, norm, norm_first=True)
        else:
            continue
        sequence[index] = nn.Identity()


def _first_convolution(part: nn.Module | None) -> nn.Conv2d | None:
    """The pointwise convolution that a module begins with; None for others, whose zero padding a shift would alter."""
    match part:
        case MultiHeadProjection():
            part = part.qkv
        case FeedForward() | ConvNormGELU():
            part = part[0]
    return part if isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) else None


def _fold_into(product: nn.Module | None, norm: nn.BatchNorm2d, *, norm_first: bool = False) -> None:
    """Fold a BatchNorm after a convolution or linear layer, or before it, into its weights, in place."""
    assert isinstance(product, nn.Conv2d | nn.Linear)
    weight, bias = fold_batch_norm(product, norm, norm_first=norm_first)
    product.weight, product.bias = nn.Parameter(weight), nn.Parameter(bias)


def _precompute_biases(model: CoAtNet, size: tuple[int, int]) -> None:
    """Replace the modules of relative biases by their matrices for images of one size."""
    grids: dict[nn.Module, tuple[int, int]] = {}

    def record_grid(module: nn.Module, inputs: tuple[tuple[int, int], torch.dtype]) -> None:
        grids[module] = inputs[0]

    biases = [module for module in model.modules() if isinstance(module, GlobalRelativeBias)]
    hooks = [module.register_forward_pre_hook(record_grid) for module in biases]
    parameter = next(model.parameters())
    model(parameter.new_zeros(1, model.in_channels, *size))
    for hook in hooks:
        hook.remove()
    replace_modules(model, GlobalRelativeBias, lambda bias: ConstantBias(bias.matrix(grids[bias])))


def replace_modules(model: nn.Module, kind: type[Module], make: Callable[[Module], nn.Module]) -> None:
    """Replace every submodule of a class by `make(submodule)`; replacements are not searched."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, kind):
                setattr(parent, name, make(module))


def to_program(module: nn.Module, example: Tensor, *, free: tuple[int, ...] = ()) -> ExportedProgram:
    """Export a module of one input tensor as a graph.

    Args:
        module: called in evaluation mode.
        example: an input of two images or more; a size of 1 would become a constant.
        free: axes whose size may vary, beside the first, the batch.
    """
    sizes: dict[int, Any] = {0: Dim("batch", min=1, max=MAX_BATCH_IMAGES)} | dict.fromkeys(free, Dim.DYNAMIC)
    with torch.no_grad(), silence_exporters():
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=(sizes,))
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # a file would name folders of this machine
    return program


def to_openvino(program: ExportedProgram) -> "openvino.Model":
    """Convert a graph to OpenVINO. Raises UserError if OpenVINO is not installed."""
    openvino = import_extra("openvino", "openvino", "an OpenVINO model")
    with silence_exporters():
        return openvino.convert_model(program)


def save_openvino(model: "openvino.Model", path: Path) -> None:
    """Write model.xml and model.bin. Raises OSError if the disk refuses, where OpenVINO has a RuntimeError."""
    import openvino

    try:
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise OSError(
            errno.EIO, f"OpenVINO could not write it, perhaps for lack of space ({error})", str(path)
        ) from error


def to_onnx(program: ExportedProgram, *, outputs: Sequence[str] = ("logits",)) -> "torch.onnx.ONNXProgram":
    """Convert a graph to ONNX.

    The `save` of the result writes weights above 1.6 GB to a file beside it, since protobuf is limited to 2 GB.

    Raises:
        UserError: ONNX is not installed.
    """
    for package in ("onnx", "onnxscript"):
        import_extra(package, "onnx", "an ONNX model")
    # The exporter of torch 2.6 runs products of symbolic size; only their decomposition in Python knows such sizes.
    with silence_exporters(), enable_python_dispatcher():
        converted = torch.onnx.export(
            program, (), input_names=[INPUT], output_names=list(outputs), dynamo=True, verbose=False
        )
    assert converted is not None
    for graph in (converted.model.graph, *converted.model.functions.values()):
        for node in graph:
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names folders of this machine
    return converted


@contextmanager
def silence_exporters() -> Iterator[None]:
    """Hide the warnings of exporters, which are for their authors; failures are exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
