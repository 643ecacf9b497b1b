"""int8 by NNCF, after training: weights a scale a channel, accuracy measured, layers given back until it holds.

Shapes: N images, R resolution, C channels, K classes.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.open import open_dataset
from coatnet.data.splits import Splits
from coatnet.data.transforms import EvaluationTransform, normalise
from coatnet.errors import UserError
from coatnet.evaluation.evaluate import label_translation
from coatnet.evaluation.intervals import Interval
from coatnet.evaluation.metrics import Metrics
from coatnet.export import openvino as files
from coatnet.export.classifier import ImageProbabilities
from coatnet.export.int8_report import Quantisation, Speed
from coatnet.export.parity import alternate
from coatnet.export.resizing import Fit
from coatnet.export.sample_images import spread_images
from coatnet.export.signature import Interface, Run
from coatnet.inference.graphs import keep_private, quiet, to_openvino, to_program
from coatnet.inference.network import example_images

if TYPE_CHECKING:
    import openvino

CALIBRATING, MEASURING = 300, 2000  # images at the most
BATCH_SIZE = 16


@dataclass(frozen=True)
class Sample:
    """Images as the network takes them, in arrays of `batch_size`, and their labels, (B,) or (B, K) each."""

    inputs: list[NDArray]
    labels: list[torch.Tensor]

    def __len__(self) -> int:
        return sum(map(len, self.inputs))


def quantise(
    bundle: Bundle,
    interface: Interface,
    metadata: Mapping[str, Any],
    folder: Path,
    splits: Splits,
    max_drop: float,
) -> Quantisation:
    """Replace the OpenVINO model in a folder by one in int8, calibrated on the training split of the data.

    Raises:
        UserError: its images can not be read, or the accuracy on the validation split falls by more than `max_drop`.
    """
    nncf, data = import_nncf(), splits.name
    calibrating = sample(splits.training, bundle, interface, CALIBRATING, 1)
    measuring = sample(splits.validation, bundle, interface, MEASURING, BATCH_SIZE)
    if not len(calibrating) or not len(measuring):
        raise UserError(f"{data}: int8 needs training images to calibrate on and validation images to measure on")

    def validate(model: "openvino.CompiledModel", batches: Iterable[Any]) -> tuple[float, list[float]]:
        batches = list(batches)
        outputs = [torch.from_numpy(model(given)[0].copy()) for given, _ in batches]
        labels = [label for _, label in batches]
        shares = [share_right(each, label, interface) for each, label in zip(outputs, labels, strict=True)]
        return accuracy(torch.cat(outputs), torch.cat(labels), bundle, interface)[0], shares

    exact = network(bundle, interface)
    with quiet(), redirect_stdout(io.StringIO()):
        small = nncf.quantize_with_accuracy_control(
            exact.clone(),
            nncf.Dataset(calibrating.inputs),
            nncf.Dataset(list(zip(measuring.inputs, measuring.labels, strict=True))),
            validate,
            max_drop=max_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            preset=nncf.QuantizationPreset.MIXED,  # GELU is not symmetric
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(calibrating),
            ignored_scope=nncf.IgnoredScope(names=excluded_ops(exact, bundle)),
        )
    runs = {"fp32": files.compiled(exact, files.EXACT), "default": files.compiled(exact), "int8": files.compiled(small)}
    found = {
        name: torch.cat([torch.from_numpy(run(given)) for given in measuring.inputs]) for name, run in runs.items()
    }
    labels = torch.cat(measuring.labels)
    before, before_interval = accuracy(found["fp32"], labels, bundle, interface)
    after, after_interval = accuracy(found["int8"], labels, bundle, interface)
    figure = figure_of(bundle)
    if before - after > max_drop + 1e-9:  # or 0.7 - 0.69 would be above 0.01
        raise UserError(
            f"int8 costs too much, and nothing was written: {figure} falls from {100 * before:.2f} to "
            f"{100 * after:.2f} % on {len(measuring):,} images of {data}, by more than {100 * max_drop:g} points "
            "(--max-drop)"
        )
    weights = folder / "model.bin"
    bytes_before = weights.stat().st_size
    whole = behind(front(bundle), small) if interface.resizes else small
    files.save(whole, interface, metadata, folder)
    return Quantisation(
        data=data,
        num_calibrating=len(calibrating),
        num_images=len(measuring),
        figure=figure,
        before=before,
        before_interval=before_interval,
        after=after,
        after_interval=after_interval,
        agreement=float((found["fp32"].argmax(1) == found["int8"].argmax(1)).float().mean()),
        bytes_before=bytes_before,
        bytes_after=weights.stat().st_size,
        speed=tuple(measure(runs, given) for given in (measuring.inputs[0][:1], measuring.inputs[0])),
    )


def open_calibration(bundle: Bundle, data: str) -> Splits:
    """What to calibrate on and to measure with.

    Raises UserError if there is no such data, it has classes that the bundle does not know, or NNCF is not installed.
    """
    import_nncf()
    splits = open_dataset(data)
    label_translation(splits.training, bundle)
    return splits


def import_nncf() -> Any:
    """The module. Raises UserError if it is not installed."""
    keep_private()
    try:
        with quiet():
            import nncf
    except ImportError:
        raise UserError("int8 needs NNCF: pip install 'coatnet[int8]'") from None
    return nncf


def sample(dataset: Dataset, bundle: Bundle, interface: Interface, most: int, batch_size: int) -> Sample:
    """Images spread over a dataset, prepared as the network takes them."""
    transform, translate = EvaluationTransform(bundle.preprocessing), label_translation(dataset, bundle)
    prepared, indices = [], []
    for image, index in spread_images(dataset, most):
        prepared.append(transform.fitted(image[None]))
        indices.append(index)
    labels = translate(torch.from_numpy(dataset.labels[indices]))
    batches = [torch.cat(prepared[first : first + batch_size]) for first in range(0, len(prepared), batch_size)]
    return Sample([as_given(each, bundle, interface) for each in batches], list(labels.split(batch_size)))


def as_given(images: torch.Tensor, bundle: Bundle, interface: Interface) -> NDArray:
    """uint8 (B, 1 or C, R, R) as the network takes them: images, or uint8 (B, R, R, C)."""
    if interface.logits:
        return np.ascontiguousarray(normalise(images, bundle.preprocessing).numpy())
    channels = bundle.preprocessing.channels
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).expand(-1, -1, -1, channels).numpy())


def network(bundle: Bundle, interface: Interface) -> "openvino.Model":
    """What is quantised: all but the resizing, whose matrices need more than 8 bits."""
    if interface.logits:
        return to_openvino(interface.program(bundle))
    return to_openvino(to_program(ImageProbabilities(bundle), example_images(bundle)))


def excluded_ops(model: "openvino.Model", bundle: Bundle) -> list[str]:
    """The first convolution of a grey model: OpenVINO 2026.4 compiles it in int8 for fp32, but not for bf16."""
    if bundle.preprocessing.channels != 1:
        return []
    return [next(each for each in model.get_ordered_ops() if each.get_type_name() == "Convolution").get_friendly_name()]


def front(bundle: Bundle) -> "openvino.Model":
    """Images of any size to those that the network takes."""
    return to_openvino(to_program(Fit(bundle.preprocessing), Interface().example(bundle), free=(1, 2)))


def behind(first: "openvino.Model", second: "openvino.Model") -> "openvino.Model":
    """One model that gives what the first gives to the second."""
    import openvino

    made = first.outputs[0].get_node().input_value(0)
    for taken in second.inputs[0].get_target_inputs():
        taken.replace_source_output(made)
    joined: Any = openvino.Model  # its annotations know no subclass
    return joined(second.get_results(), first.get_parameters(), first.get_friendly_name())


def figure_of(bundle: Bundle) -> str:
    """The accuracy that is held."""
    return "mean_average_precision" if bundle.multilabel else "top1"


def accuracy(
    outputs: torch.Tensor, labels: torch.Tensor, bundle: Bundle, interface: Interface
) -> tuple[float, Interval]:
    """The figure of probabilities or logits (N, K), and its interval."""
    if not interface.logits:
        outputs = outputs.double().clamp(1e-12, 1 - 1e-12)
        outputs = outputs.logit() if bundle.multilabel else outputs.log()
    metrics = Metrics(len(bundle.classes), bundle.multilabel)
    metrics.update(outputs, labels)
    figure = figure_of(bundle)
    value = metrics.compute()[figure]
    return value, metrics.intervals()[figure] or (value, value)


def share_right(outputs: torch.Tensor, labels: torch.Tensor, interface: Interface) -> float:
    """Of the likeliest classes, or of all decisions about several labels."""
    if labels.ndim == 1:
        return float((outputs.argmax(1) == labels).float().mean())
    return float(((outputs > (0.0 if interface.logits else 0.5)) == labels.bool()).float().mean())


def measure(runs: Mapping[str, Run], given: NDArray) -> Speed:
    """All of them in turns on one batch."""
    calls: list[Callable[[], object]] = [lambda run=run: run(given) for run in runs.values()]
    return Speed(len(given), **dict(zip(runs, alternate(calls), strict=True)))
