"""Post-training quantization to int8 by NNCF, with accuracy control: layers stay in fp32 until the accuracy holds.

Shapes: N images, R resolution, C channels, K classes.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from coatnet.bundle import Bundle
from coatnet.data.datasets import Dataset
from coatnet.data.splits import Splits
from coatnet.data.transforms import EvaluationTransform, normalize
from coatnet.errors import UserError, import_extra
from coatnet.evaluation.evaluate import open_recorded
from coatnet.evaluation.metrics import Interval, Metrics, main_figure
from coatnet.evaluation.outputs import label_translation
from coatnet.export import openvino as files
from coatnet.export.classifier import Fit, ImageProbabilities
from coatnet.export.parity import median_milliseconds, spread_images
from coatnet.export.signature import Run, Signature
from coatnet.inference.graph import (
    example_images,
    silence_exporters,
    to_openvino,
    to_program,
)

if TYPE_CHECKING:
    import openvino

MAX_CALIBRATION_IMAGES, MAX_VALIDATION_IMAGES = 300, 2000
BATCH_SIZE = 16


@dataclass(frozen=True)
class Speed:
    """Median milliseconds for a batch, measured alternately; `default` is fp32 in OpenVINO's default precision."""

    batch_size: int
    fp32: float
    default: float
    int8: float


@dataclass(frozen=True)
class Quantization:
    """Accuracy, size and speed of int8 beside fp32.

    `figure` is top1, or mean_average_precision for several labels, on `num_images` held-out images of `data`; its
    intervals are at 95 %. `agreement` is the share of these with the same likeliest class. Bytes are those of weights.
    """

    data: str
    num_calibrating: int
    num_images: int
    figure: str
    before: float
    before_interval: Interval | None
    after: float
    after_interval: Interval | None
    agreement: float
    bytes_before: int
    bytes_after: int
    speed: tuple[Speed, ...]

    def to_dict(self) -> dict[str, Any]:
        """The content of parity.json under "int8"."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A section of parity.md."""
        rows = (("fp32", self.before, self.before_interval, self.bytes_before),)
        rows += (("int8", self.after, self.after_interval, self.bytes_after),)
        lines = [
            "# int8",
            "",
            f"Calibrated on {self.num_calibrating:,} images of {self.data}, measured on {self.num_images:,} "
            f"others; the same likeliest class for {100 * self.agreement:.1f} %.",
            "",
            f"| | {self.figure}, % | 95 % interval | weights, MB |",
            "|---|---:|---|---:|",
            *(
                f"| {name} | {100 * value:.2f} | {_shown(interval)} | {size / 1e6:.2f} |"
                for name, value, interval, size in rows
            ),
            "",
            "| batch | fp32, ms | fp32 model as OpenVINO runs it by default, ms | int8, ms |",
            "|---:|---:|---:|---:|",
            *(f"| {each.batch_size} | {each.fp32:.2f} | {each.default:.2f} | {each.int8:.2f} |" for each in self.speed),
        ]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Sample:
    """Inputs of the network in batches, and their labels, (B,) or (B, K) each."""

    inputs: list[NDArray]
    labels: list[torch.Tensor]

    def __len__(self) -> int:
        return sum(map(len, self.inputs))


def quantize(
    bundle: Bundle,
    signature: Signature,
    metadata: Mapping[str, Any],
    folder: Path,
    splits: Splits,
    max_drop: float,
) -> Quantization:
    """Replace the OpenVINO model in a folder by one in int8, calibrated on the training split of the data.

    Raises:
        UserError: a split has no readable image, or the accuracy on the validation split falls by more than `max_drop`.
    """
    nncf, data = import_nncf(), splits.name
    calibrating = sample(splits.training, bundle, signature, MAX_CALIBRATION_IMAGES, 1)
    measuring = sample(splits.validation, bundle, signature, MAX_VALIDATION_IMAGES, BATCH_SIZE)
    if not len(calibrating) or not len(measuring):
        raise UserError(f"{data}: int8 needs training images to calibrate on and validation images to measure on")

    def validate(model: "openvino.CompiledModel", batches: Iterable[Any]) -> tuple[float, list[float]]:
        batches = list(batches)
        outputs = [torch.from_numpy(model(given)[0].copy()) for given, _ in batches]
        labels = [label for _, label in batches]
        shares = [fraction_correct(each, label, signature) for each, label in zip(outputs, labels, strict=True)]
        return accuracy(torch.cat(outputs), torch.cat(labels), bundle, signature)[0], shares

    exact = network(bundle, signature)
    with silence_exporters(), redirect_stdout(io.StringIO()):
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
    before, before_interval = accuracy(found["fp32"], labels, bundle, signature)
    after, after_interval = accuracy(found["int8"], labels, bundle, signature)
    figure = main_figure(bundle.multilabel)
    if before - after > max_drop + 1e-9:  # 0.7 - 0.69 is above 0.01 in floating point
        raise UserError(
            f"int8 costs too much, and nothing was written: {figure} falls from {100 * before:.2f} to "
            f"{100 * after:.2f} % on {len(measuring):,} images of {data}, by more than {100 * max_drop:g} points "
            "(--max-drop)"
        )
    weights = folder / "model.bin"
    bytes_before = weights.stat().st_size
    whole = chain(preprocessor(bundle), small) if signature.resizes else small
    files.save(whole, signature.outputs(bundle), metadata, folder)
    return Quantization(
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
    """The data to calibrate on (training split) and to measure with (validation split), divided as for the training of
    the bundle.

    Raises UserError if there is no such data, it has no training split or classes that the bundle has not, or NNCF is
    not installed.
    """
    import_nncf()
    splits = open_recorded(data, bundle)
    if not isinstance(splits, Splits) or not len(splits.training):
        raise UserError(f"{splits.name} has no training split: int8 is calibrated on one and measured on another")
    label_translation(splits.training, bundle)
    return splits


def import_nncf() -> Any:
    """The module. Raises UserError if it is not installed."""
    with silence_exporters():
        return import_extra("nncf", "int8", "int8")


def sample(dataset: Dataset, bundle: Bundle, signature: Signature, most: int, batch_size: int) -> Sample:
    """Images spread evenly over a dataset, as inputs of the network."""
    transform, translate = EvaluationTransform(bundle.preprocessing), label_translation(dataset, bundle)
    prepared, indices = [], []
    for image, index in spread_images(dataset, bundle.preprocessing, most):
        prepared.append(transform.resize(image[None]))
        indices.append(index)
    labels = translate(torch.from_numpy(dataset.labels[indices]))
    batches = [torch.cat(prepared[first : first + batch_size]) for first in range(0, len(prepared), batch_size)]
    return Sample([network_inputs(each, bundle, signature) for each in batches], list(labels.split(batch_size)))


def network_inputs(images: torch.Tensor, bundle: Bundle, signature: Signature) -> NDArray:
    """uint8 (B, 1 or C, R, R) to the input of the network: normalized (B, C, R, R), or uint8 (B, R, R, C)."""
    if signature.logits:
        return np.ascontiguousarray(normalize(images, bundle.preprocessing).numpy())
    channels = bundle.preprocessing.channels
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).expand(-1, -1, -1, channels).numpy())


def network(bundle: Bundle, signature: Signature) -> "openvino.Model":
    """The part that is quantized: all but the resizing, whose matrices need more than 8 bits."""
    if signature.logits:
        return to_openvino(signature.program(bundle))
    return to_openvino(to_program(ImageProbabilities(bundle), example_images(bundle)))


def excluded_ops(model: "openvino.Model", bundle: Bundle) -> list[str]:
    """The first convolution of a gray model: OpenVINO 2026.4 compiles it in int8 for fp32, but not for bf16."""
    if bundle.preprocessing.channels != 1:
        return []
    return [next(each for each in model.get_ordered_ops() if each.get_type_name() == "Convolution").get_friendly_name()]


def preprocessor(bundle: Bundle) -> "openvino.Model":
    """The part in front of the network: images of any size to uint8 (B, R, R, C)."""
    return to_openvino(to_program(Fit(bundle.preprocessing), Signature().example(bundle), free=(1, 2)))


def chain(first: "openvino.Model", second: "openvino.Model") -> "openvino.Model":
    """One model that feeds the output of the first to the second."""
    import openvino

    made = first.outputs[0].get_node().input_value(0)
    for taken in second.inputs[0].get_target_inputs():
        taken.replace_source_output(made)
    joined: Any = openvino.Model  # its annotations know no subclass
    return joined(second.get_results(), first.get_parameters(), first.get_friendly_name())


def _shown(interval: Interval | None) -> str:
    return "unknown" if interval is None else " to ".join(f"{100 * bound:.1f}" for bound in interval)


def accuracy(
    outputs: torch.Tensor, labels: torch.Tensor, bundle: Bundle, signature: Signature
) -> tuple[float, Interval | None]:
    """The metric of probabilities or logits (N, K), and its interval."""
    if not signature.logits:
        outputs = outputs.double().clamp(1e-12, 1 - 1e-12)
        outputs = outputs.logit() if bundle.multilabel else outputs.log()
    metrics = Metrics(len(bundle.classes), bundle.multilabel)
    metrics.update(outputs, labels)
    figure = main_figure(bundle.multilabel)
    return metrics.compute()[figure], metrics.intervals()[figure]


def fraction_correct(outputs: torch.Tensor, labels: torch.Tensor, signature: Signature) -> float:
    """The fraction of correct classes, or of correct decisions for several labels."""
    if labels.ndim == 1:
        return float((outputs.argmax(1) == labels).float().mean())
    return float(((outputs > (0.0 if signature.logits else 0.5)) == labels.bool()).float().mean())


def measure(runs: Mapping[str, Run], given: NDArray) -> Speed:
    """Time all of them on one batch."""
    calls: list[Callable[[], object]] = [lambda run=run: run(given) for run in runs.values()]
    return Speed(len(given), **dict(zip(runs, median_milliseconds(calls), strict=True)))
